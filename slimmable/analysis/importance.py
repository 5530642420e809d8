"""Importance of units: rank those of each channel group, and permute them while the network computes the same."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slimmable._modules import size_axes, tensors_of
from slimmable._tables import listed
from slimmable.analysis.plan import AxisName, Plan
from slimmable.errors import ConversionError, explained

Order = NDArray[np.int64]  # for each place in a group, the unit that goes there
Importance: TypeAlias = Callable[[nn.Module, Plan], Sequence[Any]]
"""A function of a plain model and its plan that returns, for each of `plan.groups`, one score per unit."""


def order_units(model: nn.Module, plan: Plan, importance: str | Importance) -> list[Order]:
    """Return the units of each group, the most important first; a group whose order matters keeps its order."""
    with explained(f"importance {importance!r:.80} fails", kind=ConversionError), torch.enable_grad():
        scores = importance(model, plan) if callable(importance) else magnitude(model, plan)
        found = [np.asarray(torch.as_tensor(each, device="cpu").detach(), float) for each in scores]
    need, shapes = [str((group.units,)) for group in plan.groups], [str(each.shape) for each in found]
    if need != shapes or not all(np.isfinite(each).all() for each in found):
        what = f"a finite score for each unit of plan.groups, of shapes {listed(need, most=6)}"
        raise ConversionError(f"importance {importance!r:.80} must return {what}; got {listed(shapes, most=6)}")
    pairs = zip(plan.groups, found, strict=True)
    return [np.arange(len(own)) if group.ordered else np.argsort(-own, kind="stable") for group, own in pairs]


def magnitude(model: nn.Module, plan: Plan) -> Iterator[NDArray[Any]]:
    """Yield for each group how much its units weigh: the L1 norm of the weights that read them.

    Weights that make a unit do not count, since a normalization cancels their size. If no convolution or linear layer
    reads a group, all its weights with more than one axis count.

    Source: Cai et al., Once-for-All, ICLR 2020, section 3.3, and its code. Measured in `benchmarks/importance`.
    """
    for group in plan.groups:
        read, total = np.zeros(group.units), np.zeros(group.units)
        for (path, name, axis), units in group.members.items():
            module = model.get_submodule(path)
            tensor, sizes = module._parameters.get(name), size_axes(module)
            if tensor is not None and tensor.ndim > 1:
                others = [i for i in range(tensor.ndim) if i != axis]
                size = tensor.detach().abs().float().sum(others).cpu().numpy()[units >= 0]
                np.add.at(total, units[units >= 0], size)
                if axis in (sizes.get("in_features"), sizes.get("in_channels")):
                    np.add.at(read, units[units >= 0], size)
        yield read if read.any() else total


def permute(model: nn.Module, plan: Plan, orders: Sequence[Order]) -> None:
    """Permute the units of every group of a plain model's plan by its order, if any, in place, along all their axes."""
    names: dict[int, tuple[str, str]] = {}  # the first name of each tensor; one that is shared is permuted only once
    for (path, name, axis), index in moved(plan, orders).items():
        tensor = tensors_of(model.get_submodule(path))[name]
        if names.setdefault(id(tensor), (path, name)) == (path, name):
            with torch.no_grad():
                tensor.copy_(tensor.index_select(axis, torch.from_numpy(index).to(tensor.device)))


def moved(plan: Plan, orders: Sequence[Order]) -> dict[AxisName, Order]:
    """Return, for each axis that `permute` permutes, where it takes the unit at each place from."""
    found: dict[AxisName, Order] = {}
    for group, order in zip(plan.groups, orders, strict=False):
        for axis, units in group.members.items():
            places = np.argsort(units, kind="stable")[np.count_nonzero(units < 0) :].reshape(group.units, -1)
            found.setdefault(axis, np.arange(len(units)))[places] = places[order]
    return found
