"""Images from a folder: one sub-folder per class, decoded when they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimmable.cli.extras import require
from slimmable.cli.images import Images
from slimmable.errors import DataError

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TEST_SHARE = 0.2
_NAMED = 10  # broken files named in one message
_TRIED = 50_000  # files that are decoded beforehand; of more, a broken one shows when its turn comes

Files = Mapping[str, Sequence[Path]]


class FolderImages:
    """The images in a list of files, as RGB of shape (3, height, width)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Decode one file.

        Raises: DataError: if it cannot be read.
        """
        found = _decode(self.paths[index])
        if isinstance(found, str):
            raise DataError(
                f"{self.paths[index]} cannot be read ({found}); put one that can in its place, then go on with --resume"
            )
        return found


def folder_images(folder: Path, seed: int, say: Callable[[str], None]) -> Images:
    """Find `folder/<class>/<image>`.

    A fifth of each class is held out, chosen by `seed`; where the folder has `train` and `test` (or `val`) folders of
    classes, those are taken. Of up to 50,000 files, broken ones are left out; `say` gets their names and number.

    Raises: DataError: if there is no folder, no image that can be read, or no class left in one of the two parts.
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
            raise DataError(f"--data {folder}: no image left to {part}; {found} files were found")
    train_images, train_labels = _listed(train, files)
    test_images, test_labels = _listed(test, files)
    digest = _digest(folder, train_images, test_images)
    return Images(train_images, train_labels, test_images, test_labels, tuple(files), digest=digest)


def _digest(folder: Path, *parts: FolderImages) -> str:
    names = [[Path(path).relative_to(folder).as_posix() for path in part.paths] for part in parts]
    hashed = hashlib.sha256(repr(names).encode()).hexdigest()
    return f"{' and '.join(str(len(part)) for part in parts)} files, hash {hashed[:16]}"


def _classes(root: Path) -> dict[str, list[Path]]:
    """Return class name -> image files, both in alphabetical order."""
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
    """Leave out the files that cannot be read, and say which."""
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
    """Return the image, or in a few words why it cannot be read."""
    image = require("PIL.Image", "pillow")
    try:
        with image.open(path) as file:
            picture = _eight_bits(file).convert("RGB")
        data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return data.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        return str(error) or type(error).__name__


def _eight_bits(picture: Any) -> Any:
    """Return a picture of 16 bits with 8, as its conversion would cut off what is above 255, and others as they are."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return picture.convert("I").point(lambda value: value / 256).convert("L")
    if picture.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose range is unknown; write it with 8 or 16")
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
