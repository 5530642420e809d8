"""Importance of units: rank those of each channel group, and permute them while the network computes the same."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slimmable._modules import size_axes, tensors_of
from slimmable.analysis.plan import AxisName, Plan

Order = NDArray[np.int64]  # for each place in a group, the unit that goes there


def order_by_magnitude(model: nn.Module, plan: Plan) -> list[Order]:
    """Return the units of each group, the most important first: by the L1 norm of the weights that read them.

    Weights that make a unit do not count, since a normalization cancels their size. If no convolution or linear layer
    reads a group, all its weights with more than one axis count. A group whose order matters keeps its order.

    Source: Cai et al., Once-for-All, ICLR 2020, section 3.3, and its code. Measured in `benchmarks/importance`.
    """
    orders = []
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
        importance = read if read.any() else total
        orders.append(np.arange(group.units) if group.ordered else np.argsort(-importance, kind="stable"))
    return orders


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
