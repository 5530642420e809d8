"""Gate plans, data from one trace of a model: which groups of units get a gate, which none and why, and the cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from slimmable._checks import checked, shown
from slimmable._convert import Skip, plain, plan_of, skipper
from slimmable._inputs import MOST, Arguments, example_of, image_batch, is_index, is_size, output_tensors
from slimmable._widths import width_index
from slimmable.analysis.fake import FakeModel
from slimmable.analysis.labels import Ids
from slimmable.analysis.make import best_trace, filled_plan
from slimmable.analysis.plan import Grouping, Plan
from slimmable.errors import CheckpointError, ConversionError, UsageError
from slimmable.view.state import is_slim

GATE = "channel_gate"  # the name of the gates in the layer whose units they open and close
TEMPERATURE = 2 / 3
PLAN = "_gate_plan"  # the attribute that holds the plan, in the module that `gate` returned
SKIPPED = "skipped"  # the reason where the caller wants no gate
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


class Refused(NamedTuple):
    """A channel group without a gate: the layer that makes it, how many units it has, and the reason."""

    maker: str
    units: int
    reason: str


@dataclass(frozen=True, eq=False)
class GatePlan:
    """Where `gate` puts gates, as pure data; `print` shows it. Copies of a model share it."""

    gates: tuple[PlannedGate, ...]  # in the order of the layers
    refused: tuple[Refused, ...]  # the groups without a gate
    plan: Plan  # the channel groups
    macs: "LayerMacs"  # for images of the example's size
    example: list[Any]  # the example inputs as data for JSON

    def __deepcopy__(self, memo: Any) -> "GatePlan":
        return self

    def least_share(self, width: float = 1.0) -> float:
        """Return the multiply-adds with all gates closed as a share of the dense pass's, at one of the widths."""
        counts = self.plan.columns[width_index(width, self.plan.widths)].counts
        kept_on = partial(self.plan.channels.needed.grouping.count, np.array([*counts, 1]))
        gates = sum(gate_macs(kept_on(gate.channels), counts[gate.group]) for gate in self.gates)
        return (self.macs.total(counts, self.gates) + gates) / self.macs.total(counts)

    def __str__(self) -> str:
        lines = [f"{'units':>6}  {'gate looks at the input of':<36}  masks the input of"]
        for gate in self.gates:
            lines.append(f"{gate.units:>6}  {gate.name:<36}  {', '.join(reader.path for reader in gate.readers)}")
        lines += ["without a gate:"] * bool(self.refused)
        lines += [f"{units:>6}  {maker}: {reason}" for maker, units, reason in self.refused]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class LayerMacs:
    """Multiply-adds of each layer for images of one size and any masks; pure data."""

    products: Sequence[tuple[str, int, Sequence[int]]]  # module path, multiply-adds of one unit on each axis, the axes
    times: Tensor  # how often each unit is on each axis, of shape (axes, units)
    grouping: Grouping
    images: int  # how many all of these are for
    positions: Mapping[str, tuple[int, ...]]  # path of a layer with gates -> its input's shape, but images and channels

    def by_layer(self, masks: Mapping[int, Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
        """Return module path -> multiply-adds of each image, for masks (images, kept units) of groups, or open ones."""
        like = next(iter(masks.values()), torch.zeros(1, 0, dtype=torch.float64, device="cpu"))
        open_units = [masks.get(group, like.new_ones(len(like), count)) for group, count in enumerate(counts)]
        kept = self.grouping.mask(np.array([*counts, 1]), np.arange(self.times.shape[1]))
        opened = torch.cat([*open_units, like.new_ones(len(like), 1)], 1) @ self.times[:, kept].T.to(like)
        found: dict[str, Tensor] = {}
        for path, unit, axes in self.products:
            macs = math.prod((opened[:, axis] for axis in axes), start=like.new_full((len(like),), unit))
            found[path] = found.get(path, 0) + macs
        return {path: macs / self.images for path, macs in found.items()}

    def total(self, counts: Sequence[int], closed: Sequence[PlannedGate] = ()) -> float:
        """Return the sum over all layers for one image, with all units of some gates closed."""
        masks = {gate.group: torch.zeros(1, counts[gate.group], dtype=torch.float64, device="cpu") for gate in closed}
        return float(sum(self.by_layer(masks, counts).values()))


def gate_macs(channels: int, units: int) -> int:
    """Return the multiply-adds of a `ChannelGate` per image: a linear layer before and one after its hidden units."""
    return max(1, channels // 4) * (channels + units)


@checked
def gate_plan(model: nn.Module, *, example_inputs: Any = None, skip: Skip = ()) -> GatePlan:
    """Return which channel groups `gate` would give gates, and why the others get none; the model is not changed.

    Args and errors are those of `gate`, but finding no place for a gate is not an error. For a gated model, without
    `example_inputs` and `skip`, this is the plan that its gates follow.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> print(gate_plan(net, example_inputs=torch.zeros(2, 4)))
     units  gate looks at the input of            masks the input of
        16  2                                     4
    without a gate:
         8  0: its layer reads the model's input, of which a gate learns little
    """
    own: GatePlan | None = model.__dict__.get(PLAN)
    if own is not None and example_inputs is None and skip == ():
        return own
    plan = plan_of(model)
    if plan is None and any(is_slim(module) and module.__dict__["_slim"].plan for module in model.modules()):
        raise ConversionError(f"a part of this {type(model).__name__} was converted; gate that one by itself, first")
    example, skips = example_of(model, example_inputs), skipper(model, skip)
    first = next(iter(output_tensors(example)), None)
    if first is None or not first.ndim or not len(first):
        raise ConversionError(f"gates need a first input with one row per image, got {shown(example_inputs)}")
    finder = _Finder(model, example, plan)
    possible, refused, full = [], [], finder.plan.channels.units
    for group, units in enumerate(full):
        try:
            possible.append(finder.gate_of(group, skips))
        except _RefusedError as error:
            refused.append(Refused(next(iter(finder.makers[group]), "?"), units, str(error)))
    macs = finder.layer_macs(possible)
    gates, order = list[PlannedGate](), list(finder.trace.calls)
    for gate in sorted(possible, key=lambda gate: order.index(gate.maker)):
        saved = macs.total(full) - macs.total(full, [gate])
        if gate_macs(len(gate.channels), gate.units) < saved:
            gates.append(replace(gate, number=sum(other.maker == gate.maker for other in gates)))
        else:
            reason = f"a gate would cost more multiply-adds than the {saved:.0f} that it could save"
            refused.append(Refused(gate.maker, gate.units, reason))
    return GatePlan(tuple(gates), tuple(refused), finder.plan, macs, encode(example))


def plan_for(model: nn.Module, size: tuple[int, ...] | None) -> GatePlan:
    """Return the gate plan of a gated model, with the multiply-adds for images of a size, by default the example's."""
    found: GatePlan = model.__dict__[PLAN]
    if size is None:
        return found
    if not is_size(size):
        raise UsageError(f"input_size must be the size of one image, such as (3, 224, 224), got {size!r}")
    example = example_of(model, image_batch(model, size, images=1))
    return replace(found, macs=_Finder(model, example, found.plan).layer_macs(found.gates))


class _RefusedError(Exception):
    """A group gets no gate; the message says why."""


class _Finder:
    """A trace of the model without gates and widths, and its channel plan, made from the trace if there is none."""

    @torch.inference_mode(False)
    def __init__(self, model: nn.Module, example: Arguments, plan: Plan | None) -> None:
        rules = plan or Plan((1.0,))
        fake = FakeModel(plain(model), example)
        solution = best_trace(fake, rules, lambda path, module: False)
        self.plan = plan or filled_plan(fake, solution, rules)
        self.model, self.images = fake.model, len(output_tensors(example)[0])
        self.trace = trace = solution.trace
        channels = self.plan.channels
        self.labels, self.grouping = trace.labels, channels.needed.grouping
        self._units = np.full(len(self.labels), len(self.grouping.group_of) - 1)  # the last one stands for full axes
        for key, axes in trace.tensors.items():
            for ids, units in zip(axes, channels.tensors.get(key, ()), strict=False):
                if ids is not None and units is not None:
                    self._units[self.labels.find(ids)] = units
        self.makers: list[dict[str, None]] = [{} for _ in channels.units]  # paths in order, each once
        self.reads: list[list[tuple[str, Ids]]] = [[] for _ in channels.units]
        for path, ids in trace.producers:
            for group in self._groups_on(ids):
                self.makers[group][path] = None
        for path, ids in trace.reads:
            for group in self._groups_on(ids):
                self.reads[group].append((path, ids))
        self.meeting = {group: where for where, ids in trace.meetings[::-1] for group in self._groups_on(ids)}
        self.summed = self._groups_on(*trace.sums)
        self.outputs = self._groups_on(*(ids for output in trace.outputs for ids in output.units))

    def layer_macs(self, gates: Sequence[PlannedGate]) -> LayerMacs:
        number: dict[bytes, int] = {}  # of each axis that occurs
        products = []
        for macs, labelled, path in self.trace.products:
            axes = [self._units_on(ids) for ids in labelled]
            on = [number.setdefault(ids.tobytes(), len(number)) for ids in axes]
            products.append((path, macs // math.prod(map(len, axes)), on))
        units = len(self.grouping.group_of)
        times = [np.bincount(np.frombuffer(axis, self._units.dtype), minlength=units) for axis in number]
        positions = {}
        for gate in gates:
            source = cast(Tensor, self.trace.calls[gate.maker][0].source)
            positions[gate.maker] = tuple(int(size) for i, size in enumerate(source.shape) if i not in (0, gate.axis))
        counted = torch.from_numpy(np.reshape(times, (-1, units)))
        return LayerMacs(products, counted, self.grouping, self.images, positions)

    def gate_of(self, group: int, skip: Callable[[str, nn.Module], bool]) -> PlannedGate:
        """Return the gate for a group; raise `_RefusedError` with the reason if it cannot have one."""
        units, makers, reads = self.plan.channels.units[group], self.makers[group], self.reads[group]
        if units < 2:
            raise _RefusedError("it has one unit")
        if group in self.outputs:
            raise _RefusedError("it is in the model's output")
        if group in self.summed and len(makers) > 1:
            raise _RefusedError(f"features of {len(makers)} layers are added up in it (a residual stream)")
        if group in self.meeting:
            raise _RefusedError(f"its units meet in {self.meeting[group]}")
        if not reads or not makers:
            raise _RefusedError("no layer reads it by weights")
        maker = next(iter(makers))
        if skip(maker, self.model.get_submodule(maker)):
            raise _RefusedError(SKIPPED)
        why = "its layer reads the model's input, of which a gate learns little"
        axis, channels = self._input(maker, [ids for path, ids in self.trace.reads if path == maker], "makes it", why)
        readers = {}
        for path, ids in reads:
            at, on = self._input(path, [ids], "reads it", f"{path} reads it, but not as its input")
            ranks = np.where(self.grouping.group_of[on] == group, self.grouping.rank[on], -1)
            readers[path] = Reader(path, at, on, ranks)
        counts = np.array([*self.plan.channels.units, 1])
        counts[group] -= 1
        _, failures = self.plan.channels.needed.fit(counts)
        if failures:
            constraint = failures[0].constraint
            raise _RefusedError(f"it cannot shrink alone ({constraint.where}: {constraint.expression})")
        outputs = {id(self.trace.calls[path][0].out) for path in readers}
        norms = []  # on the group's channels, and directly after the layers that read it
        for path, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and path in self.trace.calls:
                axes = [ids for name in ("weight", "running_mean") for ids in self.trace.tensors.get((path, name), ())]
                after = any(id(call.source) in outputs for call in self.trace.calls[path])
                norms += [path] if after or group in self._groups_on(*axes) else []
        return PlannedGate(group, units, maker, axis, channels, tuple(readers.values()), tuple(norms))

    def _units_on(self, ids: Ids) -> Ids:
        return self._units.take(self.labels.find(ids))

    def _groups_on(self, *axes: Ids | None) -> list[int]:
        return self.grouping.groups_in([self._units_on(ids) for ids in axes if ids is not None])

    def _input(self, path: str, reads: Sequence[Ids], role: str, why: str) -> tuple[int, Ids]:
        """Return the axis of a layer's input, never the batch's, with the labels of one of `reads`, and its units."""
        calls = self.trace.calls.get(path, [])
        if len(calls) != 1:
            raise _RefusedError(f"{path} {role} and runs {len(calls)} times in one forward")
        source = calls[0].source
        if source is None or source.ndim < 2 or len(source) != self.images:
            raise _RefusedError(f"{path} {role}, but not from a tensor with one row per image")
        for wanted, (axis, own) in product(map(self.labels.roots, reads), enumerate(calls[0].axes)):
            if axis and own is not None and wanted <= self.labels.roots(own):
                return axis, self._units_on(own)
        raise _RefusedError(why)


def encode(value: Any) -> list[Any]:
    """Return the arguments of a forward as JSON data; of floating-point tensors it holds only dtype and shape."""
    if isinstance(value, Tensor):
        numbers = value.flatten().tolist() if is_index(value) and value.numel() <= MOST else None
        return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape), numbers]
    if type(value) in (tuple, list):
        return [type(value).__name__, *map(encode, value)]
    if type(value) is dict:
        return ["dict", *([encode(key), encode(part)] for key, part in value.items())]
    return ["plain", value] if type(value) in _PLAIN else ["object", type(value).__name__]


def decode(data: list[Any], like: Tensor) -> Any:
    """Return what `encode` was given, tensors on the device of `like`, those of floats as zeros of its dtype."""
    kind, *parts = data
    if kind == "tensor":
        name, shape, numbers = parts
        dtype = getattr(torch, name)
        if numbers is not None:
            return torch.tensor(numbers, dtype=dtype, device=like.device).reshape(shape)
        return torch.zeros(shape, dtype=like.dtype if dtype.is_floating_point else dtype, device=like.device)
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(decode(part, like) for part in parts)
    if kind == "dict":
        return {decode(key, like): decode(part, like) for key, part in parts}
    if kind == "plain" and type(parts[0]) in _PLAIN:
        return parts[0]
    raise CheckpointError(f"its example holds an object of class {parts[0]!r}, which no file can hold")
