"""The registration of rules by the names of their operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch

from slimmable.analysis.trace import RULES, Context
from slimmable.errors import RuleError, UsageError
from slimmable.rules._operation import Operation

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

    Raises:
        UsageError: if `op` is no operation, or has a rule and `replace` is not set.

    A rule that raises, or names an axis that a tensor does not have, stops `slimify` with a `RuleError`.

    >>> @torch.library.custom_op("doctest::scale", mutates_args=())
    ... def scale(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    ...     return x * gain
    >>> _ = scale.register_fake(lambda x, gain: torch.empty_like(x))
    >>> @register_rule("doctest::scale")
    ... def rule(op):
    ...     op.keeps("x")
    ...     op.same("x", -1, "gain", 0)
    """
    name = _name(op)
    if rule is None:
        return lambda function: register_rule(op, function, replace=replace)
    if not callable(rule):
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
