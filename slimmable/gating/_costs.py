"""What a gated pass costs: the products of the plan, each in proportion to the open units that meet in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimmable.analysis.channels import Grouping
from slimmable.analysis.labels import Ids


@dataclass(frozen=True, eq=False)
class _Axis:
    """An axis by what lies on it: how many units that always stay, and how often each unit of each group."""

    length: int
    full: int
    groups: tuple[tuple[int, NDArray[np.int64]], ...]

    def kept(self, masks: Mapping[int, Tensor], counts: Sequence[int]) -> Any:
        """Return how many of the axis are open: a number, or one per image, shape (images,)."""
        total: Any = self.full
        for group, times in self.groups:
            times = times[: counts[group]]
            if group not in masks:
                total = total + int(times.sum())
            elif (times == times[0]).all():
                total = total + int(times[0]) * masks[group].sum(1)
            else:
                total = total + masks[group] @ torch.as_tensor(times, device=masks[group].device).to(masks[group])
        return total


class Costs:
    """Multiply-adds by layer for images of one size; pure data, which copies of a model share.

    Args:
        products: module path, multiply-adds for all images, and the units that they are in proportion to.
        grouping: of the units.
        images: how many there were.
        positions: gate -> the sizes of what its layer reads, without batch and channels.
    """

    def __init__(
        self,
        products: Sequence[tuple[str, int, tuple[Ids, ...]]],
        grouping: Grouping,
        images: int,
        positions: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.images, self.positions = images, dict(positions)
        known: dict[bytes, _Axis] = {}
        self._products = []
        for path, macs, axes in products:
            each = [known.setdefault(ids.tobytes(), _axis(ids, grouping)) for ids in axes]
            self._products.append((path, macs // math.prod(axis.length for axis in each), each))

    def __deepcopy__(self, memo: Any) -> Costs:
        return self

    def layers(self, masks: Mapping[int, Tensor], counts: Sequence[int]) -> dict[str, Any]:
        """Return module path -> multiply-adds of an image: a number, or one per image where gates have a say.

        Args:
            masks: group -> shape (images, kept units), zeros and ones; groups that are missing are open.
            counts: for each group the units that the active width keeps.
        """
        known: dict[int, Any] = {}
        found: dict[str, Any] = {}
        for path, unit, axes in self._products:
            cost: Any = unit
            for axis in axes:
                if id(axis) not in known:
                    known[id(axis)] = axis.kept(masks, counts)
                cost = cost * known[id(axis)]
            found[path] = found.get(path, 0) + cost
        return {path: cost / self.images for path, cost in found.items()}

    def savings(self) -> dict[int, float]:
        """Return group -> the multiply-adds of an image that closing all of its units saves."""
        found: dict[int, float] = {}
        for _, unit, axes in self._products:
            whole = unit * math.prod(axis.length for axis in axes)
            for group in {group for axis in axes for group, _ in axis.groups}:
                left = unit * math.prod(axis.length - int(dict(axis.groups).get(group, _NONE).sum()) for axis in axes)
                found[group] = found.get(group, 0.0) + (whole - left) / self.images
        return found


_NONE = np.zeros(0, np.int64)


def _axis(ids: Ids, grouping: Grouping) -> _Axis:
    group_of = grouping.group_of[ids]
    groups = [int(group) for group in np.unique(group_of) if group >= 0]
    times = [np.bincount(grouping.rank[ids[group_of == g]], minlength=grouping.units[g]) for g in groups]
    return _Axis(len(ids), int((group_of < 0).sum()), tuple(zip(groups, times, strict=True)))
