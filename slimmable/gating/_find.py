"""Which channel groups of a model can have a gate, and where its mask goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimmable._errors import ConversionError, TraceError
from slimmable._inputs import check_module, example_of
from slimmable.analysis._fake import FakeModel
from slimmable.analysis._labels import Ids
from slimmable.analysis._make import best_trace, filled_plan
from slimmable.analysis._nested import output_tensors
from slimmable.analysis._trace import ModuleCall, Trace
from slimmable.analysis.plan import Plan
from slimmable.convert import Skip, skipper, strip
from slimmable.gating._costs import Costs
from slimmable.gating._gate import gate_macs
from slimmable.layers._gated import remove_gates
from slimmable.layers._state import is_slim, state_of


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer whose input is masked: `units[i]` is the unit at position `i` of the axis, -1 for one of other groups."""

    path: str
    axis: int
    ids: Ids
    units: Ids


@dataclass(frozen=True, eq=False)
class Candidate:
    """A channel group that can have a gate.

    Attributes:
        group: its number in the plan.
        units: how many channels, or heads, open and close.
        maker: path of the layer that makes them, and whose input the gate looks at.
        axis: of that input, where the channels lie.
        channels: that axis, in units of the plan.
        readers: the layers that read them.
        norms: paths of the BatchNorms that the two passes should not share.
    """

    group: int
    units: int
    maker: str
    axis: int
    channels: Ids
    readers: tuple[Reader, ...]
    norms: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class GatePlan:
    """What `gate` would do, as pure data; `print` shows it. Copies of a model share it.

    Attributes:
        gates: the groups that get a gate, in the order of their layers.
        refused: for each other group the layer that makes it, its units and why it gets none.
        plan: the channel groups.
        costs: multiply-adds for images of the example's size.
    """

    gates: tuple[Candidate, ...]
    refused: tuple[tuple[str, int, str], ...]
    plan: Plan
    costs: Costs

    def __deepcopy__(self, memo: Any) -> GatePlan:
        return self

    def __str__(self) -> str:
        lines = [f"{'units':>6}  {'gate looks at the input of':<36}  masks the input of"]
        for gate in self.gates:
            lines.append(f"{gate.units:>6}  {gate.maker:<36}  {', '.join(reader.path for reader in gate.readers)}")
        if self.refused:
            lines.append("without a gate:")
        lines += [f"{units:>6}  {maker}: {reason}" for maker, units, reason in self.refused]
        return "\n".join(lines)


def gate_plan(model: nn.Module, *, example_inputs: Any = None, skip: Skip = ()) -> GatePlan:
    """Return which channel groups `gate` would gate, and why not the others; changes nothing.

    Args and errors: as `gate`, but a model without any gate is no error here.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> import torch
    >>> print(gate_plan(net, example_inputs=torch.zeros(2, 4)))
     units  gate looks at the input of            masks the input of
        16  2                                     4
    without a gate:
         8  0: its layer reads the model's input, of which a gate learns little
    """
    check_module("gate_plan", model)
    state = state_of(model)
    plan: Plan | None = None if state is None or "_slim_root" not in model.__dict__ else state.plan
    if plan is None and any(is_slim(module) and module.__dict__["_slim"].plan for module in model.modules()):
        raise ConversionError(
            f"a part of this {type(model).__name__} was converted; gate the model that slimify returned, or gate first "
            "what is then a part of others"
        )
    args, kwargs = example_of(model, example_inputs)
    return _found(model, args, kwargs, skipper(model, skip), plan)


def costs_for(model: nn.Module, found: GatePlan, example_inputs: Any) -> Costs:
    """Return the multiply-adds of a gated model for inputs of another size."""
    args, kwargs = example_of(model, example_inputs)
    trace = _traced(model, args, kwargs, found.plan.widths)[1]
    return _costs(trace, _Units(trace, found.plan), found.plan, found.gates, _images(args, kwargs))


