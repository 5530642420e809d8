"""The state of a trace, which the rules of operations read and change, and the table of these rules."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from slimmable._inputs import tensors as tensors
from slimmable._reach import arguments as arguments
from slimmable.analysis.integers import Constraint, Expression, TracedInt, size_of
from slimmable.analysis.labels import Axes, Ids, Labels, spread


@dataclass
class Call:
    """The Python-level call that is running; its integer arguments still carry their expressions."""

    name: str = ""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def argument(self, position: int, name: str) -> Any:
        """Return an argument by its position or name, or None if the caller passed none."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)


@dataclass
class Context:
    """The state of one trace.

    Each tensor has its labels as the attribute `slim_axes`, and as `slim_origin` how its units came about: "weights"
    (from parameters alone), "made" (by layers with weights, and since then only moved, scaled, normalized or bounded),
    "constant" (not from features: zeros, noise, one value for all units) or None (features: rectified or unknown).
    """

    widths: tuple[float, ...]
    choices: Mapping[int, int]
    labels: Labels = field(default_factory=Labels)
    constraints: list[Constraint] = field(default_factory=list)
    splits: list[tuple[Ids, int]] = field(default_factory=list)  # per split: labels carried on, number of candidates
    consumed: list[Ids] = field(default_factory=list)
    producers: list[tuple[str, Ids]] = field(default_factory=list)  # module path, labels of what it makes
    products: list[tuple[int, list[Ids], str]] = field(default_factory=list)  # multiply-adds, labels, module path
    reads: list[tuple[str, Ids]] = field(default_factory=list)  # module path, labels of what its weights read
    meetings: list[tuple[str, Ids]] = field(default_factory=list)  # where, labels of units mixed without weights
    sums: list[Ids] = field(default_factory=list)  # labels along which features are added, not only scaled
    residuals: list[Ids] = field(default_factory=list)  # the same where different layers made the addends
    attended: list[Ids] = field(default_factory=list)  # labels of keys and values of attention
    contractions: list[tuple[str, Ids]] = field(default_factory=list)  # module path, labels of a product's inner axis
    module: str = ""  # path of the module that is running
    operation: str = ""
    schema: Any = None  # of the operation
    call: Call = field(default_factory=Call)

    def axes(self, tensor: Tensor) -> list[Ids | None]:
        """Return the labels of each axis of `tensor`; an axis of size 1 has none."""
        known: Axes | None = getattr(tensor, "slim_axes", None)
        return list(known) if known is not None else [None] * tensor.ndim

    def label(self, tensor: Tensor, axes: Sequence[Ids | None], origin: str | None = None) -> None:
        kept = tuple(ids if ids is not None and len(ids) > 1 else None for ids in axes)
        vars(tensor).update(slim_axes=kept, slim_origin=origin, slim_shape=tuple(tensor.shape))

    def origin(self, tensor: Tensor) -> str | None:
        return getattr(tensor, "slim_origin", None)

    def is_features(self, tensor: Tensor) -> bool:
        """Tell whether `tensor` has labelled units that layers made."""
        return any(ids is not None for ids in self.axes(tensor)) and self.origin(tensor) not in ("weights", "constant")

    def at(self, operation: str, module: str) -> None:
        self.operation, self.module = operation, module

    @property
    def where(self) -> str:
        """The operation and the module that the trace is in, for reports."""
        return f"{self.operation} in {self.module or 'the model itself'}"

    def pin(self, ids: Ids | None, why: str = "") -> None:
        """Keep `ids` at full width because of the current operation."""
        if ids is not None:
            self.labels.pin(ids, f"{self.where}{': ' + why if why else ''}")

    def pin_all(self, tensors: Sequence[Tensor], why: str = "") -> None:
        """Keep all axes of these tensors at full width because of the current operation."""
        self.use(tensors)
        for tensor in tensors:
            for ids in self.axes(tensor):
                self.pin(ids, why)

    def refuse(self, operands: Sequence[Tensor], why: str) -> None:
        """Keep all that an operation meets at full width; the plan lists weights too, which might have shrunk."""
        self.pin_all(operands, why)
        for tensor in operands:
            for ids in self.axes(tensor) if self.origin(tensor) == "weights" else ():
                if ids is not None:
                    self.labels.produce(ids)

    def number(self, indices: Tensor, axes: Sequence[Ids | None]) -> None:
        """Note that a tensor holds numbers of units on these axes."""
        indices.slim_numbered = [ids for ids in axes if ids is not None]  # type: ignore[attr-defined]

    def use(self, tensors: Iterable[Tensor]) -> None:
        """Note that these tensors are read, which pins the axes whose units they number."""
        for tensor in tensors:
            for ids in getattr(tensor, "slim_numbered", ()):
                self.pin(ids, "a unit's number is used")

    def merge(self, first: Ids | None, second: Ids | None, why: str = "") -> Ids | None:
        """Join two axes that must shrink together, and return the labels of both.

        If only one is labelled, it is pinned, because the other cannot shrink; if neither is, nothing happens.
        """
        if first is not None and second is not None:
            self.labels.merge(first, second)
        else:
            self.pin(first if second is None else second, why or "meets an axis that does not shrink")
        return first if first is not None else second

    def consume(self, ids: Ids | None, other: Ids | None) -> None:
        """Join the input axis of a layer with that of its weight."""
        joined = self.merge(ids, other, "reads an axis that does not shrink")
        if joined is not None:
            self.consumed.append(joined)
            self.reads.append((self.module, joined))

    def contract(self, first: Tensor, mine: Ids | None, second: Tensor, yours: Ids | None) -> None:
        """Join the axes along which products of two tensors are added up."""
        weights = [self.origin(tensor) == "weights" for tensor in (first, second)]
        if all(weights):
            self.merge(mine, yours)
        elif any(weights):
            self.consume(mine, yours)
        else:
            joined = self.merge(mine, yours)
            self.meet(joined)
            if joined is not None:
                self.contractions.append((self.module, joined))

    def produce(self, ids: Ids | None) -> None:
        """Note that a layer with weights makes these units."""
        if ids is not None:
            self.labels.produce(ids)
            self.producers.append((self.module, ids))

    def multiply(self, macs: int, axes: Sequence[Ids | None]) -> None:
        """Note multiply-adds that are proportional to the kept units of each of these axes."""
        self.products.append((macs, [ids for ids in axes if ids is not None], self.module))

    def meet(self, ids: Ids | None) -> None:
        """Note that units along an axis are mixed without weights, as by a normalization over them."""
        if ids is not None:
            self.meetings.append((self.where, ids))

    def constrain(self, size: Any, ids: Ids | None, full: int) -> None:
        """Require a size argument to follow the axis that it sizes."""
        if isinstance(size, TracedInt):
            self.constraints.append(Constraint(size.expression, size_of(ids, full), self.where))
        else:
            self.pin(ids, f"the size {size} is a constant")

    def on_equal(self, first: Expression, second: Expression) -> None:
        """Note that the model's code found two integers equal."""
        self.constraints.append(Constraint(first, second, self.where))

    def size(self, tensor: Tensor, axis: int) -> int:
        """Return the size of an axis, as a `TracedInt` if the axis is labelled."""
        ids, size = self.axes(tensor)[axis], int(tensor.size(axis))
        return size if ids is None else TracedInt(size, Expression("size", ids), self.on_equal)

    def split(self, ids: Ids, shape: Sequence[int], sizes: Sequence[Any]) -> list[Ids | None]:
        """Label the axes of `shape` into which an axis labelled `ids` is folded; one of them carries the labels.

        `sizes` holds the size argument of each axis: an integer, traced or not, or None if the code passed none. An
        axis sized by a constant cannot carry labels. Preferred is one that needs no merge, then the first that has a
        whole size at every width (whole attention heads), then the largest, unless `choices` picks another.
        """
        result: list[Ids | None] = [None] * len(shape)
        able = [i for i, size in enumerate(sizes) if shape[i] > 1 and (type(size) is not int or size == -1)]
        if not able:
            self.pin(ids, f"is folded to constants {tuple(shape)}")
            return result
        block = ids.reshape(shape)
        carried = [np.moveaxis(block, axis, 0).reshape(shape[axis], -1) for axis in able]
        for axis, rows in zip(able, carried, strict=True):
            if self.labels.same(rows, np.broadcast_to(rows[:, :1], rows.shape)):
                result[axis] = rows[:, 0]
                return result
        whole = [all(float(shape[axis] * width).is_integer() for width in self.widths) for axis in able]
        order = sorted(range(len(able)), key=lambda i: (not whole[i], -shape[able[i]] if not whole[i] else 0))
        pick = order[self.choices.get(len(self.splits), 0) % len(able)]
        rows = carried[pick]
        self.labels.merge_rows(rows)
        result[able[pick]] = rows[:, 0]
        self.splits.append((rows[:, 0], len(able)))
        return result

    def fold(self, axes: Sequence[Ids | None], shape: Sequence[int]) -> Ids | None:
        """Return the labels of the axis into which axes of `shape` are flattened."""
        labelled = {i: ids for i, ids in enumerate(axes) if ids is not None}
        if not labelled:
            return None
        shrinks = {i: (self.labels.produced(ids) & ~self.labels.pinned(ids)).any() for i, ids in labelled.items()}
        carrier = max(labelled, key=lambda i: (shrinks[i], len(labelled[i])))
        flat = spread(labelled.pop(carrier), math.prod(shape[:carrier]), math.prod(shape[carrier + 1 :]))
        for ids in labelled.values():
            self.pin(ids, "is flattened together with another labelled axis")
        return flat


Rule = Callable[[Context, Sequence[Any], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}
"""By the name of the ATen operation; a rule is called after its operation has run, and labels the output."""


def rule_of(*names: str) -> Callable[[Rule], Rule]:
    """Make the decorated function the rule of these operations."""

    def add(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return add


def dim_of(ctx: Context, args: Sequence[Any], kwargs: Mapping[str, Any], axes: int) -> int:
    """Return the argument `dim` of the operation, on `axes` axes, as a number from 0."""
    return int(arguments(ctx.schema, args, kwargs)["dim"]) % axes
