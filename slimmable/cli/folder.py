"""Images from a folder: one sub-folder per class, decoded once and held in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimmable._errors import DataError
from slimmable.cli.extras import require
from slimmable.cli.images import Images

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TEST_SHARE = 0.2
_NAMED = 10  # broken files named in one message


def folder_images(folder: Path, size: int, seed: int, say: Callable[[str], None]) -> Images:
    """Read `folder/<class>/<image>` as RGB of `size` x `size` pixels: the shorter side resized, the centre cut out.

    A fifth of each class is held out, chosen by `seed`; where the folder has `train` and `test` (or `val`) folders of
    classes, those are taken. Broken files are left out; `say` gets their names and number.

    Raises: DataError: if there is no folder, no image that can be read, or no class left in one of the two parts.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: there is no such folder")
    held_out = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    split = held_out is not None and (folder / "train").is_dir()
    root = folder / "train" if split else folder
    files = _classes(root)
    train, broken = _read(files, size)
    classes = tuple(files)
    if split and held_out is not None:
        test, broken_too = _read({name: paths for name, paths in _classes(held_out).items() if name in files}, size)
        broken += broken_too
    else:
        train, test = _hold_out(train, seed)
    if broken:
        listed = "".join(f"\n  {path} ({reason})" for path, reason in broken[:_NAMED])
        more = f"\n  and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        say(f"left out {len(broken)} files that cannot be read:{listed}{more}")
    for part, images in (("train on", train), ("hold out", test)):
        if not any(len(stack) for stack in images.values()):
            raise DataError(
                f"--data {folder}: no image left to {part}; {sum(map(len, files.values()))} files were found"
            )
    return Images(*_stack(train, classes), *_stack(test, classes), classes=classes)


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


def _read(files: dict[str, list[Path]], size: int) -> tuple[dict[str, list[Tensor]], list[tuple[Path, str]]]:
    """Decode all files; return class -> images of shape (3, size, size), and the broken files with the reason."""
    image = require("PIL.Image", "pillow")
    images: dict[str, list[Tensor]] = {}
    broken: list[tuple[Path, str]] = []
    with ThreadPoolExecutor() as pool:
        for name, paths in files.items():
            images[name] = []
            for path, result in zip(paths, pool.map(lambda path: _decode(image, path, size), paths), strict=True):
                if isinstance(result, Tensor):
                    images[name].append(result)
                else:
                    broken.append((path, result))
    return images, broken


def _decode(image: Any, path: Path, size: int) -> Tensor | str:
    """Return the image, or in a few words why it cannot be read."""
    try:
        with image.open(path) as file:
            picture = file.convert("RGB")
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), image.Resampling.BILINEAR, reducing_gap=3)
        data = bytearray(picture.crop((left, top, left + size, top + size)).tobytes())
        return torch.frombuffer(data, dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).contiguous()
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        return str(error) or type(error).__name__


def _hold_out(images: dict[str, list[Tensor]], seed: int) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    train: dict[str, list[Tensor]] = {}
    test: dict[str, list[Tensor]] = {}
    for name, stack in images.items():
        order = torch.randperm(len(stack), generator=generator).tolist()
        count = min(len(stack) - 1, max(1, round(_TEST_SHARE * len(stack)))) if stack else 0
        test[name] = [stack[place] for place in sorted(order[:count])]
        train[name] = [stack[place] for place in sorted(order[count:])]
    return train, test


def _stack(images: dict[str, list[Tensor]], classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    labels = [number for number, name in enumerate(classes) for _ in images.get(name, [])]
    return torch.stack([image for name in classes for image in images.get(name, [])]), torch.tensor(labels)
