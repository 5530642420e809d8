"""Integers that remember where they come from, so that sizes computed in Python can follow a width.

While a model is traced its integer attributes and the labelled sizes of its tensors are `TracedInt`s: plain
integers to everybody else, with an expression over attributes and sizes that arithmetic carries along.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slimmable.analysis.labels import Ids

Attribute = tuple[str, str, tuple[int, ...]]  # module path, attribute name, position inside nested tuples

OPERATIONS: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "neg": operator.neg,
    "abs": operator.abs,
}


@dataclass(frozen=True, eq=False)
class Expression:
    """A constant, an attribute, the size of a labelled axis, or an operation on expressions."""

    kind: str  # "constant" | "attribute" | "size" | a name in OPERATIONS
    value: Any  # the int | the Attribute | the Ids | the operands

    def attributes(self) -> Iterator[Attribute]:
        """Yield the attributes that the expression reads."""
        for leaf in self._leaves():
            if leaf.kind == "attribute":
                yield leaf.value

    def sizes(self) -> Iterator[Ids]:
        """Yield the labels of the axes whose sizes the expression reads."""
        for leaf in self._leaves():
            if leaf.kind == "size":
                yield leaf.value

    def evaluate(self, attributes: Mapping[Attribute, int], kept: Callable[[Ids], int]) -> int:
        """Return the value when attributes have these values and axes these numbers of kept units."""
        if self.kind == "constant":
            return int(self.value)
        if self.kind == "attribute":
            return attributes[self.value]
        if self.kind == "size":
            return kept(self.value)
        return OPERATIONS[self.kind](*(operand.evaluate(attributes, kept) for operand in self.value))

    def _leaves(self) -> Iterator[Expression]:
        if self.kind in OPERATIONS:
            for operand in self.value:
                yield from operand._leaves()
        else:
            yield self

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
    """An integer with an `Expression`; arithmetic with integers keeps it, comparison is that of plain integers.

    A true `==` between two such integers is reported to `on_equal`, since a branch of the model's code rests on it.
    """

    expression: Expression
    on_equal: Callable[[Expression, Expression], None] | None

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

    __hash__ = int.__hash__

    def __neg__(self) -> TracedInt:
        return TracedInt(-int(self), Expression("neg", (self.expression,)), self.on_equal)

    def __abs__(self) -> TracedInt:
        return TracedInt(abs(int(self)), Expression("abs", (self.expression,)), self.on_equal)

    def __divmod__(self, other: int) -> tuple[int, int]:
        return self // other, self % other

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


def _binary(name: str) -> tuple[Callable[[TracedInt, Any], Any], Callable[[TracedInt, Any], Any]]:
    plain = OPERATIONS[name]

    def traced(self: TracedInt, left: int, right: int) -> TracedInt:
        expression = Expression(name, (express(left), express(right)))
        return TracedInt(plain(int(left), int(right)), expression, self.on_equal)

    def forward(self: TracedInt, other: Any) -> Any:
        return traced(self, self, other) if isinstance(other, int) else getattr(int, f"__{name}__")(self, other)

    def reflected(self: TracedInt, other: Any) -> Any:
        return traced(self, other, self) if isinstance(other, int) else getattr(int, f"__r{name}__")(self, other)

    return forward, reflected


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _method, _function in zip((f"__{_name}__", f"__r{_name}__"), _binary(_name), strict=True):
        setattr(TracedInt, _method, _function)


def express(value: int) -> Expression:
    """Return the expression of an integer; that of a plain one is a constant."""
    return value.expression if isinstance(value, TracedInt) else Expression("constant", int(value))


@dataclass(frozen=True, eq=False)
class Constraint:
    """`expression` must equal the number of kept units of an axis: of `ids`, or `full` if the axis is unlabelled.

    With `other` it must equal that expression instead: two integers that the model's code compared.
    """

    expression: Expression
    ids: Ids | None
    full: int
    where: str
    other: Expression | None = None
