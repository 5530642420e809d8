"""The plan of a conversion: channel groups, the constraints on how many units each keeps, and the sub-networks."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slimmable._checks import check_count, check_flags, check_rounding
from slimmable._modules import is_under
from slimmable._tables import html_table, listed
from slimmable._widths import Kept, disjoint_starts, kept_of, kept_units, number_or_nan, width_index
from slimmable.analysis.integers import Attribute, Constraint
from slimmable.analysis.labels import Ids, Mask
from slimmable.errors import ConversionError, WidthError, require

TensorName = tuple[str, str]  # module path, name of a parameter or buffer
Counts = NDArray[np.int64]  # kept units of each group, then a 1 for what stays full
Values = dict[Attribute, int]
Count = Callable[[Ids], int]  # how many units of an axis are kept
AxisName = tuple[str, str, int]  # module path, tensor name, axis
Setting: TypeAlias = "float | Mapping[str, float] | tuple[int, ...] | list[int]"
"""A width, widths by patterns of layer names (the last match decides), or one count per channel group."""

_REMEMBERED = 64  # sub-networks
_RULES = ("widths", "round_to", "rounding", "overlap", "switchable", "universal")


@dataclass(frozen=True, eq=False)
class Grouping:
    """For each id, its group, or -1 if it stays full, and its rank among the units of the group."""

    units: tuple[int, ...]
    group_of: NDArray[np.int64]
    rank: NDArray[np.int64]

    @classmethod
    def of(cls, units: tuple[int, ...]) -> "Grouping":
        """Return that of ids which number the units of all groups; the one after the last stands for what is full."""
        group_of, ranks = np.repeat(np.arange(len(units)), units), map(np.arange, units)
        return cls(units, np.append(group_of, -1), np.concatenate([*ranks, np.zeros(1, np.int64)]))

    def mask(self, counts: Counts, ids: Ids) -> Mask:
        """Return which units of an axis are kept."""
        return self.rank[ids] < counts[self.group_of[ids]]

    def count(self, counts: Counts, ids: Ids) -> int:
        """Return how many units of an axis are kept."""
        return int(self.mask(counts, ids).sum())

    def groups_in(self, axes: Sequence[Ids | None]) -> list[int]:
        """Return the numbers of the groups that have units on these axes."""
        labelled = (ids for ids in axes if ids is not None)
        return sorted({int(group) for ids in labelled for group in np.unique(self.group_of[ids]) if group >= 0})


@dataclass
class Failure:
    """A constraint that cannot hold, and those that determined its attributes."""

    constraint: Constraint
    rivals: list[Constraint]

    def axes(self) -> list[Ids]:
        """Return the labelled axes that disagree."""
        return [ids for constraint in (self.constraint, *self.rivals) for ids in constraint.axes()]


@dataclass(frozen=True)
class Requirements:
    """The constraints on a model's counts, and the full values of the attributes in them."""

    grouping: Grouping
    constraints: Sequence[Constraint]
    attributes: Mapping[Attribute, int]

    def fit(self, counts: Counts) -> tuple[Values, list[Failure]]:
        """Return the values of attributes that the constraints require, and the constraints that cannot hold."""
        values, sources, known = Values(), dict[Attribute, Constraint](), dict[int, int]()

        def count(ids: Ids) -> int:
            if id(ids) not in known:
                known[id(ids)] = self.grouping.count(counts, ids)
            return known[id(ids)]

        waiting = [(constraint, set(constraint.attributes())) for constraint in self.constraints]
        while waiting := [(each, unknown) for each, keys in waiting if (unknown := keys - values.keys())]:
            ready: dict[Attribute, list[Constraint]] = {}
            for constraint, unknown in waiting:
                if len(unknown) == 1:
                    ready.setdefault(next(iter(unknown)), []).append(constraint)
            for key, asking in ready.items():
                values[key], sources[key] = _value(asking, key, self.attributes[key], values, count)
            if not ready:  # several unknowns: the smallest attribute stays full
                least = min((k for k in waiting[0][0].attributes() if k not in values), key=self.attributes.__getitem__)
                values[least] = self.attributes[least]
        broken = [each for each in self.constraints if not each.holds(values, count)]
        rivals = ([sources[key] for key in each.attributes() if sources.get(key, each) is not each] for each in broken)
        return values, list(map(Failure, broken, rivals))

    def adjust(self, counts: Counts) -> tuple[Values, list[Failure]]:
        """Change the counts of groups that disagree by a unit or two, in place, while that leaves fewer failures."""
        start, (values, failures) = counts.copy(), self.fit(counts)
        while failures:
            tried = []
            for group in self.grouping.groups_in(failures[0].axes()):
                units = self.grouping.units[group]
                for count in (counts[group] + delta for delta in (1, -1, 2, -2)):
                    if 1 <= count <= units and abs(count - start[group]) <= max(1, units // 8):
                        changed = counts.copy()
                        changed[group] = count
                        tried.append((changed, *self.fit(changed)))
            best = min(tried, key=lambda each: len(each[2]), default=(counts, values, failures))
            if len(best[2]) >= len(failures):
                break
            counts[:], values, failures = best
        return values, failures


def _value(asking: list[Constraint], key: Attribute, full: int, values: Values, count: Count) -> tuple[int, Constraint]:
    """Return the value of an attribute with which most of its constraints hold, and the first that asked for it."""
    first_to_ask: dict[int, Constraint] = {}
    for constraint in asking:
        first_to_ask.setdefault(_fitting(constraint, key, full, values, count), constraint)
    best = max(first_to_ask, key=lambda value: sum(each.holds({**values, key: value}, count) for each in asking))
    return best, first_to_ask[best]


def _fitting(constraint: Constraint, key: Attribute, full: int, values: Values, count: Count) -> int:
    """Return the value of the one unknown attribute with which a constraint holds, or its full value if none does."""
    required = constraint.required
    if constraint.expression.kind == "attribute" and required.kind in ("constant", "size"):
        return required.evaluate(values, count)

    def fits(value: int) -> bool:
        return constraint.holds({**values, key: value}, count)

    if fits(full):
        return full
    ratio = count(required.value) / len(required.value) if required.kind == "size" else 1.0
    near = sorted(range(1, full), key=lambda value: abs(value - full * ratio))
    return next((value for value in near if fits(value)), full)


@dataclass(frozen=True, eq=False)
class SubNetwork:
    """What one sub-network keeps.

    Attributes:
        counts: number of units of each group.
        tensors: (module path, parameter or buffer name) -> what is kept of each axis.
        values: module path -> attribute name -> its value, if that differs from the full network's.
        output_shapes: shapes of the model's output tensors.
        macs: multiply-adds of all convolutions and matrix products, for the whole batch of the example.
        parameters: elements of all parameters.
    """

    counts: tuple[int, ...]
    tensors: Mapping[TensorName, list[Kept]]
    values: Mapping[str, Mapping[str, Any]]
    output_shapes: list[tuple[int, ...]]
    macs: int
    parameters: int


@dataclass(frozen=True, eq=False)
class Output:
    """An output tensor of the model: its full shape, the units of its axes, and why it gets thinner or stays full."""

    name: str
    shape: tuple[int, ...]
    units: tuple[Ids | None, ...]
    why: str


@dataclass(frozen=True, eq=False)
class Channels:
    """The channel groups of a model and what they size; pure data, in which units are numbered as by `Grouping.of`."""

    needed: Requirements  # the groups, and the constraints on how many units they keep
    tensors: Mapping[TensorName, tuple[Ids | None, ...]]  # units of each axis
    attributes: Mapping[tuple[str, str], Any]  # module path, name -> full value: an integer, or several in a tuple
    scales: Sequence[tuple[str, str, Ids]]  # module path, name, units of attributes that are `len(units) ** -0.5`
    outputs: Sequence[Output]
    makers: tuple[tuple[str, ...], ...]  # for each group, the modules with weights that make it
    ordered: tuple[bool, ...]  # for each group, whether the order of its units matters
    products: Sequence[tuple[int, tuple[Ids, ...]]]  # full multiply-adds, and the units that they are proportional to
    sizes: Mapping[TensorName, tuple[int, ...]]  # full shape of each parameter, shared ones only once

    @property
    def units(self) -> tuple[int, ...]:
        """The number of units of each group."""
        return self.needed.grouping.units

    def sub_network(self, counts: Counts, values: Values, starts: Counts | None = None) -> SubNetwork:
        """Return the sub-network of these counts and values, which keeps units from `starts` on, or the first ones."""
        grouping = self.needed.grouping
        if starts is not None:  # of each group the unit at its start comes first, and those before it last
            sizes = np.array([*grouping.units, 1])[grouping.group_of]
            grouping = replace(grouping, rank=(grouping.rank - starts[grouping.group_of]) % sizes)
        found: dict[int, Kept] = {}

        def kept(ids: Ids) -> Kept:
            if id(ids) not in found:
                units = np.flatnonzero(grouping.mask(counts, ids))
                first = len(units) if units[-1] == len(units) - 1 else tuple(units.tolist())
                found[id(ids)] = None if len(units) == len(ids) else first
            return found[id(ids)]

        def count(ids: Ids) -> int:
            return kept_of(len(ids), kept(ids))

        def narrow(shape: tuple[int, ...], axes: Sequence[Ids | None]) -> tuple[int, ...]:
            return tuple(n if ids is None else count(ids) for n, ids in zip(shape, axes, strict=True))

        tensors = {key: [None if ids is None else kept(ids) for ids in axes] for key, axes in self.tensors.items()}
        changed: dict[str, dict[str, Any]] = {}
        for (path, name, position), value in values.items():
            if value != self.needed.attributes[path, name, position]:
                entry = changed.setdefault(path, {})
                entry[name] = _replaced(entry.get(name, self.attributes[path, name]), position, value)
        for path, name, ids in self.scales:
            if count(ids) < len(ids):
                changed.setdefault(path, {})[name] = count(ids) ** -0.5
        for path, name in self.attributes:
            heads = changed.get(f"{path}.layers.0.self_attn".lstrip("."), {}).get("num_heads", 0)
            if name == "use_nested_tensor" and heads % 2:  # as torch's constructor does
                changed.setdefault(path, {})[name] = False
        shapes = [narrow(output.shape, output.units) for output in self.outputs]
        macs = sum(full // math.prod(map(len, axes)) * math.prod(map(count, axes)) for full, axes in self.products)
        parameters = sum(math.prod(narrow(shape, self.tensors[key])) for key, shape in self.sizes.items())
        return SubNetwork(tuple(map(int, counts[:-1])), tensors, changed, shapes, macs, parameters)


def _replaced(value: Any, position: tuple[int, ...], new: int) -> Any:
    if not position:
        return new
    parts = list(value)
    parts[position[0]] = _replaced(parts[position[0]], position[1:], new)
    return type(value)(parts)


# -- plans
@dataclass(frozen=True)
class Group:
    """Units that several axes share; each width keeps the first ones.

    `members[axis]` holds, for each position on that axis, the number of its unit, or -1 if that is in another group.
    `makers` are the modules that make them. An `ordered` group, along which a convolution runs, keeps its order.
    """

    units: int
    kept: tuple[int, ...]  # per width
    members: Mapping[AxisName, NDArray[np.int64]]
    makers: tuple[str, ...]
    ordered: bool = False


@dataclass(frozen=True)
class Pin:
    """An axis that stays at full width, and why."""

    axis: AxisName
    size: int
    reason: str


@dataclass(repr=False)
class Plan:
    """What is slimmed, what stays full, and why; printable. Copies of a model share its plan.

    The first attributes are the arguments of `slimify`, with the names in `switchable`, and widths from the widest on.

    Attributes:
        channels: the channel groups, their axes, and what they size.
        columns: the sub-network of each width.
        caches: module path -> attribute in which the forward keeps tensors -> its empty value. Each width has its own.
        pins: the axes that stay at full width although a layer with weights makes them.
    """

    widths: tuple[float, ...]
    round_to: int = 1
    rounding: str = "nearest"
    overlap: bool = True
    switchable: tuple[str, ...] = ()
    universal: bool = False
    channels: Channels = field(init=False)
    columns: list[SubNetwork] = field(default_factory=list)
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_flags("slimify", overlap=self.overlap, universal=self.universal)
        check_rounding("slimify", rounding=self.rounding)
        check_count("slimify", round_to=self.round_to)
        if self.universal and (self.switchable or not self.overlap):
            raise ConversionError("universal=True needs widths that share their weights: overlap, nothing switchable")

    def __str__(self) -> str:
        groups = [f"{number:>5}  {units:>6}  {kept:<32}  {axes}" for number, units, kept, axes in _groups(self)]
        pins = [f"  {_axis(pin.axis)} ({pin.size}): {pin.reason}" for pin in self.pins]
        outputs = [f"  {name}: {shapes}, {kind}{why and ': '}{why}" for name, shapes, kind, why in _outputs(self)]
        rules = [f"{name}={value!r}" for name, value in self.rules().items() if value != getattr(Plan, name, value)]
        full, asked = ["kept at full width:"] * bool(pins), [f"rules: {', '.join(rules)}"] * bool(rules)
        return "\n".join([*groups, *full, *pins, "outputs:", *outputs, *asked])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the plan as HTML tables for notebooks."""
        pins = [[_axis(pin.axis), pin.size, pin.reason] for pin in self.pins]
        full = html_table([["kept at full width", "units", "reason"], *pins]) if pins else ""
        return html_table(_groups(self)) + full + html_table([["output", "shape", "kind", "reason"], *_outputs(self)])

    def plot(self) -> Any:
        """Return a matplotlib figure of the axes of layers' weights: those of one colour share units, grey stay."""
        cells = {pin.axis: [-1] for pin in self.pins}
        for number, axis in ((number, axis) for number, group in enumerate(self.groups) for axis in group.members):
            cells.setdefault(axis, []).append(number)
        layers = [path for path, name in self.channels.sizes if name == "weight"]
        figure = require("matplotlib.figure", "matplotlib").Figure((5, 0.6 + len(layers) / 4), layout="constrained")
        (axes := figure.subplots()).set_xticks((0.5, 1.5), ("axis 1", "axis 0"))
        axes.set_yticks(-np.arange(len(layers)), layers)
        for (row, path), place in product(enumerate(layers), (0, 1)):
            found = cells.get((path, "weight", 1 - place), [])
            for left, number in zip(np.linspace(place, place + 0.95, len(found), endpoint=False), found, strict=True):
                axes.barh(-row, 0.95 / len(found), left=left, color=f"C{number % 10}" if number >= 0 else "lightgrey")
                axes.text(left + 0.475 / len(found), -row, number if number >= 0 else "full", ha="center", va="center")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data.

        Returns: "widths" and the other rules, such as "round_to"; "macs" and "parameters" per width; "groups", each
            with its "units", those "kept" per width, its "makers", whether it is "ordered", and its "axes", such as
            {"module": "layer1.0.conv1", "tensor": "weight", "axis": 0}; "pins", such axes with "size" and "reason";
            "outputs", each with its "name", its "shapes" per width, and the "reason" why it stays full or gets thinner.

        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> found = slimmable.plan(net, (1.0, 0.5), example_inputs=torch.zeros(1, 4)).to_dict()
        >>> found["macs"], found["groups"][0]["kept"], found["groups"][0]["makers"]
        ([48, 24], [8, 4], ['0'])
        """
        groups = [{**vars(group), "axes": list(map(_axis_data, group.members))} for group in self.groups]
        outputs = zip(self.channels.outputs, *self.output_shapes, strict=True)
        data = {
            **self.rules(),
            "macs": [column.macs for column in self.columns],
            "parameters": [column.parameters for column in self.columns],
            "groups": [{name: value for name, value in group.items() if name != "members"} for group in groups],
            "pins": [{**_axis_data(pin.axis), "size": pin.size, "reason": pin.reason} for pin in self.pins],
            "outputs": [{"name": each.name, "shapes": shapes, "reason": each.why} for each, *shapes in outputs],
        }
        return dict(json.loads(json.dumps(data)))  # in which tuples are lists

    def rules(self) -> dict[str, Any]:
        """Return what was asked for: the arguments that make an empty plan."""
        return {name: getattr(self, name) for name in _RULES}

    def kept(self, units: int, width: float) -> int:
        """Return how many of a group's units are kept at a width, before constraints."""
        return kept_units(units, width, self.round_to, self.rounding)

    def fill(self, counts: Sequence[Sequence[int]]) -> None:
        """Set the sub-networks of the widths, by the units that they keep of each group; all constraints hold."""
        vars(self).pop("_found", None)
        starts = np.zeros((len(counts), len(self.channels.units) + 1), np.int64)
        for group, (kept, makers) in enumerate(zip(zip(*counts, strict=True), self.channels.makers, strict=True)):
            if not self.overlap and len(set(kept)) > 1:
                starts[:, group] = disjoint_starts(self.widths, kept, f" of a group, made by {listed(makers, most=3)}")
        for each, start in zip(counts, starts, strict=True):
            units = np.array([*each, 1])
            self.columns.append(self.channels.sub_network(units, self.channels.needed.fit(units)[0], start))

    def __deepcopy__(self, memo: Any) -> "Plan":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("groups", "tensors", "_found")}

    @cached_property
    def groups(self) -> list[Group]:
        """The channel groups."""
        grouping = self.channels.needed.grouping
        members: list[dict[AxisName, NDArray[np.int64]]] = [{} for _ in grouping.units]
        for (path, name), axes in self.channels.tensors.items():
            for axis, ids in enumerate(axes):
                for number in grouping.groups_in([ids]):
                    own = grouping.group_of[ids] == number
                    members[number][path, name, axis] = np.where(own, grouping.rank[ids], -1)
        kept = zip(*(column.counts for column in self.columns), strict=True)
        return list(map(Group, grouping.units, kept, members, self.channels.makers, self.channels.ordered))

    @cached_property
    def tensors(self) -> dict[TensorName, list[list[Kept]]]:
        """(module path, parameter or buffer name) -> for each width, what is kept of each axis."""
        return {key: [column.tensors[key] for column in self.columns] for key in self.channels.tensors}

    @property
    def output_shapes(self) -> list[list[tuple[int, ...]]]:
        """For each width, the shapes of the model's output tensors."""
        return [column.output_shapes for column in self.columns]

    def sub_network(self, setting: Setting) -> SubNetwork:
        """Return the sub-network of a width, of widths by layer or of counts by group; WidthError if there is none."""
        if isinstance(setting, Mapping):
            return self.near(self._counts_by_layer(setting))
        if isinstance(setting, (tuple, list)):
            return self._of_counts(setting)
        if setting in self.widths or not self.universal:
            return self.columns[width_index(setting, self.widths)]
        if not self.widths[-1] <= number_or_nan(setting) <= 1:
            raise WidthError(f"width {setting!r} is not a number in [{self.widths[-1]}, 1], this model's range")
        return self.near(tuple(self.kept(units, setting) for units in self.channels.units))

    @cached_property
    def _found(self) -> dict[tuple[int, ...], SubNetwork]:  # by the counts that were asked for
        return {column.counts: column for column in self.columns}

    def near(self, wanted: tuple[int, ...]) -> SubNetwork:
        """Return the sub-network with counts near `wanted` that satisfy all constraints.

        Where a few units more or less do not help, groups that disagree rise to the narrowest column with no fewer.
        """
        if wanted in self._found:
            return self._found[wanted]
        if len(self._found) >= _REMEMBERED + len(self.columns):
            vars(self).pop("_found", None)  # it starts anew, with the columns
        needed, counts = self.channels.needed, np.array([*wanted, 1])
        values, failures = needed.adjust(counts)
        columns = [np.array([*column.counts, 1]) for column in reversed(self.columns)]
        while failures:
            disagreeing = [needed.grouping.groups_in(failure.axes()) for failure in failures]
            for groups, column in product(disagreeing, columns):
                if (column[groups] >= counts[groups]).all() and (column[groups] > counts[groups]).any():
                    counts[groups] = column[groups]
                    break
            else:  # each fits one column, but not what decides with it
                counts = columns[-1]
            values, failures = needed.fit(counts)
        found = self.channels.sub_network(counts, values)
        known = (other for other in self._found.values() if other.counts == found.counts)
        return self._found.setdefault(wanted, next(known, found))

    def _of_counts(self, wanted: Sequence[int]) -> SubNetwork:
        units = self.channels.units
        if len(wanted) != len(units):
            raise WidthError(f"got {len(wanted)} counts for the {len(units)} channel groups of this model's plan")
        for group, (count, most) in enumerate(zip(wanted, units, strict=True)):
            if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 1 <= count <= most:
                raise WidthError(f"group {group} cannot keep {count!r} units; it keeps 1 to {most}")
        key = tuple(map(int, wanted))
        found = self.near(key)
        if found.counts != key:
            failure = self.channels.needed.fit(np.array([*key, 1]))[1][0]
            groups = self.channels.needed.grouping.groups_in(failure.axes())
            kept = ", ".join(f"group {group} with {key[group]}" for group in groups)
            why = f"{failure.constraint.where}: {failure.constraint.expression}"
            raise WidthError(f"these counts do not go together: {kept} ({why}); plan.sub_network(width).counts do")
        return found

    def _counts_by_layer(self, widths: Mapping[str, float]) -> tuple[int, ...]:
        makers = {path for paths in self.channels.makers for path in paths}
        for pattern, width in widths.items():
            if not 0 < number_or_nan(width) <= 1:
                raise WidthError(f"width {width!r} of layers {pattern!r} is not a number in (0, 1]")
            if not isinstance(pattern, str) or not any(is_under(path, pattern) for path in makers):
                known = listed(sorted(makers), most=6)
                raise WidthError(f"no layer that makes slimmable channels matches {pattern!r}; such layers are {known}")
        width_of = {path: [1.0, *(w for p, w in widths.items() if is_under(path, p))][-1] for path in makers}
        at = [max((width_of[path] for path in paths), default=1.0) for paths in self.channels.makers]
        return tuple(map(self.kept, self.channels.units, at))


def _groups(plan: Plan) -> Iterator[list[Any]]:
    """Yield, below a header, the number of each group, its units, those kept, and its first axes."""
    yield ["group", "units", f"kept at {', '.join(map(str, plan.widths))}", "axes"]
    for number, group in enumerate(plan.groups):
        yield [number, group.units, ", ".join(map(str, group.kept)), listed([*map(_axis, group.members)], most=3)]


def _outputs(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """Yield the name of each output, its full shape and that at the narrowest width, "slim" or "full", and why."""
    for output, narrow in zip(plan.channels.outputs, plan.columns[-1].output_shapes, strict=True):
        slim = narrow != output.shape
        shapes = f"{output.shape}, {narrow} at {plan.widths[-1]}" if slim else str(output.shape)
        yield output.name, shapes, "slim" if slim else "full", output.why


def _axis(axis: AxisName) -> str:
    path, name, number = axis
    return f"{path}.{name}[{number}]".lstrip(".")


def _axis_data(axis: AxisName) -> dict[str, Any]:
    return dict(zip(("module", "tensor", "axis"), axis, strict=True))
