"""Glyphs: characters in many fonts among fainter ones; procedural, with as many images as one asks for.

The 62 letters and digits are drawn in the fonts that ship with matplotlib, each turned, sheared and scaled, light on
dark, over two fainter characters as clutter. Held-out images use fonts that training has not seen.
"""

from __future__ import annotations

import math
import string
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimmable.cli.data import Images
from slimmable.errors import require

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_DRAWN = 48  # pixels of the stencils that images are made from
_HELD_OUT = ("DejaVuSerif-Italic", "DejaVuSansMono-Bold", "STIXGeneral", "cmss10")
_TRAINED = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold"),
    *("DejaVuSerif-BoldItalic", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmtt10"),
)


def glyphs(train: int = 8192, test: int = 2048, size: int = 32, seed: int = 0) -> Images:
    """Return `train` and `test` images of `size` x `size` pixels in 62 classes, the same ones for the same `seed`.

    >>> images = glyphs(train=20, test=10)
    >>> images.train.shape, images.test.shape, len(images.classes)
    (torch.Size([20, 1, 32, 32]), torch.Size([10, 1, 32, 32]), 62)
    """
    generator = torch.Generator().manual_seed(seed)
    train_images, train_labels = _draw(_stencils(_TRAINED), train, size, generator)
    test_images, test_labels = _draw(_stencils(_HELD_OUT), test, size, generator)
    return Images(train_images, train_labels, test_images, test_labels, tuple(CHARACTERS), 1, handwriting=True)


@cache
def _stencils(fonts: tuple[str, ...]) -> Tensor:
    """Return every character in every font, in [0, 1], shape (fonts, characters, 48, 48)."""
    matplotlib = require("matplotlib", "matplotlib")
    font_of = require("PIL.ImageFont", "pillow").truetype
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return torch.stack(
        [torch.stack([_stencil(character, font_of(str(folder / f"{font}.ttf"), 36)) for character in CHARACTERS])
         for font in fonts]
    )  # fmt: skip


def _stencil(character: str, font: Any) -> Tensor:
    picture = require("PIL.Image", "pillow").new("L", (_DRAWN, _DRAWN))
    middle = (_DRAWN // 2, _DRAWN // 2)
    require("PIL.ImageDraw", "pillow").Draw(picture).text(middle, character, fill=255, font=font, anchor="mm")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(_DRAWN, _DRAWN).float() / 255


def _draw(stencils: Tensor, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `count` images, uint8 of shape (count, 1, size, size), and their classes."""
    fonts, classes = stencils.shape[:2]
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % classes
    own = stencils[torch.randint(fonts, (count,), generator=generator), labels]
    images = torch.zeros(count, 1, size, size)
    for _ in range(2):
        other = stencils[
            torch.randint(fonts, (count,), generator=generator), torch.randint(classes, (count,), generator=generator)
        ]
        faint = 0.2 + 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
        images = torch.maximum(images, faint * _place(other, size, 0.7, 1.0, generator))
    images = torch.maximum(images, _place(own, size, 1.0, 0.25, generator))
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1).mul(255).round().to(torch.uint8), labels


def _place(stencils: Tensor, size: int, scale: float, spread: float, generator: torch.Generator) -> Tensor:
    """Return the stencils turned, sheared, scaled and moved, shape (count, 1, size, size)."""
    count = len(stencils)
    angle = math.radians(25) * (2 * torch.rand(count, generator=generator) - 1)
    shear = 0.3 * (2 * torch.rand(count, generator=generator) - 1)
    stretch = (0.7 + 0.6 * torch.rand(count, generator=generator)) / scale
    cos, sin = angle.cos() * stretch, angle.sin() * stretch
    rows = torch.stack([torch.stack([cos, -sin + shear], 1), torch.stack([sin, cos], 1)], 1)
    moved = spread * (2 * torch.rand(count, 2, 1, generator=generator) - 1)
    theta = torch.cat([rows, -rows @ moved], 2)
    grid = F.affine_grid(theta, [count, 1, size, size], align_corners=False)
    return F.grid_sample(stencils.unsqueeze(1), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