def _images(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    tensors = output_tensors((args, kwargs))
    if not tensors or not tensors[0].ndim:
        raise ConversionError("gates are for models whose first input is a tensor with one row per image")
    return len(tensors[0])


def _traced(model: nn.Module, args: Any, kwargs: Any, widths: tuple[float, ...]) -> Any:
    def prepare(copied: nn.Module) -> None:
        remove_gates(copied)
        strip(copied)

    fake = FakeModel(model, args, kwargs, False, prepare)
    try:
        return fake, *best_trace(fake, widths, _nothing, 1)
    except TraceError:
        if not fake.emptied:
            raise
        fake = FakeModel(model, args, kwargs, True, prepare)
        return fake, *best_trace(fake, widths, _nothing, 1)


def _nothing(path: str, module: nn.Module) -> bool:
    return False


def _found(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    skip: Callable[[str, nn.Module], bool],
    plan: Plan | None,
) -> GatePlan:
    images = _images(args, kwargs)
    fake, trace, solution = _traced(model, args, kwargs, (1.0,) if plan is None else plan.widths)
    if plan is None:
        plan = filled_plan(fake, trace, solution, Plan((1.0,)))
    units = _Units(trace, plan)
    judge = _Judge(fake.model, trace, units, plan, images, skip)
    gates, refused = [], []
    for group, size in enumerate(plan.channels.units):
        try:
            gates.append(judge.candidate(group))
        except _RefusedError as error:
            refused.append(((units.makers[group] or ["?"])[0], size, str(error)))
    costs = _costs(trace, units, plan, gates, images)
    savings = costs.savings()
    for gate in gates:
        if gate_macs(len(gate.channels), gate.units) >= savings[gate.group]:
            reason = f"a gate would cost more multiply-adds than the {savings[gate.group]:.0f} that it could save"
            refused.append((gate.maker, gate.units, reason))
    order = {path: number for number, path in enumerate(trace.calls)}
    gates = [gate for gate in gates if gate_macs(len(gate.channels), gate.units) < savings[gate.group]]
    gates.sort(key=lambda gate: order[gate.maker])
    return GatePlan(tuple(gates), tuple(refused), plan, costs)


def _costs(trace: Trace, units: _Units, plan: Plan, gates: Sequence[Candidate], images: int) -> Costs:
    products = [(path, macs, tuple(map(units.of, axes))) for macs, axes, path in trace.context.products]
    positions = {gate.maker: positions_of(trace.calls[gate.maker][0].source, gate.axis) for gate in gates}
    return Costs(products, plan.channels.needed.grouping, images, positions)


def positions_of(source: Tensor | None, axis: int) -> tuple[int, ...]:
    """Return the sizes of a layer's input without batch and channels."""
    assert source is not None
    return tuple(int(size) for i, size in enumerate(source.shape) if i not in (0, axis))


class _RefusedError(Exception):
    """A group gets no gate; the message says why."""


class _Units:
    """From the labels of a trace to the units of a plan, and what the trace says of each group."""

    def __init__(self, trace: Trace, plan: Plan) -> None:
        labels, channels = trace.context.labels, plan.channels
        self._labels, self.grouping = labels, channels.needed.grouping
        self._unit = np.full(len(labels), len(self.grouping.group_of) - 1)  # the last one stands for what stays full
        for key, axes in trace.tensors.items():
            for ids, units in zip(axes, channels.tensors.get(key, ()), strict=False):
                if ids is not None and units is not None:
                    self._unit[labels.find(ids)] = units
        count = len(channels.units)
        context = trace.context
        self.makers: list[list[str]] = [[] for _ in range(count)]
        for path, ids in context.producers:
            for group in self.groups(ids):
                if path not in self.makers[group]:
                    self.makers[group].append(path)
        self.reads: list[list[tuple[str, Ids]]] = [[] for _ in range(count)]
        for path, ids in context.reads:
            for group in self.groups(ids):
                self.reads[group].append((path, ids))
        self.meeting = {group: where for where, ids in context.meetings[::-1] for group in self.groups(ids)}
        self.summed = {group for ids in context.sums for group in self.groups(ids)}
        self.given = {
            group for _, axes in trace.outputs for ids in axes if ids is not None for group in self.groups(ids)
        }

    def of(self, ids: Ids) -> Ids:
        """Return the units of an axis."""
        units: Ids = self._unit[self._labels.find(ids)]
        return units

    def groups(self, ids: Ids) -> list[int]:
        """Return the groups on an axis."""
        return self.grouping.groups_in([self.of(ids)])

    def axis_with(self, call: ModuleCall, ids: Ids) -> int | None:
        """Return the axis of a module's input that carries these labels, but not the first, which are the images."""
        wanted = set(self._labels.find(ids).tolist())
        for axis, own in enumerate(call.axes):
            if axis and own is not None and wanted <= set(self._labels.find(own).tolist()):
                return axis
        return None


@dataclass
class _Judge:
    """Decides which groups get a gate."""

    model: nn.Module
    trace: Trace
    units: _Units
    plan: Plan
    images: int
    skip: Callable[[str, nn.Module], bool]

    def candidate(self, group: int) -> Candidate:
        """Return the group as a candidate.

        Raises: _RefusedError: with the reason, if it is none.
        """
        units, size = self.units, self.plan.channels.units[group]
        makers = units.makers[group]
        if size < 2:
            raise _RefusedError("it has one unit")
        if group in units.given:
            raise _RefusedError("it is in the model's output")
        if group in units.summed and len(makers) > 1:
            raise _RefusedError(f"features of {len(makers)} layers are added up in it (a residual stream)")
        if group in units.meeting:
            raise _RefusedError(f"its units meet in {units.meeting[group]}")
        if not units.reads[group] or not makers:
            raise _RefusedError("no layer reads it by weights")
        maker = makers[0]
        if self.skip(maker, self.model.get_submodule(maker)):
            raise _RefusedError("skipped")
        axis, channels = self._looked_at(maker)
        readers = {path: self._reader(path, ids, group) for path, ids in units.reads[group]}
        self._check_shrinks(group)
        norms = self._norms(group, readers)
        return Candidate(group, size, maker, axis, channels, tuple(readers.values()), norms)

    def _call(self, path: str, role: str) -> ModuleCall:
        calls = self.trace.calls.get(path, [])
        if len(calls) != 1:
            raise _RefusedError(f"{path} {role} and runs {len(calls)} times in one forward")
        source = calls[0].source
        if source is None or source.ndim < 2 or len(source) != self.images:
            raise _RefusedError(f"{path} {role}, but not from a tensor with one row per image")
        return calls[0]

    def _looked_at(self, maker: str) -> tuple[int, Ids]:
        call = self._call(maker, "makes it")
        for path, ids in self.trace.context.reads:
            axis = self.units.axis_with(call, ids) if path == maker else None
            if axis is not None:
                return axis, self.units.of(call.axes[axis])  # type: ignore[arg-type]
        raise _RefusedError("its layer reads the model's input, of which a gate learns little")

    def _reader(self, path: str, ids: Ids, group: int) -> Reader:
        call = self._call(path, "reads it")
        axis = self.units.axis_with(call, ids)
        if axis is None:
            raise _RefusedError(f"{path} reads it, but not as its input")
        own = self.units.of(call.axes[axis])  # type: ignore[arg-type]
        grouping = self.units.grouping
        return Reader(path, axis, own, np.where(grouping.group_of[own] == group, grouping.rank[own], -1))

    def _check_shrinks(self, group: int) -> None:
        counts = np.array([*self.plan.channels.units, 1])
        counts[group] -= 1
        _, failures = self.plan.channels.needed.fit(counts)
        if failures:
            constraint = failures[0].constraint
            raise _RefusedError(f"it cannot shrink alone ({constraint.where}: {constraint.expression})")

    def _norms(self, group: int, readers: Mapping[str, Reader]) -> tuple[str, ...]:
        """Find the BatchNorms on the group's channels, and those right behind the layers that read it."""
        outputs = {id(self.trace.calls[path][0].out) for path in readers}
        found = []
        for path, module in self.model.named_modules():
            if not isinstance(module, _BatchNorm) or path not in self.trace.calls:
                continue
            axes = [ids for name in ("weight", "running_mean") for ids in self.trace.tensors.get((path, name), ())]
            inside = any(ids is not None and group in self.units.groups(ids) for ids in axes)
            if inside or any(id(call.source) in outputs for call in self.trace.calls[path]):
                found.append(path)
        return tuple(found)
