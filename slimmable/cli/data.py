"""Images to train and evaluate on: cluttered digits, or a folder with one folder per class."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from slimmable._distributed import is_first
from slimmable.cli.config import DIGITS, PretrainConfig
from slimmable.cli.extras import require, say
from slimmable.errors import DataError

_SMALLEST_CANVAS = 20
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TEST_SHARE = 0.2
_NAMED = 10  # broken files listed in one message
_TRIED = 50_000  # files that are checked in advance; with more, a broken one is found when its turn comes

Files = Mapping[str, Sequence[Path]]


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
        raise DataError(
            f"digits cannot be drawn on a canvas of {size} pixels; use --image-size {_SMALLEST_CANVAS} or more"
        )
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
    """Draw `digits[chosen]` and a fragment of one of `digits[clutter]` on canvases of shape (images, 1, size, size)."""
    others = clutter[torch.randint(len(clutter), (len(chosen),), generator=generator)]
    fragments = _fragment(digits[others], generator)
    return torch.maximum(_place(digits[chosen], size, generator), _place(fragments, size, generator))


def _fragment(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Keep a random 4x4 corner of the inner part of every digit and clear the rest."""
    rows, columns = torch.randint(1, 4, (2, len(digits), 1, 1, 1), generator=generator)
    line = torch.arange(8)
    inside_rows = (line.view(8, 1) >= rows) & (line.view(8, 1) < rows + 4)
    inside_columns = (line >= columns) & (line < columns + 4)
    kept: Tensor = digits * (inside_rows & inside_columns)
    return kept


def _place(digits: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw every digit 12 to 18 pixels tall, rotated by up to 20 degrees, at a random place inside the canvas."""
    count = len(digits)
    pixels = 12 + 6 * torch.rand(count, generator=generator)
    angle = math.radians(20) * (2 * torch.rand(count, generator=generator) - 1)
    room = (1 - pixels / size).unsqueeze(1)  # how far the centre can move, in canvas coordinates from -1 to 1
    centre = room * (2 * torch.rand(count, 2, generator=generator) - 1)
    cos, sin = angle.cos() * size / pixels, angle.sin() * size / pixels
    linear = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
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
        """Decode one file, or raise DataError if it cannot be read."""
        found = _decode(self.paths[index])
        if isinstance(found, str):
            raise DataError(f"{self.paths[index]} cannot be read ({found}); replace it, then continue with --resume")
        return found


def folder_images(folder: Path, seed: int, say: Callable[[str], None]) -> Images:
    """Return the images in `folder/<class>/<image>`.

    A fifth of each class, chosen by `seed`, is held out, unless the folder has its own split into the folders `train`
    and `test` (or `val`). Among up to 50,000 files, broken ones are left out and reported to `say`.

    Raises: DataError: if there is no such folder, or no readable image to train on or hold out.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: there is no such folder")
    held_out = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    split = held_out is not None and (folder / "train").is_dir()
    files = _classes(folder / "train" if split else folder)
    given = {} if not split or held_out is None else _classes(held_out)
    parts = [files, {name: given[name] for name in files if name in given}]
    found = sum(len(paths) for part in parts for paths in part.values())
    if found <= _TRIED:
        parts = _readable(parts, say)
    train, test = parts if split else _hold_out(parts[0], seed)
    for part, images in (("train on", train), ("hold out", test)):
        if not any(images.values()):
            raise DataError(f"--data {folder}: no image left to {part}; {found} files were found there")
    train_images, train_labels = _listed(train, files)
    test_images, test_labels = _listed(test, files)
    names = [[Path(path).relative_to(folder).as_posix() for path in part.paths] for part in (train_images, test_images)]
    hashed = hashlib.sha256(repr(names).encode()).hexdigest()
    digest = f"{len(train_images)} and {len(test_images)} files, hash {hashed[:16]}"
    return Images(train_images, train_labels, test_images, test_labels, tuple(files), digest=digest)


def _classes(root: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, both in alphabetical order."""
    files = {
        folder.name: sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }
    files = {name: paths for name, paths in files.items() if paths}
    if not files:
        raise DataError(
            f"--data {root} holds no images; expected one folder per class, as in {root}/cat/1.jpg "
            f"({', '.join(sorted(_SUFFIXES))})"
        )
    return files


def _readable(parts: Sequence[Files], say: Callable[[str], None]) -> list[dict[str, list[Path]]]:
    """Leave out and report the files that cannot be read."""
    paths = [path for part in parts for listed in part.values() for path in listed]
    with ThreadPoolExecutor() as pool:
        reasons = pool.map(lambda path: found if isinstance(found := _decode(str(path)), str) else None, paths)
        broken = {path: reason for path, reason in zip(paths, reasons, strict=True) if reason is not None}
    if broken:
        listed = "".join(f"\n  {path} ({reason})" for path, reason in list(broken.items())[:_NAMED])
        more = f"\n  and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        say(f"left out {len(broken)} files that cannot be read:{listed}{more}")
    return [{name: [path for path in listed if path not in broken] for name, listed in part.items()} for part in parts]


def _decode(path: str) -> Tensor | str:
    """Return the image, or the reason why it cannot be read."""
    try:
        with Image.open(path) as file:
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


def _hold_out(files: Files, seed: int) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    generator = torch.Generator().manual_seed(seed)
    train: dict[str, list[Path]] = {}
    test: dict[str, list[Path]] = {}
    for name, paths in files.items():
        order = torch.randperm(len(paths), generator=generator).tolist()
        count = min(len(paths) - 1, max(1, round(_TEST_SHARE * len(paths)))) if paths else 0
        test[name] = [paths[place] for place in sorted(order[:count])]
        train[name] = [paths[place] for place in sorted(order[count:])]
    return train, test


def _listed(part: Files, classes: Files) -> tuple[FolderImages, Tensor]:
    paths = [path for name in classes for path in part.get(name, [])]
    labels = [number for number, name in enumerate(classes) for _ in part.get(name, [])]
    return FolderImages(paths), torch.tensor(labels)
