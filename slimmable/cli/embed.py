"""`slimmable embed`: the features of a folder of images at some widths, as evaluation computes them, in one file."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from timm.utils.misc import natural_key
from torch import Tensor, nn
from torchvision.transforms import v2

from slimmable._atomic import write_aside
from slimmable._width import at_width
from slimmable._widths import width_index
from slimmable.cli.config import printable
from slimmable.cli.data import SUFFIXES, Pictures, Plain, batches_of
from slimmable.errors import DataError, UsageError
from slimmable.files.card import Source


def embed(
    source: Source, folder: Path, widths: Sequence[float], output: Path, device: torch.device, workers: int = 0
) -> dict[str, tuple[int, ...]]:
    """Write the features of the images in `folder` as an npz file, whole or not at all; return its arrays' shapes.

    They are `w0.5` and so on, float32 of shape (images, features); `names`, the paths in the folder; and, where images
    are in folders, `classes`, the names of these, and `labels`, -1 for images that are in none.
    """
    channels, height, side = source.image
    if channels not in (1, 3) or height != side or len(source.mean) not in (1, channels):
        taken = f"{channels} x {height} x {side} numbers, with means {source.mean}"
        raise UsageError(f"{source.name} takes {taken}; embed makes grey or RGB squares, so give the folder of a run")
    names = _listed(folder)
    labels = [os.path.basename(os.path.dirname(name)) for name in names]
    classes = sorted({*labels} - {""}, key=natural_key)
    arrays: dict[str, Any] = {"names": np.array(names)}
    if classes:
        numbers = {name: number for number, name in enumerate(classes)}
        arrays |= {"classes": np.array(classes), "labels": np.array([numbers.get(label, -1) for label in labels])}
    paths = [str(folder / name) for name in names]
    pictures = Pictures([(path, 0) for path in paths], paths, labels, channels)
    images = Plain(pictures, side, v2.Normalize(source.mean, source.std))
    model = source.model.to(device).eval()
    chosen = {f"w{known}": known for known in (source.widths[width_index(each, source.widths)] for each in widths)}

    shapes: dict[str, tuple[int, ...]] = {}

    def write(path: Path) -> None:
        with TemporaryDirectory(dir=path.parent) as room:  # a file for each width, as memory may be too small
            done = 0
            for batch in batches_of(images, workers=workers):
                for name, width in chosen.items():
                    with at_width(model, width):
                        found = _features(source.name, model, batch.to(device))
                    if name not in arrays:
                        shape = (len(names), found.shape[1])
                        arrays[name] = np.lib.format.open_memmap(f"{room}/{name}.npy", "w+", "float32", shape)
                    arrays[name][done : done + len(found)] = found.numpy()
                done += len(batch)
            np.savez(path, **arrays)
            shapes.update((name, array.shape) for name, array in arrays.items())
            arrays.clear()  # or the files could not be removed on Windows

    write_aside(output, write)
    return shapes


@torch.no_grad()
def _features(name: str, model: nn.Module, images: Tensor) -> Tensor:
    """Return what the network gives out, or, if it has a classifier, what that reads."""
    whole: Any = model
    classifies = getattr(model, "num_classes", 0)
    found = whole.forward_head(whole.forward_features(images), pre_logits=True) if classifies else whole(images)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise UsageError(f"{name} does not output one feature vector per image; choose another model")
    return found.float().cpu()


def _listed(folder: Path) -> list[str]:
    """Return the paths of the images in `folder`, in alphabetical order; links to folders are not followed."""
    if not os.path.isdir(folder):
        raise DataError(f"{printable(folder)}: there is no such folder of images")

    def refuse(error: OSError) -> None:
        raise DataError(f"{printable(folder)} cannot be listed ({error})") from error

    places = os.walk(folder, onerror=refuse)
    found = [Path(place, name).relative_to(folder).as_posix() for place, _, names in places for name in names]
    if images := sorted(name for name in found if Path(name).suffix.lower() in SUFFIXES):
        return images
    raise DataError(f"{printable(folder)} holds no images ({', '.join(sorted(SUFFIXES))})")
