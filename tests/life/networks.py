"""The converted networks that the tests beside this file treat as training code does."""

from __future__ import annotations

import copy
import functools
from typing import Any

import timm
import torch
from torch import Tensor, nn

import slimmable
from tests.convert import oracles

WIDTHS = (1.0, 0.5, 0.25)
FAMILIES = ("test_resnet", "test_vit", "test_efficientnet")


def plain(name: str, **options: Any) -> nn.Module:
    """A small timm model with the same weights at every call, none of them zero at the start."""
    torch.manual_seed(0)
    return oracles.randomise(timm.create_model(name, **{"num_classes": 10, **options}))


def converted(name: str, **options: Any) -> nn.Module:
    """The same model converted, a copy of its own at each call."""
    return copy.deepcopy(_converted(name, **options))


@functools.cache
def _converted(name: str, **options: Any) -> nn.Module:
    return slimmable.slimify(plain(name, **options), WIDTHS, example_inputs=torch.zeros(2, 3, 160, 160))


def images(batch: int = 2, size: int = 160) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def shapes(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """The output's shape at each width, from the widest on."""
    with torch.no_grad():
        return [tuple(y.shape) for y in slimmable.run_widths(model, x).values()]
