"""Batches of images: random views that depend only on the seed, the epoch and the image, and plain images."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.transforms import v2

from slimmable.cli.data import ImageSet
from slimmable.errors import DataError, SlimmableError

Key = tuple[int, int]


def seed_of(*numbers: int) -> int:
    """Return a seed for torch; different numbers give different seeds."""
    return hash(numbers) % 2**63  # Python hashes integers alike in every process


class Views(Dataset[list[Tensor]]):
    """Views and label by epoch and index of the image; they do not depend on the process that draws them, or when."""

    def __init__(self, images: ImageSet, labels: Tensor, transforms: Sequence[nn.Module], seed: int) -> None:
        self.images, self.labels, self.transforms, self.seed = images, labels, transforms, seed

    def __getitem__(self, key: Key) -> list[Tensor]:
        """Return the views, each with its own random numbers, and the label."""
        image = self.images[key[1]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, *key))
            return [*(transform(image) for transform in self.transforms), self.labels[key[1]]]


class Steps(Sampler[list[Key]]):
    """One process's share of the images of each step, as lists of (epoch, index of the image).

    Of `count` images an incomplete batch at the end of an epoch is dropped. `batch_size` is that of all processes
    together, a multiple of their number; `start` is the number of steps done.
    """

    def __init__(
        self, count: int, batch_size: int, epochs: int, start: int, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.count, self.batch_size, self.epochs = count, batch_size, epochs
        self.start, self.seed, self.per_epoch = start, seed, count // batch_size
        self.share = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)

    def __len__(self) -> int:
        return max(0, self.epochs * self.per_epoch - self.start)

    def __iter__(self) -> Iterator[list[Key]]:
        first, skipped = divmod(self.start, self.per_epoch)
        for epoch in range(first, self.epochs):
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            order = torch.randperm(self.count, generator=generator).tolist()
            for step in range(skipped, self.per_epoch):
                batch = order[step * self.batch_size :][: self.batch_size]
                yield [(epoch, number) for number in batch[self.share]]
            skipped = 0


def load(views: Views, steps: Steps, workers: int, pinned: bool = False) -> Iterator[list[Tensor]]:
    """Yield the views of each step, each of shape (batch, channels, size, size), followed by the labels."""
    return _read(views, workers, batch_sampler=steps, pin_memory=pinned)


def _read(images: Dataset[Any], workers: int, **settings: Any) -> Iterator[Any]:
    """Yield batches, with errors of the worker processes as errors of this package."""
    try:
        yield from DataLoader(images, num_workers=workers, worker_init_fn=_ignore_interrupts, **settings)
    except DataError as error:  # from a worker, it has a traceback in front of the message
        raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SlimmableError(f"a process that reads images ended ({error}); continue with --resume") from error


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which reaches all processes of a terminal, to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Plain(Dataset[Tensor]):
    """Images for evaluation, uint8: the shorter side is resized to `size`, and the centre cropped."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images = images
        self.transform = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        """Return one image of shape (channels, size, size)."""
        return self.transform(self.images[index])  # type: ignore[no-any-return]

    def stacked(self) -> Tensor:
        """Return all images, shape (images, channels, size, size)."""
        return torch.stack([self[index] for index in range(len(self))])


def some_of(images: Plain, most: int | None) -> Subset[Tensor]:
    """Return up to `most` of the images, or all, evenly spaced, because a folder is ordered by class."""
    count = len(images) if most is None else min(most, len(images))
    return Subset(images, [place * len(images) // count for place in range(count)])


def batches_of(images: Plain | Subset[Tensor], batch_size: int = 256, workers: int = 0) -> Iterator[Tensor]:
    """Yield the images in order, as floats in [0, 1]."""
    for batch in _read(images, workers, batch_size=batch_size):
        yield batch.float() / 255


def make_views(name: str, size: int, *, min_crop_scale: float, mirror: bool) -> list[nn.Module]:
    """Return one transform per view, from uint8 images of any size to square floats in [0, 1].

    `name` says whose augmentations: "mocov2" (Chen et al. 2020), "simclr" (also Chen et al. 2020), "byol" (Grill et al.
    2020, appendix B; MoCo v3 and VICReg use the same), "supervised" (crop, mirror and jitter), or "digits" (for
    handwriting: geometry, brightness and blur). A view has `size` x `size` pixels of at least `min_crop_scale` of the
    image's area. With `mirror`, half of the views are flipped left to right. All draw torch's global random numbers.
    """
    crop = v2.RandomResizedCrop(size, scale=(min_crop_scale, 1.0), antialias=True)

    def view(*changes: nn.Module) -> nn.Module:
        flip = [v2.RandomHorizontalFlip()] if mirror else []
        return v2.Compose([*changes, *flip, v2.ToDtype(torch.float32, scale=True)])  # type: ignore[no-any-return]

    def blur(share: float) -> nn.Module:
        kernel = max(3, size // 10 + 1 - size // 10 % 2)  # a tenth of the side, odd (Chen et al. 2020, appendix A)
        return v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=share)  # type: ignore[no-any-return]

    if name == "digits":
        turn = v2.RandomAffine(10, interpolation=v2.InterpolationMode.BILINEAR)
        light = v2.ColorJitter(brightness=0.4, contrast=0.4)
        softer = v2.RandomApply([v2.GaussianBlur(3, (0.1, 1.0))], p=0.5)
        return [view(turn, crop, light, softer)] * 2
    if name == "supervised":
        return [view(crop, v2.ColorJitter(0.4, 0.4, 0.4))]
    strength = {"mocov2": (0.4, 0.4, 0.4, 0.1), "simclr": (0.8, 0.8, 0.8, 0.2), "byol": (0.4, 0.4, 0.2, 0.1)}[name]
    first = (crop, v2.RandomApply([v2.ColorJitter(*strength)], p=0.8), v2.RandomGrayscale(0.2))
    if name == "byol":
        return [view(*first, blur(1.0)), view(*first, blur(0.1), v2.RandomSolarize(128, p=0.2))]
    return [view(*first, blur(0.5))] * 2
