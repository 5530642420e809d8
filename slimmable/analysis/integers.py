"""Traced integers, which remember how they were computed, so that sizes computed in Python can follow a width.

While a model is traced, its integer attributes and the labelled sizes of its tensors are `TracedInt`s: integers with an
expression over attributes and sizes, which arithmetic extends.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slimmable.analysis.labels import Ids

Attribute = tuple[str, str, tuple[int, ...]]  # module path, attribute name, position inside nested tuples

OPERATIONS: dict[str, Callable[..., int]] = {
    name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "abs")
}


@dataclass(frozen=True, eq=False)
class Expression:
    """A constant, an attribute, the size of a labelled axis, or an operation on expressions."""

    kind: str  # "constant" | "attribute" | "size" | a name in OPERATIONS
    value: Any  # the int | the Attribute | the Ids | the operands

    def leaves(self, kind: str) -> Iterator[Any]:
        """Yield what the expression reads: attributes, or the labels of axes whose "size" it reads."""
        if self.kind in OPERATIONS:
            for operand in self.value:
                yield from operand.leaves(kind)
        elif self.kind == kind:
            yield self.value

    def evaluate(self, attributes: Mapping[Attribute, int], count: Callable[[Ids], int]) -> int:
        """Return the value, given the values of attributes and a function that counts the kept units of an axis."""
        if self.kind == "constant":
            return int(self.value)
        if self.kind == "attribute":
            return attributes[self.value]
        if self.kind == "size":
            return count(self.value)
        return OPERATIONS[self.kind](*(operand.evaluate(attributes, count) for operand in self.value))

    def __str__(self) -> str:
        if self.kind == "attribute":
            path, name, position = self.value
            return ".".join(filter(None, (path, name))) + "".join(f"[{i}]" for i in position)
        if self.kind == "size":
            return f"size({len(self.value)})"
        if self.kind == "constant":
            return str(self.value)
        return f"{self.kind}({', '.join(map(str, self.value))})"


class TracedInt(int):
    """An integer with an `Expression`, which arithmetic with integers extends.

    When two of them compare equal, `on_equal` is called, since a branch in the model's code may depend on that.
    """

    expression: Expression
    on_equal: Callable[[Expression, Expression], None] | None
    hashed = False  # whether one was, since `depends_on_trace` has last asked

    def __new__(cls, value: int, expression: Expression, on_equal: Any = None) -> TracedInt:
        """Make the integer `value`."""
        self = super().__new__(cls, value)
        self.expression, self.on_equal = expression, on_equal
        return self

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other) if isinstance(other, int) else False
        if equal is True and isinstance(other, TracedInt) and self.on_equal is not None:
            self.on_equal(self.expression, other.expression)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        TracedInt.hashed = True
        return int.__hash__(self)

    def __neg__(self) -> TracedInt:
        return self._computed("neg", self)

    def __abs__(self) -> TracedInt:
        return self._computed("abs", self)

    def __divmod__(self, other: int) -> tuple[int, int]:
        return self // other, self % other

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def _computed(self, name: str, *operands: int) -> TracedInt:
        expression = Expression(name, tuple(map(express, operands)))
        return TracedInt(OPERATIONS[name](*map(int, operands)), expression, self.on_equal)


def _add_operator(name: str) -> None:
    """Give `TracedInt` a binary operator, such as `+`, and its reflected form."""

    def forward(self: TracedInt, other: Any) -> Any:
        return self._computed(name, self, other) if isinstance(other, int) else NotImplemented

    def reflected(self: TracedInt, other: Any) -> Any:
        return self._computed(name, other, self) if isinstance(other, int) else NotImplemented

    setattr(TracedInt, f"__{name}__", forward)
    setattr(TracedInt, f"__r{name}__", reflected)


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _add_operator(_name)


def depends_on_trace(key: object) -> bool:
    """Tell whether a key of a cache contains a traced integer, which equals others of another expression.

    Raises: TypeError: if it has no hash.
    """
    TracedInt.hashed = False
    hash(key)
    return TracedInt.hashed


def express(value: int) -> Expression:
    """Return the expression of an integer, a constant for a plain one."""
    return value.expression if isinstance(value, TracedInt) else Expression("constant", int(value))


@dataclass(frozen=True, eq=False)
class Constraint:
    """The condition that `expression` equals the kept units of the axis `ids`, or `full` if that is None.

    With `other`, it must equal that expression instead, because the model's code found the two equal.
    """

    expression: Expression
    ids: Ids | None
    full: int
    where: str
    other: Expression | None = None

    def attributes(self) -> list[Attribute]:
        """Return the attributes that the constraint reads."""
        return [key for side in self._sides() for key in side.leaves("attribute")]

    def axes(self) -> list[Ids]:
        """Return the labels of the axes whose sizes the constraint involves."""
        own = [] if self.ids is None else [self.ids]
        return own + [ids for side in self._sides() for ids in side.leaves("size")]

    def holds(self, attributes: Mapping[Attribute, int], count: Callable[[Ids], int]) -> bool:
        """Tell whether the constraint holds, given the same as `Expression.evaluate`."""
        try:
            return self.expression.evaluate(attributes, count) == self.required(attributes, count)
        except ZeroDivisionError:
            return False

    def required(self, attributes: Mapping[Attribute, int], count: Callable[[Ids], int]) -> int:
        """Return what `expression` must equal."""
        if self.other is not None:
            return self.other.evaluate(attributes, count)
        return self.full if self.ids is None else count(self.ids)

    def _sides(self) -> list[Expression]:
        return [self.expression] if self.other is None else [self.expression, self.other]
