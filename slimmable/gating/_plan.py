"""Gate plans as pure data: which groups of units have a gate, which have none, and what gated passes cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slimmable._inputs import MOST, Arguments, is_index
from slimmable.analysis.channels import Grouping
from slimmable.analysis.labels import Ids
from slimmable.analysis.plan import Plan
from slimmable.errors import CheckpointError
from slimmable.gating._gates import gate_macs

PLAN = "_gate_plan"  # the attribute that holds the plan, in the module that `gate` returned
_PLAIN = (type(None), bool, int, float, str)  # values that JSON holds as they are


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer whose input is masked: `units[i]` is the unit at position `i` of the axis, -1 for other groups' units."""

    path: str
    axis: int
    ids: Ids
    units: Ids


@dataclass(frozen=True, eq=False)
class PlannedGate:
    """The gate of one channel group."""

    group: int  # its number in the channel plan
    units: int  # how many channels, or attention heads, the gate opens and closes
    maker: str  # path of the layer that makes them, whose input the gate sees
    axis: int  # channel axis of this layer's input
    channels: Ids  # the units of the channel plan on this axis
    readers: tuple[Reader, ...]  # the layers that read the units; their inputs are masked
    norms: tuple[str, ...]  # paths of the BatchNorms that the two passes should not share
    number: int = 0  # its number among the gates of this layer

    @property
    def name(self) -> str:
        """The maker's path, followed by a slash and the number from its second gate on."""
        return f"{self.maker}/{self.number}" if self.number else self.maker

    @property
    def macs(self) -> int:
        """Multiply-adds of the gate itself, per image at full width."""
        return gate_macs(len(self.channels), self.units)


class Refused(NamedTuple):
    """A channel group without a gate: the layer that makes it, how many units it has, and the reason."""

    maker: str
    units: int
    reason: str


@dataclass(frozen=True, eq=False)
class GatePlan:
    """Where `gate` puts gates, as pure data; `print` shows it. Copies of a model share it.

    Attributes:
        gates: in the order of the layers.
        refused: the groups without a gate.
        plan: the channel groups.
        macs: multiply-adds for images of the example's size.
        example: the example inputs as data for JSON.
    """

    gates: tuple[PlannedGate, ...]
    refused: tuple[Refused, ...]
    plan: Plan
    macs: LayerMacs
    example: list[Any]

    def __deepcopy__(self, memo: Any) -> GatePlan:
        return self

    def least_share(self) -> float:
        """Return the multiply-adds with all gates closed as a share of the dense pass's, both at full width."""
        counts = self.plan.channels.units
        left = self.macs.without(self.gates, counts) + sum(gate.macs for gate in self.gates)
        return left / self.macs.without((), counts)

    def __str__(self) -> str:
        lines = [f"{'units':>6}  {'gate looks at the input of':<36}  masks the input of"]
        for gate in self.gates:
            lines.append(f"{gate.units:>6}  {gate.name:<36}  {', '.join(reader.path for reader in gate.readers)}")
        if self.refused:
            lines.append("without a gate:")
        lines += [f"{units:>6}  {maker}: {reason}" for maker, units, reason in self.refused]
        return "\n".join(lines)


class LayerMacs:
    """Multiply-adds of each layer for images of one size and any masks; pure data.

    Args:
        products: module path, multiply-adds of all images, and the axes that they are proportional to.
        grouping: grouping of the units on these axes.
        images: number of images.
        positions: path of a layer with gates -> shape of its input without its image and channel axes.
    """

    def __init__(
        self,
        products: Sequence[tuple[str, int, tuple[Ids, ...]]],
        grouping: Grouping,
        images: int,
        positions: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.images, self.positions, self._grouping = images, dict(positions), grouping
        units, axes = len(grouping.group_of), {ids.tobytes(): ids for _, _, each in products for ids in each}
        number = {key: index for index, key in enumerate(axes)}
        times = [np.bincount(ids, minlength=units) for ids in axes.values()]  # how often each unit is on each axis
        self._times = torch.tensor(np.array(times)).view(len(axes), units)
        self._products = [
            (path, macs // math.prod(map(len, each)), [number[ids.tobytes()] for ids in each])
            for path, macs, each in products
        ]

    def by_layer(self, masks: Mapping[int, Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
        """Return module path -> multiply-adds of each image, or of any image if there are no masks: shape (images,).

        Args:
            masks: group -> zeros and ones, float64, shape (images, kept units); missing groups are open.
            counts: how many units of each group the width keeps.
        """
        like = next(iter(masks.values()), torch.zeros(1, 0, dtype=torch.float64))
        open_units = [masks.get(group, like.new_ones(len(like), count)) for group, count in enumerate(counts)]
        kept = self._grouping.mask(np.array([*counts, 1]), np.arange(self._times.shape[1]))
        opened = torch.cat([*open_units, like.new_ones(len(like), 1)], 1) @ self._times[:, kept].T.to(like)
        found: dict[str, Tensor] = {}
        for path, unit, axes in self._products:
            macs = like.new_full((len(like),), unit)
            for axis in axes:
                macs = macs * opened[:, axis]
            found[path] = found.get(path, 0) + macs
        return {path: macs / self.images for path, macs in found.items()}

    def total(self, masks: Mapping[int, Tensor], counts: Sequence[int]) -> Any:
        """Return the sum of `by_layer` over all layers."""
        return sum(self.by_layer(masks, counts).values())

    def without(self, gates: Sequence[PlannedGate], counts: Sequence[int]) -> float:
        """Return the sum over all layers with all units of some gates closed."""
        return float(self.total({gate.group: torch.zeros(1, gate.units).double() for gate in gates}, counts))


def encode_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of a forward as JSON data; of floating-point tensors it holds only dtype and shape."""
    return _encode((tuple(args), dict(kwargs)))


def decode_inputs(data: list[Any], like: Tensor) -> Arguments:
    """Return the arguments that `encode_inputs` was given: on the device of `like`, floating tensors in its dtype."""
    args, kwargs = _decode(data, like)
    if type(args) is not tuple or type(kwargs) is not dict or not all(type(name) is str for name in kwargs):
        raise CheckpointError("its example does not hold the arguments of a forward")
    return args, kwargs


def _encode(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        numbers = value.flatten().tolist() if is_index(value) and value.numel() <= MOST else None
        return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape), numbers]
    if type(value) in (tuple, list):
        return [type(value).__name__, *map(_encode, value)]
    if type(value) is dict:
        return ["dict", *([_encode(key), _encode(part)] for key, part in value.items())]
    return ["plain", value] if type(value) in _PLAIN else ["object", type(value).__name__]


def _decode(data: list[Any], like: Tensor) -> Any:
    kind, *parts = data
    if kind == "tensor":
        return _decode_tensor(like, *parts)
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(_decode(part, like) for part in parts)
    if kind == "dict":
        return {_decode(key, like): _decode(part, like) for key, part in parts}
    if kind == "plain" and type(parts[0]) in _PLAIN:
        return parts[0]
    raise CheckpointError(f"its example holds an object of class {parts[0]!r}, which no file can hold")


def _decode_tensor(like: Tensor, name: str, shape: list[int], numbers: list[Any] | None) -> Tensor:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype) or not all(type(size) is int for size in shape):
        raise CheckpointError(f"its example has a tensor of type {name!r} and shape {shape!r}")
    if numbers is not None:
        return torch.tensor(numbers, dtype=dtype, device=like.device).reshape(shape)
    if dtype.is_floating_point:
        return torch.empty(shape, dtype=like.dtype, device=like.device)  # its contents are never read
    return torch.zeros(shape, dtype=dtype, device=like.device)
