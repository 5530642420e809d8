"""Whether a channel group of a plan can have a gate, by what one trace of the model says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimmable.analysis.labels import Ids
from slimmable.analysis.plan import Plan
from slimmable.analysis.trace import ModuleCall, Trace

SKIPPED = "skipped"  # the reason where the caller wants no gate


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
        number: among the gates of this layer, from 0 on.
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
    number: int = 0

    @property
    def name(self) -> str:
        """The maker's path; a further group that it makes has its number behind a slash."""
        return f"{self.maker}/{self.number}" if self.number else self.maker


class RefusedError(Exception):
    """A group gets no gate; the message says why."""


class Units:
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
class Judge:
    """Decides which groups get a gate."""

    model: nn.Module
    trace: Trace
    units: Units
    plan: Plan
    images: int
    skip: Callable[[str, nn.Module], bool]

    def candidate(self, group: int) -> Candidate:
        """Return the group as a candidate.

        Raises: RefusedError: with the reason, if it is none.
        """
        units, size = self.units, self.plan.channels.units[group]
        makers = units.makers[group]
        if size < 2:
            raise RefusedError("it has one unit")
        if group in units.given:
            raise RefusedError("it is in the model's output")
        if group in units.summed and len(makers) > 1:
            raise RefusedError(f"features of {len(makers)} layers are added up in it (a residual stream)")
        if group in units.meeting:
            raise RefusedError(f"its units meet in {units.meeting[group]}")
        if not units.reads[group] or not makers:
            raise RefusedError("no layer reads it by weights")
        maker = makers[0]
        if self.skip(maker, self.model.get_submodule(maker)):
            raise RefusedError(SKIPPED)
        axis, channels = self._looked_at(maker)
        readers = {path: self._reader(path, ids, group) for path, ids in units.reads[group]}
        self._check_shrinks(group)
        norms = self._norms(group, readers)
        return Candidate(group, size, maker, axis, channels, tuple(readers.values()), norms)

    def _call(self, path: str, role: str) -> ModuleCall:
        calls = self.trace.calls.get(path, [])
        if len(calls) != 1:
            raise RefusedError(f"{path} {role} and runs {len(calls)} times in one forward")
        source = calls[0].source
        if source is None or source.ndim < 2 or len(source) != self.images:
            raise RefusedError(f"{path} {role}, but not from a tensor with one row per image")
        return calls[0]

    def _looked_at(self, maker: str) -> tuple[int, Ids]:
        call = self._call(maker, "makes it")
        for path, ids in self.trace.context.reads:
            axis = self.units.axis_with(call, ids) if path == maker else None
            if axis is not None:
                return axis, self.units.of(call.axes[axis])  # type: ignore[arg-type]
        raise RefusedError("its layer reads the model's input, of which a gate learns little")

    def _reader(self, path: str, ids: Ids, group: int) -> Reader:
        call = self._call(path, "reads it")
        axis = self.units.axis_with(call, ids)
        if axis is None:
            raise RefusedError(f"{path} reads it, but not as its input")
        own = self.units.of(call.axes[axis])  # type: ignore[arg-type]
        grouping = self.units.grouping
        return Reader(path, axis, own, np.where(grouping.group_of[own] == group, grouping.rank[own], -1))

    def _check_shrinks(self, group: int) -> None:
        counts = np.array([*self.plan.channels.units, 1])
        counts[group] -= 1
        _, failures = self.plan.channels.needed.fit(counts)
        if failures:
            constraint = failures[0].constraint
            raise RefusedError(f"it cannot shrink alone ({constraint.where}: {constraint.expression})")

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
