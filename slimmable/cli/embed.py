"""`slimmable embed`: the features of a folder of images at some widths, as evaluation computes them, in one file."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils.misc import natural_key
from torch import Tensor
from torchvision.transforms import v2

from slimmable._atomic import write_aside
from slimmable._width import at_width
from slimmable.cli.config import printable
from slimmable.cli.data import SUFFIXES, Pictures, Plain
from slimmable.cli.evaluation import features_in
from slimmable.cli.export import Source
from slimmable.cli.run import output_for
from slimmable.errors import DataError, UsageError


def embed(
    source: Source, folder: Path, widths: Sequence[float], output: Path, device: torch.device, workers: int = 0
) -> int:
    """Write the features of the images in `folder` as an npz file, whole or not at all; return how many images.

    They are what the network gives out, or, if it has a classifier, what that reads. The arrays are `w0.5` and so on,
    float32 of shape (images, features); `names`, the paths in the folder; and, where images are in folders, `classes`,
    the names of these, and `labels`, -1 for images that are in none.
    """
    channels, height, side = source.image
    if channels not in (1, 3) or height != side or len(source.mean) not in (1, channels):
        taken = f"{channels} x {height} x {side} numbers, with means {source.mean}"
        raise UsageError(f"{source.name} takes {taken}; embed makes grey or RGB squares, so give the folder of a run")
    model: Any = source.model
    if getattr(model, "num_classes", 0):
        model.reset_classifier(0)
    features = output_for(torch.zeros(2, *source.image), model, source.name)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UsageError(f"{source.name} does not output one feature vector per image; choose another model")
    unread: list[OSError] = []
    places = os.walk(folder, onerror=unread.append)  # not into links to folders
    found = [Path(place, name).relative_to(folder) for place, _, files in places for name in files]
    names = sorted(path.as_posix() for path in found if path.suffix.lower() in SUFFIXES)
    if unread or not names:
        why = f"cannot be listed ({unread[0]})" if unread else f"holds no images ({', '.join(sorted(SUFFIXES))})"
        raise DataError(f"{printable(folder)} {why}")
    paths, labels = [str(folder / name) for name in names], [Path(name).parent.name for name in names]
    arrays: dict[str, Any] = {"names": np.array(names)}
    if classes := sorted({*labels} - {""}, key=natural_key):
        numbers = {name: number for number, name in enumerate(classes)}
        arrays |= {"classes": np.array(classes), "labels": np.array([numbers.get(label, -1) for label in labels])}
    images = Plain(Pictures([*zip(paths)], paths, labels, channels), side, v2.Normalize(source.mean, source.std))
    passes = {f"w{width}": partial(at_width, model.to(device), width) for width in widths}
    write_aside(output, lambda path: np.savez(path, **arrays | features_in(passes, model, images, workers)[0]))
    return len(names)
