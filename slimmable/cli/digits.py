"""Cluttered digits: real data that ships with scikit-learn, made hard enough that pixels alone do not solve it.

The 8x8 handwritten digits are drawn at a random place, scale and rotation on a larger canvas, together with a
fragment of another digit as clutter (the cluttered-digits protocol of Mnih et al., *Recurrent Models of Visual
Attention*, 2014, section 4). Training and held-out images are made from different handwritten digits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slimmable.cli.extras import require
from slimmable.cli.images import Images
from slimmable.errors import DataError

SMALLEST_CANVAS = 20


def cluttered_digits(train: int = 4096, test: int = 1024, size: int = 24, seed: int = 0) -> Images:
    """Return `train` and `test` cluttered digits of `size` x `size` pixels, the same ones for the same `seed`.

    Raises: DataError: if `size` is below 20 pixels, too small for a digit with clutter beside it.

    >>> images = cluttered_digits(train=20, test=10)
    >>> images.train.shape, images.test.shape, images.train.dtype
    (torch.Size([20, 1, 24, 24]), torch.Size([10, 1, 24, 24]), torch.uint8)
    """
    if size < SMALLEST_CANVAS:
        raise DataError(
            f"digits on a canvas of {size} pixels cannot be drawn; use --image-size {SMALLEST_CANVAS} or more"
        )
    digits, labels = _handwriting()
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
    classes = tuple(str(digit) for digit in range(10))
    return Images(train_images, train_labels, test_images, test_labels, classes, channels=1, handwriting=True)


def _handwriting() -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn, shape (1797, 1, 8, 8) in [0, 1], and their labels."""
    data = require("sklearn.datasets", "scikit-learn").load_digits()
    return torch.from_numpy(data.images).float().div(16).unsqueeze(1), torch.from_numpy(data.target).long()


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
    """Draw every digit 12 to 18 pixels tall, turned by up to 20 degrees, at a random place inside the canvas."""
    count = len(digits)
    pixels = 12 + 6 * torch.rand(count, generator=generator)
    angle = math.radians(20) * (2 * torch.rand(count, generator=generator) - 1)
    room = (1 - pixels / size).unsqueeze(1)  # of the centre, in the canvas's coordinates from -1 to 1
    centre = room * (2 * torch.rand(count, 2, generator=generator) - 1)
    cos, sin = angle.cos() * size / pixels, angle.sin() * size / pixels
    linear = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    theta = torch.cat([linear, -linear @ centre.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, [count, 1, size, size], align_corners=False)
    drawn: Tensor = F.grid_sample(digits, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return drawn
