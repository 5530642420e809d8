"""Images to train and evaluate on: cluttered digits, folders and tar files, and data sets that timm knows by name."""

import hashlib
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from slimmable._distributed import rank
from slimmable._tables import listed
from slimmable.cli.config import DIGITS, PretrainConfig, printable, say
from slimmable.cli.faults import STOPPING
from slimmable.errors import DataError, explained, require

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others, such as EPS, would start other programs
_MOST_PIXELS = 89_478_485  # of an image, like Pillow's limit
_MOST_STRETCHED = 100  # times as long as wide
_NAMED = 10  # broken files listed in one message
_TRIED = 50_000  # files that are checked in advance; with more, a broken one is found when its turn comes

_TRAIN, _HELD_OUT = ("train", "training"), ("test", "val", "valid", "validation", "eval", "evaluation")
Key = tuple[int, int]  # an epoch, and the index of an image
ImageSet: TypeAlias = "Tensor | Pictures"  # by index, uint8 of shape (channels, height, width)


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
    digest: str | None = None  # of all but the digits: their number, and a hash of their names and classes


def load_images(config: PretrainConfig) -> Images:
    """Return the images of `config`, of data sets that timm knows by name in their own split, if they have one."""
    name, root, held_out = config.data, config.data_dir, ["validation"]
    told = say if rank() == 0 else lambda text: None
    if name == DIGITS:
        return cluttered_digits(config.num_images, config.num_images // 4, config.image_size)
    if not config.kind:
        return folder_images(Path(name), 0, told)
    if name.lower() in ("torch/image_folder", "torch/folder"):
        return folder_images(Path(str(root)), 0, told, level=0)
    if config.kind == "hfds":
        require("datasets", "datasets", extra=None)
    with explained(f"--data {printable(name)} cannot be read"):
        found: dict[str, Any] = {"train": create_dataset(name, root, split="train")}
        if config.kind == "hfds":
            splits = found["train"].reader.dataset.info.splits or {}
            held_out = [split for split in (*_HELD_OUT[1:], "test") if split in splits][:1]
        found |= {split: create_dataset(name, root, split=split) for split in held_out}
        readers = {split: getattr(part, "reader", part) for split, part in found.items()}
        parts = [_listed(reader, f"{name} {split}", config.channels) for split, reader in readers.items()]
    characters = config.channels == 1 and "fashion" not in name.lower()
    return replace(_split(str(root), parts, 0, told), handwriting=characters)


def cluttered_digits(train: int = 4096, test: int = 1024, size: int = 24, seed: int = 0) -> Images:
    """Return `train` and `test` cluttered digits of `size` x `size` pixels, the same ones for the same `seed`.

    Each 8x8 handwritten digit of scikit-learn is drawn at a random place, scale and rotation on a larger canvas, with a
    4x4 fragment of another as clutter, too hard for raw pixels (Mnih et al., *Recurrent Models of Visual Attention*,
    2014, section 4). Training and held-out images are made from different ones.
    """
    if size < 20:
        raise DataError(f"digits do not fit into {size} x {size} pixels; use --image-size 20 or more")
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
    return Images(*parts[0], *parts[1], tuple("0123456789"), 1, handwriting=True)


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


@dataclass(frozen=True)
class Pictures:
    """Images that timm or torchvision lists, each decoded when it is asked for: (channels, height, width)."""

    pairs: Any  # by index: a path, an open file or a picture, and its class
    names: Sequence[str]  # for messages
    labels: Sequence[str]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        try:
            source = self.pairs[index][0]
            if isinstance(source, str) and not os.path.isfile(source):  # a pipe could be waited for without end
                raise ValueError("it is no file, or leads to none")
            with source if isinstance(source, Image.Image) else Image.open(source, formats=_FORMATS) as picture:
                width, height = picture.size
                if width * height > _MOST_PIXELS or max(width, height) > _MOST_STRETCHED * min(width, height):
                    raise ValueError(f"{width} x {height} pixels are too many, or too long a strip")
                pixels: Any = picture
                if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
                    pixels = picture.convert("I").point(lambda value: value / 256).convert("L")  # it would be clipped
                elif picture.mode in ("I", "F"):
                    raise ValueError("pixels of 32 bits, whose range is unknown; save it with 8 or 16 bits")
                found: Tensor = pil_to_tensor(pixels.convert("L" if self.channels == 1 else "RGB"))
            return found.contiguous()
        except Exception as error:  # decoders raise many kinds of errors on broken files
            why = str(error) or type(error).__name__
            raise DataError(f"{printable(self.names[index])} cannot be read ({why}); replace it") from error

    def take(self, places: Sequence[int]) -> "Pictures":
        """Return the images at these places."""
        names, labels = ([each[place] for place in places] for each in (self.names, self.labels))
        return replace(self, pairs=Subset(self.pairs, places), names=names, labels=labels)


def folder_images(folder: Path, seed: int, say: Callable[[str], None], level: int = -1) -> Images:
    """Return the images in a folder, a tar file or a folder of tar files; for `level`, see `pictures_in`.

    A fifth of each class, chosen by `seed`, is held out, unless there are folders, or tar files, `train` and `test` (or
    `val`). Among up to 50,000 files, broken ones are left out and reported to `say`.
    """
    if not (os.path.isdir(folder) or _is_tar(folder)):
        raise DataError(f"--data {printable(folder)}: there is no such folder, nor a tar file of this name")
    with explained(f"--data {printable(folder)} cannot be listed"):
        roots: list[Path] = []
        for names in (_TRAIN, _HELD_OUT):
            paths = (folder / f"{name}{suffix}" for name in names for suffix in ("", ".tar"))
            roots += [path for path in paths if path.is_dir() or _is_tar(path)][:1]
        if len(roots) < 2 or any(map(Path.is_symlink, roots)):
            roots = [folder]
        parts = [_part(root, folder, level) for root in roots]
    return _split(str(folder), parts, seed, say)


def _is_tar(path: Path) -> bool:
    return path.suffix == ".tar" and os.path.isfile(path)


def pictures_in(folder: Path, data: Path, level: int = -1) -> Pictures:
    """Return the images in a folder at any depth, by path; a class is the last folder, or the first at `level` 0.

    Refused are links out of the folder `data`, and those to folders, which could lead to images twice, or in circles.
    """
    unread: list[OSError] = []
    names: list[str] = []
    for place, folders, files in os.walk(folder, onerror=unread.append):
        files = [name for name in files if Path(name).suffix.lower() in {*SUFFIXES, ".tar"}]
        for path in filter(Path.is_symlink, (Path(place, name) for name in (*folders, *files))):
            target = Path(os.path.realpath(path))
            if path.is_dir() or not target.is_relative_to(os.path.realpath(data)):
                way = "but only links to files of the same folder are followed; copy (cp -rL) or hard-link it (cp -rlL)"
                raise DataError(f"{printable(path)} is a link to {printable(target)}, {way}")
        names += (os.path.join(place, name) for name in files if not name.lower().endswith(".tar"))
    if unread:
        raise unread[0]
    names.sort()
    ways = [Path(name).relative_to(folder).parts[:-1] for name in names]
    return Pictures([*zip(names)], names, [way[level] if way else "" for way in ways])


def _part(root: Path, data: Path, level: int) -> Pictures:
    """Return the images in folders of `root`, or if there are none, in tar files."""
    found = pictures_in(root, data, level) if root.is_dir() else None
    if found is not None and any(found.labels):
        return found
    tars = [root] if found is None else [*root.glob("*.tar")]
    if not tars or not all(map(_is_tar, tars)):
        expected = f"one folder per class, as in cat/1.jpg ({', '.join(sorted(SUFFIXES))}), or tar files"
        raise DataError(f"--data {printable(root)} holds no images; expected {expected}")
    # none stays open, for workers would share its position, and no cache is written beside it
    return _listed(ReaderImageInTar(str(root), cache_tarfiles=False, cache_tarinfo=False), str(root))


def _listed(found: Any, name: str, channels: int = 3) -> Pictures:
    """Return the images of one of timm's readers or of torchvision's data sets, which messages call `name`."""
    files, names = found, [f"{name} {number:07}" for number in range(len(found))]
    if isinstance(found, ReaderImageInTar):
        paths = ((tar, inner and inner.name, info.path) for info, tar, inner in found.samples)
        names, numbers = ["/".join([name, *filter(None, parts)]) for parts in paths], found.targets
    elif hasattr(found, "samples"):
        files, names, numbers = found.samples, *map(list, zip(*found.samples, strict=True))
    elif hasattr(found, "label_key"):  # on the Hub
        numbers = found.dataset[found.label_key]
    else:
        numbers = torch.as_tensor(found.targets).view(len(found), -1)[:, 0].tolist()
    known = getattr(found, "class_to_idx", None) or getattr(found, "class_name_to_idx", {})
    classes = {number: label for label, number in known.items()}
    return Pictures(files, names, [classes.get(number, str(number)) for number in numbers], channels)


def _split(place: str, parts: list[Pictures], seed: int, say: Callable[[str], None]) -> Images:
    """Return the images of two parts, or of one, a fifth of which is held out; `place` begins the names of files."""
    known = [set(part.labels) - {"", "."} for part in parts]  # files beside the folders of classes have none
    if unknown := listed(sorted(map(printable, known[-1] - known[0])), 5):
        raise DataError(f"--data {printable(place)}: nothing to train on for the held-out classes {unknown}")
    classes = tuple(sorted(known[0], key=lambda name: (natural_key(name), name)))
    numbers = {name: number for number, name in enumerate(classes)}
    for at, part in enumerate(parts):  # in an order of their own, as the order of a listing depends on the file system
        keys = [(numbers.get(label, -1), name) for label, name in zip(part.labels, part.names, strict=True)]
        parts[at] = part.take(sorted((row for row, key in enumerate(keys) if key[0] >= 0), key=keys.__getitem__))
    total = sum(map(len, parts))
    if total <= _TRIED:
        parts = _readable(parts, say)
    if len(parts) == 1:
        held_out = set[int]()
        generator, (whole,) = torch.Generator().manual_seed(seed), parts
        for _, group in groupby(range(len(whole)), key=whole.labels.__getitem__):
            own = list(group)
            count = min(len(own) - 1, max(1, round(0.2 * len(own))))
            held_out.update(own[at] for at in torch.randperm(len(own), generator=generator)[:count].tolist())
        parts = [whole.take(sorted(places)) for places in ({*range(len(whole))} - held_out, held_out)]
    for purpose, part in zip(("train on", "hold out"), parts, strict=True):
        if not part.names:
            raise DataError(f"--data {printable(place)}: no image left to {purpose}; {total} files were found there")
    train, test = parts
    labels = [torch.tensor([numbers[label] for label in part.labels]) for part in parts]
    names = [[name.removeprefix(f"{place}/") for name in part.names] for part in parts]
    content = repr((names, train.labels, test.labels)).encode()
    digest = f"{len(train)} and {len(test)} files, hash {hashlib.sha256(content).hexdigest()[:16]}"
    return Images(train, labels[0], test, labels[1], classes, train.channels, digest=digest)


def _readable(parts: Sequence[Pictures], say: Callable[[str], None]) -> list[Pictures]:
    """Leave out and report the images that cannot be read."""

    def fault(part: Pictures, at: int) -> str:
        try:
            part[at]
        except DataError as error:
            return str(error).removesuffix("; replace it")
        return ""

    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such files are left out
        faults = [list(pool.map(partial(fault, part), range(len(part)))) for part in parts]
    if broken := list(filter(None, chain(*faults))):
        more = f"\n  and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        say("\n  ".join([f"left out {len(broken)} files:", *broken[:_NAMED]]) + more)
    return [part.take([at for at, why in enumerate(own) if not why]) for part, own in zip(parts, faults, strict=True)]


def seed_of(*numbers: int) -> int:
    """Return a seed for torch; different numbers give different seeds."""
    return hash(numbers) % 2**63  # Python hashes integers alike in every process


class Views(Dataset[list[Tensor]]):
    """Views and labels by epochs and indices of images; they do not depend on the process that draws them, or when."""

    def __init__(self, images: ImageSet, labels: Tensor, transforms: Sequence[nn.Module], seed: int) -> None:
        self.images, self.labels, self.transforms, self.seed = images, labels, transforms, seed

    def __getitems__(self, keys: Sequence[Key]) -> list[Tensor]:
        """Return a batch: for each transform the views, (images, channels, height, width), then the labels."""
        numbers, drawn = [number for _, number in keys], []
        images = [self.images[number] for number in numbers]
        with torch.random.fork_rng(devices=[]):
            for key, image in zip(keys, images, strict=True):
                torch.default_generator.manual_seed(seed_of(self.seed, *key))  # `torch.manual_seed` takes .1 ms more
                drawn.append([transform(image) for transform in self.transforms])
        views = zip(self.transforms, map(torch.stack, zip(*drawn, strict=True)), strict=True)
        seen = (each.of(torch.stack(images), view) if isinstance(each, Handwritten) else view for each, view in views)
        return [*seen, self.labels[numbers]]


class Handwritten(nn.Module):
    """A view of square images of characters, any number at once: turned, cropped, lit and blurred at random."""

    def __init__(self, size: int, least: float, most: float) -> None:
        super().__init__()
        self.size, self.least, self.most = size, least, most  # of the view, and of the part of the image's area

    def forward(self, image: Tensor) -> Tensor:
        """Return what a view of one image is made by, drawn at random; its bits do not depend on a batch."""
        turn, area, ratio, right, down, light, contrast, blur = torch.rand(8, dtype=torch.float64).tolist()
        area, ratio = self.least + (self.most - self.least) * area, (4 / 3) ** (2 * ratio - 1)
        wide, high = (min(1, math.sqrt(area * each)) for each in (ratio, 1 / ratio))
        x, y, angle = (1 - wide) * (2 * right - 1), (1 - high) * (2 * down - 1), math.radians(10) * (2 * turn - 1)
        cos, sin = math.cos(angle), math.sin(angle)
        place = wide * cos, -high * sin, x, wide * sin, high * cos, y  # a matrix, as for `affine_grid`
        return torch.tensor([*place, 0.6 + 0.8 * light, 0.6 + 0.8 * contrast, max(0, 2 * blur - 1)])

    def of(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return a view of each image, as drawn for it."""
        grid = F.affine_grid(drawn[:, :6].view(-1, 2, 3), [len(images), 1, self.size, self.size], align_corners=False)
        seen = F.grid_sample(images.float() / 255, grid, align_corners=False)
        light, contrast, blur = drawn[:, 6:].view(-1, 3, 1, 1, 1).unbind(1)
        seen = (seen * light).clamp(max=1)
        seen = (seen * contrast + seen.mean((1, 2, 3), keepdim=True) * (1 - contrast)).clamp(0, 1)
        return seen * (1 - blur) + F.avg_pool2d(seen, 3, 1, 1, count_include_pad=False) * blur


def keys_of_steps(
    count: int, batch_size: int, epochs: int, start: int, seed: int, rank: int = 0, processes: int = 1
) -> Iterator[list[Key]]:
    """Yield the keys of one process's share of each whole batch of an epoch's images, after the first `start` steps."""
    share = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)
    first, skipped = divmod(start, count // batch_size)
    for epoch in range(first, epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, epoch))).tolist()
        for step in range(skipped, count // batch_size):
            yield [(epoch, number) for number in order[step * batch_size :][:batch_size][share]]
        skipped = 0


def load(images: Dataset[Any], workers: int, **settings: Any) -> Iterator[Any]:
    """Yield batches as a DataLoader with these settings does, but the DataErrors of its processes as if raised here."""
    try:
        settings |= {"collate_fn": list} if isinstance(images, Views) else {}  # which come as batches
        yield from DataLoader(images, num_workers=workers, worker_init_fn=_ignore_terminal, **settings)
    except DataError as error:  # from a worker, it has a traceback in front of the message
        raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from error


def _ignore_terminal(worker: int) -> None:
    """Leave Ctrl-C and the end of the terminal, which reach all its processes, to the process that trains."""
    for number in set(STOPPING) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)


class Plain(Dataset[Tensor]):
    """Images for evaluation, `most` of them, uint8: the shorter side is `resized`, the centre of `size` cropped."""

    def __init__(
        self, images: ImageSet, size: int, normalise: nn.Module | None = None, most: int | None = None, resized: int = 0
    ) -> None:
        self.images, self.normalise = images, normalise or nn.Identity()
        self.transform = v2.Compose([v2.Resize(resized or size, antialias=True), v2.CenterCrop(size)])
        count = len(images) if most is None else min(most, len(images))
        self.places = [place * len(images) // count for place in range(count)]  # a folder is ordered by class

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[self.places[index]])  # type: ignore[no-any-return]


def batches_of(images: Plain, batch_size: int = 256, workers: int = 0) -> Iterator[Tensor]:
    """Yield the images in order, as floats in [0, 1], normalised."""
    for batch in load(images, workers, batch_size=batch_size):
        yield images.normalise(batch.float() / 255)


def normalisation(config: PretrainConfig) -> nn.Module:
    """Return what turns images in [0, 1] into the values that the network of a run takes."""
    return v2.Normalize(config.mean or (0.0,), config.std or (1.0,))  # type: ignore[no-any-return]


def make_views(
    name: str, size: int, *, min_crop_scale: float, mirror: bool, local_crops: int = 0, local_size: int = 1
) -> list[nn.Module]:
    """Return one transform per view, from uint8 images of any size to square floats in [0, 1].

    `name` says whose augmentations: "mocov2" and "simclr" (Chen et al. 2020), "byol" (Grill et al. 2020, appendix B, as
    in others), "gated" (Krishna et al. 2023, for small images), "supervised", "crops" or "digits". Views show at least
    `min_crop_scale` of the image's area. Then come `local_crops`, from a twentieth of it up (Caron et al. 2021).
    """
    crops = (size, (min_crop_scale, 1.0)), (local_size, (min(0.05, min_crop_scale), min_crop_scale))
    if name == "digits":
        both: list[nn.Module] = [Handwritten(each, *scale) for each, scale in crops]
        return [both[0]] * 2 + both[1:] * local_crops
    whole, part = (v2.RandomResizedCrop(*crop, antialias=True) for crop in crops)
    strength = {"mocov2": (0.4, 0.4, 0.4, 0.1), "simclr": (0.8, 0.8, 0.8, 0.2)}.get(name, (0.4, 0.4, 0.2, 0.1))
    colours = v2.RandomApply([v2.ColorJitter(*strength)], p=0.8), v2.RandomGrayscale(0.2)

    def blur(share: float, size: int = size) -> nn.Module:
        kernel = max(3, size // 10 + 1 - size // 10 % 2)  # a tenth of the side, odd (Chen et al. 2020, appendix A)
        return v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=share)  # type: ignore[no-any-return]

    local = [(part, *colours, blur(0.5, local_size))] * local_crops
    known: dict[str, list[tuple[nn.Module, ...]]] = {
        "crops": [(whole,)],
        "supervised": [(whole, v2.ColorJitter(0.4, 0.4, 0.4))],
        "byol": [(whole, *colours, blur(1.0)), (whole, *colours, blur(0.1), v2.RandomSolarize(128, p=0.2)), *local],
        "gated": [*[(whole, *colours, v2.RandomSolarize(128, p=0.1))] * 2, *local],
    }
    last = (*([v2.RandomHorizontalFlip()] if mirror else []), v2.ToDtype(torch.float32, scale=True))
    return [v2.Compose([*changes, *last]) for changes in known.get(name, [(whole, *colours, blur(0.5))] * 2 + local)]
