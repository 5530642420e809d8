"""Traced integers, which remember how they were computed, so that sizes computed in Python can follow a width."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slimmable.analysis.labels import Ids

Attribute = tuple[str, str, tuple[int, ...]]  # module path, attribute name, position inside nested tuples

_NAMES = ("add", "sub", "mul", "floordiv", "mod", "lshift", "rshift", "neg", "abs")
OPERATIONS = {name: getattr(operator, name) for name in _NAMES}


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
        read: dict[str, Callable[[Any], int]] = {"constant": int, "attribute": attributes.__getitem__, "size": count}
        if self.kind in read:
            return read[self.kind](self.value)
        return int(OPERATIONS[self.kind](*(operand.evaluate(attributes, count) for operand in self.value)))

    def mapped(self, change: Callable[[Ids], Ids]) -> "Expression":
        """Return it with other labels for each axis whose size it reads."""
        if self.kind in OPERATIONS:
            return replace(self, value=tuple(operand.mapped(change) for operand in self.value))
        return replace(self, value=change(self.value)) if self.kind == "size" else self

    def __str__(self) -> str:
        if self.kind == "attribute":
            path, name, position = self.value
            return ".".join(filter(None, (path, name))) + "".join(f"[{i}]" for i in position)
        if self.kind == "size":
            return f"size({len(self.value)})"
        return str(self.value) if self.kind == "constant" else f"{self.kind}({', '.join(map(str, self.value))})"


class TracedInt(int):
    """An integer whose expression arithmetic extends; equal ones are told to `on_equal`, as code may branch on it."""

    expression: Expression
    on_equal: Callable[[Expression, Expression], None] | None

    def __new__(cls, value: int, expression: Expression, on_equal: Any = None) -> "TracedInt":
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

    def __divmod__(self, other: int) -> tuple[int, int]:
        return self // other, self % other

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


def _operator(name: str, order: int = 1) -> Callable[..., Any]:
    """Return a method that computes an operation; with `order` -1, in its reflected form."""

    def apply(self: TracedInt, *other: Any) -> Any:
        operands = (self, *other)[::order]
        if not all(isinstance(each, int) for each in operands):
            return NotImplemented
        expression = Expression(name, tuple(map(express, operands)))
        return TracedInt(OPERATIONS[name](*map(int, operands)), expression, self.on_equal)

    return apply


for _name in OPERATIONS:
    setattr(TracedInt, f"__{_name}__", _operator(_name))
    if _name not in ("neg", "abs"):
        setattr(TracedInt, f"__r{_name}__", _operator(_name, -1))


def express(value: int) -> Expression:
    """Return the expression of an integer, a constant for a plain one."""
    return value.expression if isinstance(value, TracedInt) else Expression("constant", int(value))


def size_of(ids: Ids | None, full: int) -> Expression:
    """Return the expression of an axis's size, a constant if it has no labels."""
    return Expression("constant", full) if ids is None else Expression("size", ids)


@dataclass(frozen=True, eq=False)
class Constraint:
    """The condition that `expression` equals `required`: the size of an axis, or what the model's code found equal."""

    expression: Expression
    required: Expression
    where: str

    def attributes(self) -> list[Attribute]:
        """Return the attributes that the constraint reads."""
        return [*self.expression.leaves("attribute"), *self.required.leaves("attribute")]

    def axes(self) -> list[Ids]:
        """Return the labels of the axes whose sizes the constraint involves."""
        return [*self.required.leaves("size"), *self.expression.leaves("size")]

    def holds(self, attributes: Mapping[Attribute, int], count: Callable[[Ids], int]) -> bool:
        """Tell whether the constraint holds, given the same as `Expression.evaluate`."""
        try:
            return self.expression.evaluate(attributes, count) == self.required.evaluate(attributes, count)
        except ZeroDivisionError:
            return False
