"""Parts of random networks, the tables of operations that make them, and what their forwards keep."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import einops
import torch
from torch import Tensor, nn


class UnfitError(Exception):
    """An operation does not fit the value that it is given."""


def need(*conditions: object) -> None:
    if not all(conditions):
        raise UnfitError


class Part(nn.Module):
    """A module whose attributes and `run` are set by the maker of an operation."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.run: Callable[..., Any] = lambda m, x: x

    def forward(self, *values: Tensor) -> Any:
        return self.run(self, *values)

    def extra_repr(self) -> str:
        return self.name


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * math.prod(shape[1:]) ** -0.5)


def vector(units: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(units) + 0.5)


Maker = Callable[..., Callable[..., Any]]  # of a part, the values that it reads, units and variant: what it runs
UNARY: dict[str, Maker] = {}
BINARY: dict[str, Maker] = {}


def unary(name: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        UNARY[name] = maker
        return maker

    return add


def binary(name: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        BINARY[name] = maker
        return maker

    return add


def simple(name: str, *runs: Callable[[Tensor], Any], ndim: tuple[int, ...] = (2, 3, 4, 5)) -> None:
    """Add an operation without weights, with a function for each variant."""

    @unary(name)
    def make(m: Part, x: Tensor, units: int, variant: int) -> Callable[..., Any]:
        need(x.ndim in ndim)
        run = runs[variant % len(runs)]
        return lambda m, x: run(x)


def channels(x: Tensor) -> int:
    """The axis of the channels of an image, of tokens, or of a vector."""
    return 1 if x.ndim == 4 else x.ndim - 1


def divisor(n: int, *wanted: int) -> int:
    found = [k for k in wanted if n % k == 0 and k < n]
    need(found)
    return found[0]


# -- what a forward keeps
@functools.lru_cache
def causal_mask(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


@functools.lru_cache(maxsize=32)
def sinusoid(tokens: int, units: int) -> Tensor:
    angles = torch.arange(tokens)[:, None] / 100 ** (torch.arange(units)[None] / units)
    return angles.sin().double()


GRIDS: dict[tuple[int, ...], Tensor] = {}


def grid(height: int, width: int) -> Tensor:
    if (height, width) not in GRIDS:
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        GRIDS[height, width] = (rows[:, None] * columns[None]).double()
    return GRIDS[height, width]


def forget() -> None:
    """Empty what earlier networks have left in functions and modules, as in a new process."""
    causal_mask.cache_clear()
    sinusoid.cache_clear()
    GRIDS.clear()
    for function in vars(einops.einops).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def forget_everything(model: nn.Module) -> None:
    """Also empty what a network has kept in itself."""
    forget()
    for module in model.modules():
        if isinstance(module, Part):
            module.__dict__.update(
                {name: empty for name, empty in (("cache", {}), ("mask", None)) if hasattr(module, name)}
            )
