"""Rules by the names of their operations, and what a rule is given: a call, and verbs for the units on its axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from slimmable._checks import check_flags
from slimmable._inputs import tensors
from slimmable._reach import arguments
from slimmable.analysis.labels import Ids
from slimmable.analysis.trace import RULES, Context
from slimmable.errors import RuleError, UsageError


class Operation:
    """One call of an operation, as its rule sees it.

    `op["weight"]` is the argument of that name in the operation's schema, or its default. Verbs take such a name of a
    tensor, or "indices[0]" for the first of a list, and one of its axes. About an optional tensor that was not passed,
    and about axes of size 1, which are broadcast, they say nothing.

    If the rule leaves out an axis on which there are units, the operation counts as one without a rule. So what a rule
    forgets costs savings, not correctness; what it does say is believed.

    Attributes:
        name: such as "torchvision::roi_align".
        tensors: the tensors among the arguments, by name.
        outputs: the tensors that it has returned, or those that it has written to if it returns none.
    """

    def __init__(self, context: Context, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        self.name = str(context.schema.name)
        self.outputs = tensors(out)
        self._context = context
        self._arguments = arguments(context.schema, args, kwargs)
        self.tensors: dict[str, Tensor] = {}
        for name, value in self._arguments.items():
            parts = enumerate(value) if isinstance(value, (list, tuple)) else ()
            named = {name: value} | {f"{name}[{i}]": part for i, part in parts}
            self.tensors |= {key: part for key, part in named.items() if isinstance(part, Tensor)}
        self._mentioned: set[tuple[str, int]] = set()
        self._axes: list[dict[int, Ids | None]] = [{} for _ in self.outputs]
        self._sources: list[set[str]] = [set() for _ in self.outputs]  # names of what moves there
        self._products: list[tuple[int, Ids | None]] = []  # multiply-adds per element of the output, inner axis
        self._made = False

    def __getitem__(self, name: str) -> Any:
        if name not in self._arguments:
            raise KeyError(f"{self.name} has no argument {name!r}; it has {', '.join(self._arguments)}")
        return self._arguments[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arguments

    def same(self, first: str, axis: int, second: str, other: int) -> None:
        """Say that two axes hold the same units, such as batches, heads or channels that meet one by one."""
        (units, mine), (others, yours) = self._axis(first, axis), self._axis(second, other)
        if 1 not in (units, others):
            _check(units, others, f"axis {axis} of {first!r}", f"axis {other} of {second!r}")
            self._context.merge(mine, yours)

    def moves(self, name: str, axis: int, to: int, output: int = 0) -> None:
        """Say that an axis becomes axis `to` of an output; all that moves to one axis there is the same units."""
        given, axes, result = self._axis(name, axis), self._axes[output], self.outputs[output]
        to = _number(to, result, f"output {output}")
        if given[0] == 1:
            return
        _check(given[0], int(result.shape[to]), f"axis {axis} of {name!r}", f"axis {to} of output {output}")
        axes[to] = self._context.merge(axes[to], given[1]) if to in axes else given[1]
        self._sources[output].add(name)

    def keeps(self, name: str, *but: int, output: int = 0) -> None:
        """Say that all axes but some move to an output, each to its own place, or closing up if that has fewer axes."""
        count = self.tensors[name].ndim if self._passed(name) else 0
        fewer = self.outputs[output].ndim < count
        kept = [axis for axis in range(count) if axis not in {each % count for each in but}]
        for number, axis in enumerate(kept):
            self.moves(name, axis, to=number if fewer else axis, output=output)

    def makes(self, weight: str, axis: int, to: int, output: int = 0) -> None:
        """Say that an axis of a weight makes the units on axis `to` of an output, as the channels of a convolution."""
        if self._passed(weight) and self._context.origin(self.tensors[weight]) == "weights":
            self._context.produce(self._axis(weight, axis)[1])
            self._made = True
        self.moves(weight, axis, to, output)

    def contracts(self, first: str, axis: int, second: str, other: int, times: int = 1) -> None:
        """Say that products of two tensors are added up along an axis of both, as in a matrix product.

        If one of them is a weight, its layer reads the axis. The plan counts `times` multiply-adds for each unit of the
        axis and each element of the output: for a convolution the size of its kernel.
        """
        mine, yours = self._axis(first, axis), self._axis(second, other)
        if self._passed(first) and self._passed(second):
            _check(mine[0], yours[0], f"axis {axis} of {first!r}", f"axis {other} of {second!r}")
            self._context.contract(self.tensors[first], mine[1], self.tensors[second], yours[1])
            self._products.append((times * mine[0], mine[1]))

    def mixes(self, name: str, axis: int) -> None:
        """Say that the units along an axis are put together without weights, all alike, as by a mean or a softmax."""
        self._context.meet(self._axis(name, axis)[1])

    def pins(self, name: str, axis: int, why: str) -> None:
        """Keep an axis at full width, for a reason that the plan gives, such as "the order of the units matters"."""
        self._context.pin(self._axis(name, axis)[1], why)

    def sizes(self, number: str, name: str, axis: int) -> None:
        """Say that the integer argument `number` counts the units on an axis, as `num_heads` does.

        It follows the width if it comes from an attribute of a module or the shape of a tensor; a constant pins.
        """
        given, passed = self._axis(name, axis), self._context.call.argument(list(self._arguments).index(number), number)
        if self._passed(name):
            self._context.constrain(self[number] if passed is None else passed, given[1], given[0])

    def _passed(self, name: str) -> bool:
        if name not in self.tensors and "[" not in name and self[name] is not None:
            raise TypeError(f"argument {name!r} is no tensor, but {self[name]!r}")
        return name in self.tensors

    def _axis(self, name: str, axis: int) -> tuple[int, Ids | None]:
        """Return size and labels of an axis, 1 and none if there is no such tensor; note that the rule mentions it."""
        if not self._passed(name):
            return 1, None
        tensor = self.tensors[name]
        number = _number(axis, tensor, repr(name))
        self._mentioned.add((name, number))
        return int(tensor.shape[number]), self._context.axes(tensor)[number]

    def _finish(self) -> None:
        """Pin everything if the rule has left out an axis, count the multiply-adds, and label the outputs."""
        context = self._context
        for name, tensor in self.tensors.items():
            for axis, ids in enumerate(context.axes(tensor)):
                if ids is not None and (name, axis) not in self._mentioned:
                    context.refuse([*self.tensors.values()], f"its rule says nothing about axis {axis} of {name!r}")
        for macs, inner in self._products:
            context.multiply(macs * int(self.outputs[0].numel()), [*self._axes[0].values(), inner])
        numbers = [each for each in self.tensors.values() if each.is_floating_point() or each.is_complex()]
        decisive = [*self.tensors.values()] if self._made else numbers  # not the indices by which weights are picked
        fixed = bool(decisive) and all(context.origin(tensor) == "weights" for tensor in decisive)
        for tensor, axes, names in zip(self.outputs, self._axes, self._sources, strict=True):
            features = [self.tensors[name] for name in names if context.is_features(self.tensors[name])]
            origins = {context.origin(each) for each in features} or {"constant"}
            origin = "weights" if fixed else "made" if self._made or origins == {"made"} else None
            labels = [axes.get(axis) for axis in range(tensor.ndim)]
            context.label(tensor, labels, "constant" if origins == {"constant"} and not origin else origin)


def _number(axis: int, tensor: Tensor, what: str) -> int:
    if not -tensor.ndim <= axis < tensor.ndim:
        raise IndexError(f"{what}, of shape {tuple(tensor.shape)}, has no axis {axis}")
    return axis % tensor.ndim


def _check(one: int, two: int, first: str, second: str) -> None:
    if one != two:
        raise ValueError(f"{first} has {one} units, and {second} {two}")


R = TypeVar("R", bound=Callable[[Operation], Any])


@overload
def register_rule(op: Any, *, replace: bool = ...) -> Callable[[R], R]: ...
@overload
def register_rule(op: Any, rule: R, *, replace: bool = ...) -> R: ...
def register_rule(op: Any, rule: R | None = None, *, replace: bool = False) -> Any:
    """Tell `slimify` and `plan` what an operation does with the units on the axes of its tensors.

    An operation without a rule keeps at full width what it meets. One with torch's tag `pointwise` needs none.

    Args:
        op: the operation's name, such as "mylib::attend", or the operation, such as `torch.ops.mylib.attend`. The rule
            holds for all of its overloads and for its in-place counterpart.
        rule: a function of one `slimmable.rules.Operation`; without it, the decorator of such a function is returned.
        replace: take the place of a rule that the operation has already, also of one of slimmable's own.

    Raises: UsageError: if `op` is no operation, or has a rule and `replace` is not set. RuleError: from `slimify`, if
        a rule raises, or names an axis that a tensor does not have.

    >>> @torch.library.custom_op("doctest::scale", mutates_args=())
    ... def scale(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    ...     return x * gain
    >>> _ = scale.register_fake(lambda x, gain: torch.empty_like(x))
    >>> @register_rule("doctest::scale")
    ... def rule(op):
    ...     op.keeps("x")
    ...     op.same("x", -1, "gain", 0)
    """
    check_flags("register_rule", replace=replace)
    name = _name(op)
    if rule is None:
        return lambda function: register_rule(op, function, replace=replace)
    if not callable(rule) or isinstance(rule, type):
        raise UsageError(f"the rule of {name} is {rule!r}; it must be a function of one Operation")
    key = name.removeprefix("aten::")
    if key in RULES and not replace:
        raise UsageError(f"{name} has a rule already; pass replace=True to use this one instead")
    described = f"{getattr(rule, '__module__', '')}.{getattr(rule, '__qualname__', repr(rule))}"

    def apply(context: Context, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        operation = Operation(context, args, kwargs, out)
        try:
            rule(operation)
        except Exception as error:
            if described.startswith("slimmable."):
                raise  # the trace pins what the operation meets
            raise RuleError(
                f"the rule {described} of {name} failed in module {context.module or '(the model itself)'!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        operation._finish()

    RULES[key] = apply
    return rule


def _name(op: Any) -> str:
    """Return the name of an operation, without that of an overload and the underscore of an in-place one."""
    op = getattr(op, "_opoverload", op)  # of a function decorated by `torch.library.custom_op`
    name = getattr(op, "_qualified_op_name", None) or getattr(op, "_name", op)
    space, _, own = name.partition(".")[0].rstrip("_").partition("::") if isinstance(name, str) else ("", "", "")
    if not own:
        raise UsageError(f'{op!r} is no operation; pass a name such as "mylib::attend" or torch.ops.mylib.attend')
    if space == "aten" and not (hasattr(torch.ops.aten, own) or hasattr(torch.ops.aten, f"{own}_")):
        raise UsageError(f"torch has no operation {space}::{own}")
    return f"{space}::{own}"
