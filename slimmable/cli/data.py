"""Images to train and evaluate on: cluttered digits, or a folder with one folder per class."""

import hashlib
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from slimmable._distributed import is_first
from slimmable._tables import listed
from slimmable.cli.config import DIGITS, PretrainConfig, printable, require, say
from slimmable.cli.faults import GO_ON, STOPPING, explained_fault
from slimmable.errors import DataError, SlimmableError

_SMALLEST_CANVAS = 20
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others, such as EPS, would start other programs
_MOST_PIXELS = 89_478_485  # of an image, like Pillow's limit
_MOST_STRETCHED = 100  # times as long as wide
_NAMED = 10  # broken files listed in one message
_TRIED = 50_000  # files that are checked in advance; with more, a broken one is found when its turn comes

Labelled = list[tuple[Path, int]]  # files, each with the number of its class
Key = tuple[int, int]  # an epoch, and the index of an image


class ImageSet(Protocol):
    """Images by index, uint8 of shape (channels, height, width), of any sizes; a tensor of images is one too."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Images:
    """Training and held-out images with their classes, int64 of shape (images,)."""

    train: ImageSet
    train_labels: Tensor  # which only supervised training and evaluation use
    test: ImageSet
    test_labels: Tensor
    classes: tuple[str, ...]
    channels: int = 3
    handwriting: bool = False  # they show characters, which must not be mirrored
    digest: str | None = None  # of the files of a folder: their number and a hash of their names


def load_images(config: PretrainConfig) -> Images:
    """Return the images of `config`; the split does not depend on the run's seed."""
    if config.data == DIGITS:
        return cluttered_digits(config.num_images, config.num_images // 4, config.image_size)
    return folder_images(Path(config.data), seed=0, say=say if is_first() else lambda text: None)


def cluttered_digits(train: int = 4096, test: int = 1024, size: int = 24, seed: int = 0) -> Images:
    """Return `train` and `test` cluttered digits of `size` x `size` pixels, the same ones for the same `seed`.

    The digits ship with scikit-learn and are made too hard to classify by their pixels alone: each 8x8 handwritten
    digit is drawn at a random place, scale and rotation on a larger canvas, with a fragment of another digit as clutter
    (Mnih et al., *Recurrent Models of Visual Attention*, 2014, section 4). Training and held-out images are made from
    different handwritten digits.

    Raises: DataError: if `size` is below 20 pixels, too small for a digit with clutter.
    """
    if size < _SMALLEST_CANVAS:
        raise DataError(f"digits do not fit into {size} x {size} pixels; use --image-size {_SMALLEST_CANVAS} or more")
    handwriting = require("sklearn.datasets", "scikit-learn").load_digits()  # 1,797 digits
    digits = torch.from_numpy(handwriting.images).float().div(16).unsqueeze(1)  # (digits, 1, 8, 8), in [0, 1]
    labels = torch.from_numpy(handwriting.target).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    held_out = torch.arange(len(digits)) % 4 == 0  # of each class
    parts = []
    for source, count in ((order[~held_out], train), (order[held_out], test)):
        source = source[torch.randperm(len(source), generator=generator)]
        chosen = source[torch.arange(count) % len(source)]  # every digit equally often
        canvas = _draw(digits, chosen, source, size, generator)
        parts.append((canvas.mul(255).round().to(torch.uint8), labels[chosen]))
    (train_images, train_labels), (test_images, test_labels) = parts
    return Images(train_images, train_labels, test_images, test_labels, tuple("0123456789"), 1, handwriting=True)


def _draw(digits: Tensor, chosen: Tensor, clutter: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw `digits[chosen]` and a 4x4 fragment of one of `digits[clutter]` on canvases, (images, 1, size, size)."""
    others = clutter[torch.randint(len(clutter), (len(chosen),), generator=generator)]
    top, left = torch.randint(1, 4, (2, len(chosen), 1, 1, 1), generator=generator)
    line = torch.arange(8)
    rows, columns = ((start <= line) & (line < start + 4) for start in (top, left))
    fragments = digits[others] * (rows.mT & columns)
    return torch.maximum(_place(digits[chosen], size, generator), _place(fragments, size, generator))


def _place(digits: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw every digit 12 to 18 pixels tall, rotated by up to 20 degrees, at a random place inside the canvas."""
    count = len(digits)
    pixels = 12 + 6 * torch.rand(count, generator=generator)
    angle = math.radians(20) * (2 * torch.rand(count, generator=generator) - 1)
    room = (1 - pixels / size).unsqueeze(1)  # how far the centre can move, in canvas coordinates from -1 to 1
    centre = room * (2 * torch.rand(count, 2, generator=generator) - 1)
    cos, sin = angle.cos() * size / pixels, angle.sin() * size / pixels
    linear = torch.stack([cos, sin, -sin, cos], 1).view(count, 2, 2)
    theta = torch.cat([linear, -linear @ centre.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, [count, 1, size, size], align_corners=False)
    return F.grid_sample(digits, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class FolderImages:
    """The images in a list of files, as RGB of shape (3, height, width)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        found = _decode(self.paths[index])
        if isinstance(found, str):
            raise DataError(f"{printable(self.paths[index])} cannot be read ({found}); replace it, then {GO_ON}")
        return found


def folder_images(folder: Path, seed: int, say: Callable[[str], None]) -> Images:
    """Return the images in `folder/<class>/<image>`.

    A fifth of each class, chosen by `seed`, is held out, unless the folder has its own split into the folders `train`
    and `test` (or `val`). Among up to 50,000 files, broken ones are left out and reported to `say`.

    Raises: DataError: if there is no such folder, no readable image to train on or hold out, or a link out of it.
    """
    if not os.path.isdir(folder):
        raise DataError(f"--data {printable(folder)}: there is no such folder")
    held_out = [folder / name for name in ("test", "val") if (folder / name).is_dir()][:1]
    split = [folder / "train", *held_out] if held_out and (folder / "train").is_dir() else [folder]
    found = [_classes(root, folder) for root in split]
    classes = tuple(found[0])
    if unknown := listed([printable(name) for name in found[-1] if name not in found[0]], 5):
        raise DataError(f"--data {printable(folder)}: nothing to train on for the held-out classes {unknown}")
    parts = [[(path, at) for at, name in enumerate(classes) for path in part.get(name, [])] for part in found]
    total = sum(map(len, parts))
    if total <= _TRIED:
        parts = _readable(parts, say)
    train, test = parts if len(parts) == 2 else _hold_out(parts[0], seed)
    for purpose, part in (("train on", train), ("hold out", test)):
        if not part:
            raise DataError(f"--data {printable(folder)}: no image left to {purpose}; {total} files were found there")
    images = [FolderImages([path for path, _ in part]) for part in (train, test)]
    labels = [torch.tensor([number for _, number in part]) for part in (train, test)]
    names = [[path.relative_to(folder).as_posix() for path, _ in part] for part in (train, test)]
    digest = f"{len(train)} and {len(test)} files, hash {hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"
    return Images(images[0], labels[0], images[1], labels[1], classes, digest=digest)


def _classes(root: Path, data: Path) -> dict[str, list[Path]]:
    """Return the image files of each class in `root`, both in alphabetical order.

    Refused are links out of the folder `data`, and those to folders, which could lead to images twice, or in circles.
    """
    found: dict[str, list[Path]] = {}
    unread: list[OSError] = []
    try:
        for place, folders, names in os.walk(root, onerror=unread.append):
            images = [Path(place, name) for name in names if Path(name).suffix.lower() in _SUFFIXES]
            for path in (*(Path(place, name) for name in folders), *images, *([] if root == data else [root])):
                target = Path(os.path.realpath(path)) if path.is_symlink() else path
                if target != path and (path.is_dir() or not target.is_relative_to(os.path.realpath(data))):
                    raise DataError(
                        f"--data {printable(data)}: {printable(path)} is a link to {printable(target)}, but only "
                        "links to files of the same folder are followed; replace it by copies (cp -rL) or hard links "
                        "(cp -rlL) of them"
                    )
            for part in Path(place).relative_to(root).parts[:1]:
                found.setdefault(part, []).extend(images)
        for error in unread:
            raise error
    except (OSError, RecursionError) as error:
        raise DataError(f"--data {printable(data)} cannot be listed ({error})") from error
    if not any(found.values()):
        expected = f"one folder per class, as in cat/1.jpg ({', '.join(sorted(_SUFFIXES))})"
        raise DataError(f"--data {printable(root)} holds no images; expected {expected}")
    return {name: sorted(paths) for name, paths in sorted(found.items()) if paths}


def _readable(parts: Sequence[Labelled], say: Callable[[str], None]) -> list[Labelled]:
    """Leave out and report the files that cannot be read."""
    paths = [path for part in parts for path, _ in part]
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such files are left out
        reasons = pool.map(lambda path: found if isinstance(found := _decode(str(path)), str) else None, paths)
        broken = {path: reason for path, reason in zip(paths, reasons, strict=True) if reason is not None}
    if broken:
        lines = "".join(f"\n  {printable(path)} ({reason})" for path, reason in list(broken.items())[:_NAMED])
        more = f"\n  and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        say(f"left out {len(broken)} files that cannot be read:{lines}{more}")
    return [[pair for pair in part if pair[0] not in broken] for part in parts]


def _decode(path: str) -> Tensor | str:
    """Return the image, or the reason why it cannot be read."""
    try:
        if not os.path.isfile(path):  # a pipe could be waited for without end
            return "it is no file, or leads to none"
        with Image.open(path, formats=_FORMATS) as file:
            if file.width * file.height > _MOST_PIXELS or max(file.size) > _MOST_STRETCHED * min(file.size):
                return f"{file.width} x {file.height} pixels are too many, or too long a strip"
            picture: Tensor = pil_to_tensor(_eight_bits(file).convert("RGB"))
        return picture.contiguous()
    except Exception as error:  # decoders raise many kinds of errors on broken files
        return str(error) or type(error).__name__


def _eight_bits(picture: Any) -> Any:
    """Return the picture, reduced from 16 to 8 bits if necessary, because Pillow would clip its values at 255."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return picture.convert("I").point(lambda value: value / 256).convert("L")
    if picture.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose range is unknown; save it with 8 or 16 bits")
    return picture


def _hold_out(files: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    generator = torch.Generator().manual_seed(seed)
    train, test = Labelled(), Labelled()
    for _, group in groupby(files, key=lambda pair: pair[1]):
        own = list(group)
        order = torch.randperm(len(own), generator=generator).tolist()
        count = min(len(own) - 1, max(1, round(0.2 * len(own))))
        test += [own[place] for place in sorted(order[:count])]
        train += [own[place] for place in sorted(order[count:])]
    return train, test


def seed_of(*numbers: int) -> int:
    """Return a seed for torch; different numbers give different seeds."""
    return hash(numbers) % 2**63  # Python hashes integers alike in every process


class Views(Dataset[list[Tensor]]):
    """Views and label by epoch and index of the image; they do not depend on the process that draws them, or when."""

    def __init__(self, images: ImageSet, labels: Tensor, transforms: Sequence[nn.Module], seed: int) -> None:
        self.images, self.labels, self.transforms, self.seed = images, labels, transforms, seed

    def __getitem__(self, key: Key) -> list[Tensor]:
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


def load(images: Dataset[Any], workers: int, **settings: Any) -> Iterator[Any]:
    """Yield batches as a DataLoader with these settings does, but errors of its processes as this package's."""
    try:
        yield from DataLoader(images, num_workers=workers, worker_init_fn=_ignore_terminal, **settings)
    except DataError as error:  # from a worker, it has a traceback in front of the message
        raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from error
    except (MemoryError, OSError, RuntimeError) as error:
        if (fault := explained_fault(error)) is None:
            raise
        raise SlimmableError(f"{fault}; {GO_ON}") from error


def _ignore_terminal(worker: int) -> None:
    """Leave Ctrl-C and the end of the terminal, which reach all its processes, to the process that trains."""
    for number in set(STOPPING) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)


class Plain(Dataset[Tensor]):
    """Images for evaluation, uint8: the shorter side is resized, to `size` if not told, and the centre cropped."""

    def __init__(self, images: ImageSet, size: int, resized: int | None = None) -> None:
        self.images = images
        self.transform = v2.Compose([v2.Resize(resized or size, antialias=True), v2.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
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
    for batch in load(images, workers, batch_size=batch_size):
        yield batch.float() / 255


def make_views(name: str, size: int, *, min_crop_scale: float, mirror: bool) -> list[nn.Module]:
    """Return one transform per view, from uint8 images of any size to square floats in [0, 1].

    `name` says whose augmentations: "mocov2" (Chen et al. 2020), "simclr" (also Chen et al. 2020), "byol" (Grill et al.
    2020, appendix B; MoCo v3 and VICReg use the same), "gated" (Krishna et al. 2023, for small images), "supervised"
    (crop, mirror and jitter), "crops" (crop and mirror), or "digits" (for handwriting: geometry, brightness and blur).
    A view has `size` x `size` pixels of at least `min_crop_scale` of the image's area. With `mirror`, half of the views
    are flipped left to right. All draw torch's global random numbers.
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
    if name == "crops":
        return [view(crop)]
    strength = {"mocov2": (0.4, 0.4, 0.4, 0.1), "simclr": (0.8, 0.8, 0.8, 0.2)}.get(name, (0.4, 0.4, 0.2, 0.1))
    first = (crop, v2.RandomApply([v2.ColorJitter(*strength)], p=0.8), v2.RandomGrayscale(0.2))
    if name == "byol":
        return [view(*first, blur(1.0)), view(*first, blur(0.1), v2.RandomSolarize(128, p=0.2))]
    if name == "gated":
        return [view(*first, v2.RandomSolarize(128, p=0.1))] * 2
    return [view(*first, blur(0.5))] * 2
