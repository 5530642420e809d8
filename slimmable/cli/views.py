"""Random views of an image, by torchvision: the augmentations of each method, for images of any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimmable.cli.extras import require


def make_views(name: str, size: int, *, smallest_crop: float, mirror: bool) -> list[nn.Module]:
    """Return one transform per view: uint8 images (channels, any height, any width) to floats in [0, 1] of `size`.

    Args:
        name: whose augmentations: "mocov2" (Chen et al. 2020), "simclr" (also Chen et al. 2020), "byol" (Grill et al.
            2020, appendix B; MoCo v3 and VICReg take the same), "supervised" (crop, mirror and jitter), or "digits"
            (for handwriting: geometry, brightness and blur).
        size: height and width of a view in pixels.
        smallest_crop: least share of the image's area that a view shows.
        mirror: flip half of the images left to right.

    Draws from torch's global random numbers.

    >>> first, second = make_views("byol", 28, smallest_crop=0.2, mirror=True)
    >>> first(torch.zeros(3, 40, 50, dtype=torch.uint8)).shape
    torch.Size([3, 28, 28])
    """
    v2 = require("torchvision.transforms.v2", "torchvision")
    crop = v2.RandomResizedCrop(size, scale=(smallest_crop, 1.0), antialias=True)

    def view(*changes: nn.Module) -> nn.Module:
        flip = [v2.RandomHorizontalFlip()] if mirror else []
        composed: nn.Module = v2.Compose([*changes, *flip, v2.ToDtype(torch.float32, scale=True)])
        return composed

    def colours(*strength: float) -> list[nn.Module]:
        return [v2.RandomApply([v2.ColorJitter(*strength)], p=0.8), v2.RandomGrayscale(0.2)]

    def blur(share: float) -> nn.Module:
        kernel = max(3, size // 10 + 1 - size // 10 % 2)  # a tenth of the side, odd (Chen et al. 2020, appendix A)
        return v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=share)  # type: ignore[no-any-return]

    if name == "digits":
        turn = v2.RandomAffine(10, interpolation=v2.InterpolationMode.BILINEAR)
        light = v2.ColorJitter(brightness=0.4, contrast=0.4)
        softer = v2.RandomApply([v2.GaussianBlur(3, (0.1, 1.0))], p=0.5)
        return [view(turn, crop, light, softer)] * 2
    if name == "mocov2":
        return [view(crop, *colours(0.4, 0.4, 0.4, 0.1), blur(0.5))] * 2
    if name == "simclr":
        return [view(crop, *colours(0.8, 0.8, 0.8, 0.2), blur(0.5))] * 2
    if name == "byol":
        jitter = colours(0.4, 0.4, 0.2, 0.1)
        return [view(crop, *jitter, blur(1.0)), view(crop, *jitter, blur(0.1), v2.RandomSolarize(128, p=0.2))]
    return [view(crop, v2.ColorJitter(0.4, 0.4, 0.4))]


def plain_view(size: int) -> nn.Module:
    """Return the transform for evaluation: the shorter side resized to `size`, the centre cut out, uint8 to uint8.

    >>> plain_view(28)(torch.zeros(3, 40, 50, dtype=torch.uint8)).shape
    torch.Size([3, 28, 28])
    """
    v2: Any = require("torchvision.transforms.v2", "torchvision")
    composed: nn.Module = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    return composed
