"""Random views of a batch of images, computed for the whole batch at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_TURN = math.radians(10)
_SMALLEST_SIDE = 0.75  # of a crop, as a share of the image's side
_STRETCH = 0.15  # logarithm of what the width grows by and the height shrinks by


def augment(images: Tensor, *, mirror: bool) -> Tensor:
    """Return one random view of each image, as floats in [0, 1]; draws from torch's global random numbers.

    Args:
        images: uint8, shape (batch, channels, height, width).
        mirror: flip half of the images left to right.

    A view is a random crop, turned and stretched a little, with a random brightness, contrast and sharpness; images
    with three channels also get a random tint, and one in five loses its colours.

    >>> augment(torch.zeros(4, 1, 24, 24, dtype=torch.uint8), mirror=False).shape
    torch.Size([4, 1, 24, 24])
    """
    views = _crop(images.float().div_(255), mirror)
    if images.shape[1] == 3:
        views = _recolour(views)
    return _expose(_soften(views)).clamp_(0, 1)


def _uniform(images: Tensor, low: float, high: float, channels: int = 1) -> Tensor:
    return torch.empty(len(images), channels, 1, 1, device=images.device).uniform_(low, high)


def _crop(images: Tensor, mirror: bool) -> Tensor:
    """Random resized crop and rotation by one bilinear sampling; what lies outside the image is zero."""
    batch, device = len(images), images.device
    side = torch.empty(batch, 1, device=device).uniform_(_SMALLEST_SIDE, 1)
    centre = (1 - side) * torch.empty(batch, 2, device=device).uniform_(-1, 1)
    stretch = torch.empty(batch, 1, device=device).uniform_(-_STRETCH, _STRETCH).exp()
    angle = torch.empty(batch, 1, device=device).uniform_(-_TURN, _TURN)
    cos, sin = side * angle.cos(), side * angle.sin()
    across, down = torch.cat([cos, -sin], 1) * stretch, torch.cat([sin, cos], 1) / stretch
    if mirror:
        across = across * torch.randint(0, 2, (batch, 1), device=device).mul(2).sub(1)
    theta = torch.stack([across, down, centre], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _recolour(images: Tensor) -> Tensor:
    """Tint, and remove the colours of one image in five."""
    grey = images.mean(1, keepdim=True)
    colourful = (_uniform(images, 0, 1) > 0.2).float() * _uniform(images, 0.6, 1.4)
    return (grey + colourful * (images - grey)) * _uniform(images, 0.8, 1.2, channels=3)


def _soften(images: Tensor) -> Tensor:
    """Blend with a 3x3 mean by a random share."""
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(images, blurred, _uniform(images, 0, 0.8))


def _expose(images: Tensor) -> Tensor:
    """Random brightness (a gain) and contrast (a power)."""
    return images.clamp(min=1e-6).pow(_uniform(images, 0.6, 1.6)) * _uniform(images, 0.6, 1.2)
