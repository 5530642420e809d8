"""The plan of a conversion: what every width keeps of every parameter axis, and the integers that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from slimmable._errors import TraceError
from slimmable.analysis._integers import Attribute
from slimmable.analysis._labels import Ids, Labels
from slimmable.analysis._solve import Solution, solve
from slimmable.analysis._trace import FakeModel, Skip, Trace, trace

Kept = None | int | tuple[int, ...]  # of one axis at one width: all units, the first k, or these
AxisName = tuple[str, str, int]  # module path, tensor name, axis


@dataclass(frozen=True)
class Group:
    """Units that are kept or dropped together along several axes.

    `members[axis]` holds, for each position on that axis, the number of the unit that it belongs to, or -1 if it
    belongs to none of this group.
    """

    units: int
    kept: tuple[int, ...]  # per width
    members: Mapping[AxisName, NDArray[np.int64]]


@dataclass(frozen=True)
class Pin:
    """An axis that stays at full width, and why."""

    axis: AxisName
    size: int
    reason: str


@dataclass
class Plan:
    """What would be slimmed, what stays full and why; `print` shows it.

    Attributes:
        widths: from the widest to the narrowest.
        tensors: (module path, parameter or buffer name) -> for each width -> for each axis what is kept.
        values: module path -> attribute name -> its value at each width.
        caches: module path -> attributes in which the forward keeps tensors, of which every width needs its own ->
            their value when empty.
        groups: the channel groups.
        pins: the axes that stay at full width although a layer with weights makes them.
        output_shapes: for each width, the shapes of the model's output tensors.
    """

    widths: tuple[float, ...]
    tensors: dict[tuple[str, str], list[list[Kept]]] = field(default_factory=dict)
    values: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    output_shapes: list[list[tuple[int, ...]]] = field(default_factory=list)

    def __str__(self) -> str:
        return _table(self)


def make_plan(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    widths: tuple[float, ...],
    skip: Skip,
    round_to: int = 1,
    check: Callable[[FakeModel, Plan], tuple[str, Exception] | None] | None = None,
    prepare: Callable[[nn.Module], object] | None = None,
) -> Plan:
    """Trace `model` and return its plan.

    A labelled axis folded into several is carried by one of them; where that choice ends pinned, the others are
    tried once and the plan that keeps fewer parameters at the narrowest width is returned.

    Raises: TraceError: if the model's forward fails on fake tensors.
    """
    pinned: dict[str, str] = {}
    keep_caches = False
    while True:
        fake = FakeModel(model, args, kwargs, keep_caches, prepare)
        try:
            found = _best(fake, widths, _also(skip, dict(pinned)), round_to)
        except TraceError:
            if keep_caches or not fake.emptied:
                raise
            keep_caches = True  # what looked like a cache is something that the forward needs
            continue
        plan = _plan(fake, *found, widths)
        failed = None if check is None else check(fake, plan)
        if failed is None:
            return plan
        path, error = failed
        if path in pinned or not any(key[0] == path for key in plan.tensors):
            raise TraceError(f"the narrow network fails in module {path!r}: {error}") from error
        line = str(error).partition("\n")[0]
        pinned[path] = f"fails when narrow ({line[:100]})"


def _also(skip: Skip, pinned: Mapping[str, str]) -> Skip:
    return lambda path, module: pinned.get(path) or skip(path, module)


def _best(fake: FakeModel, widths: tuple[float, ...], skip: Skip, round_to: int) -> tuple[Trace, Solution]:
    choices: dict[int, int] = {}
    first = trace(fake, widths, skip, choices)
    solution = solve(first, widths, round_to)
    labels = first.context.labels
    trouble = np.zeros(len(labels), bool)
    for ids in solution.disagreed:
        trouble[labels.find(ids)] = True

    def doubtful(ids: Ids) -> bool:
        roots = labels.find(ids)
        return bool(labels.pinned(ids).all() or trouble[roots].any() or 2 * len(np.unique(roots)) <= len(ids))

    stuck = [site for site, (ids, options) in enumerate(first.context.splits) if options > 1 and doubtful(ids)]
    if not stuck:
        return first, solution
    second = trace(fake, widths, skip, {**choices, **dict.fromkeys(stuck, 1)})
    other = solve(second, widths, round_to)
    last = len(widths) - 1
    better = other.parameters(second, last) < solution.parameters(first, last)
    return (second, other) if better else (first, solution)


def _plan(fake: FakeModel, found: Trace, solution: Solution, widths: tuple[float, ...]) -> Plan:
    plan = Plan(widths, caches=found.caches)
    count = range(len(widths))
    for key, axes in found.tensors.items():
        plan.tensors[key] = [[None if ids is None else _kept(solution.mask(w, ids)) for ids in axes] for w in count]
    _set_values(plan, fake.model, found.attributes, solution)
    _set_scales(plan, fake.model, found, solution)
    _set_groups(plan, found, solution)
    for w in count:
        shapes = []
        for shape, axes in found.outputs:
            sizes = zip(shape, axes, strict=True)
            shapes.append(tuple(n if ids is None else solution.count(w, ids) for n, ids in sizes))
        plan.output_shapes.append(shapes)
    return plan


def _kept(mask: NDArray[np.bool_]) -> Kept:
    kept = np.flatnonzero(mask)
    if len(kept) == len(mask):
        return None
    return len(kept) if kept[-1] == len(kept) - 1 else tuple(kept.tolist())


def _set_values(plan: Plan, model: nn.Module, attributes: Mapping[Attribute, int], solution: Solution) -> None:
    for key, full in attributes.items():
        path, name, position = key
        values = [at_width.get(key, full) for at_width in solution.values]
        if any(value != full for value in values):
            module = model.get_submodule(path)
            entry = plan.values.setdefault(path, {}).setdefault(name, [module.__dict__[name]] * len(values))
            for w, value in enumerate(values):
                entry[w] = _replaced(entry[w], position, value)


def _replaced(value: Any, position: tuple[int, ...], new: int) -> Any:
    if not position:
        return new
    parts = list(value)
    parts[position[0]] = _replaced(parts[position[0]], position[1:], new)
    return type(value)(parts)


def _set_scales(plan: Plan, model: nn.Module, found: Trace, solution: Solution) -> None:
    """Let `head_dim ** -0.5` follow the head dimension, in modules that multiply queries and keys.

    Attention kernels take the scale from the size they see; a scale kept as an attribute must say the same.
    """
    for path, ids in found.context.contractions:
        kept = [solution.count(w, ids) for w in range(len(plan.widths))]
        if kept[-1] == len(ids):
            continue
        for name, value in vars(model.get_submodule(path)).items():
            if type(value) is float and abs(value - len(ids) ** -0.5) < 1e-9:
                plan.values.setdefault(path, {})[name] = [value, *(units**-0.5 for units in kept[1:])]


def _set_groups(plan: Plan, found: Trace, solution: Solution) -> None:
    labels = found.context.labels
    members: list[dict[AxisName, NDArray[np.int64]]] = [{} for _ in solution.groups]
    for (path, name), axes in found.tensors.items():
        for axis, ids in enumerate(axes):
            if ids is None:
                continue
            numbers = solution.group_of[ids]
            for number in np.unique(numbers[numbers >= 0]).tolist():
                members[number][path, name, axis] = np.where(numbers == number, solution.rank[ids], -1)
            if (numbers < 0).all() and labels.produced(ids).any() and labels.pinned(ids).any():
                plan.pins.append(Pin((path, name, axis), len(ids), _reason(labels, ids)))
    for roots, axes_of in zip(solution.groups, members, strict=True):
        kept = tuple(solution.count(w, roots) for w in range(len(plan.widths)))
        plan.groups.append(Group(len(roots), kept, axes_of))


def _reason(labels: Labels, ids: Ids) -> str:
    roots = set(labels.find(ids).tolist())
    for pinned, reason in labels.reasons:
        if not roots.isdisjoint(labels.find(pinned).tolist()):
            return reason
    return "merged with an axis that stays full"


def _table(plan: Plan) -> str:
    header = f"{'group':>5}  {'units':>6}  {'kept at ' + ', '.join(map(str, plan.widths)):<32}  axes"
    lines = [header]
    for number, group in enumerate(plan.groups):
        names = [f"{path}.{name}[{axis}]".lstrip(".") for path, name, axis in group.members]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"{number:>5}  {group.units:>6}  {', '.join(map(str, group.kept)):<32}  {shown}")
    if plan.pins:
        lines.append("kept at full width:")
    for pin in plan.pins:
        path, name, axis = pin.axis
        lines.append(f"  {path}.{name}[{axis}] ({pin.size}): {pin.reason}".replace(" .", " "))
    return "\n".join(lines)
