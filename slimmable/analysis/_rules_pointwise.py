"""Rules of operations that treat channels one by one or as a whole, or create tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from slimmable.analysis._context import Context, arguments, rule_of, tensors
from slimmable.analysis.integers import TracedInt
from slimmable.analysis.labels import Ids

Args = Sequence[Any]
Kwargs = dict[str, Any]


def unknown(ctx: Context, args: Args, kwargs: Kwargs, out: Any, why: str = "has no rule") -> None:
    """Pin all axes of all inputs."""
    ctx.refuse(tensors((args, kwargs)), why)
    for tensor in tensors(out):
        ctx.label(tensor, [None] * tensor.ndim)


_RECTIFIERS = {
    "relu", "gelu", "silu", "mish", "hardswish", "leaky_relu", "_prelu_kernel", "rrelu_with_noise", "elu", "celu",
    "selu", "threshold",
}  # fmt: skip


def _equal(first: Sequence[Ids | None], second: Sequence[Ids | None]) -> bool:
    """Tell whether the axes of two tensors have the very same labels, not just merged ones."""
    return len(first) == len(second) and all(
        a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in zip(first, second, strict=True)
    )


def _origin_after(ctx: Context, args: Args, operands: Sequence[Tensor]) -> str | None:
    """Return the origin of a pointwise result, see `Context`."""
    if operands and all(ctx.origin(tensor) == "weights" for tensor in operands):
        return "weights"
    features = [tensor for tensor in operands if ctx.is_features(tensor)]
    if not features or ctx.operation.endswith("_like"):
        return "constant"
    first, *others = features
    gates_itself = any(_equal(ctx.axes(first), ctx.axes(other)) for other in others)  # x * sigmoid(x)
    low, high = [*args[1:3], None, None][:2] if ctx.operation in ("hardtanh", "clamp", "clamp_min") else (None, None)
    numbers = not any(isinstance(end, Tensor) for end in (low, high))
    from_zero = numbers and low == 0 and (high is None or high > 1)  # not [0, 1], which bounds an image
    if ctx.operation in _RECTIFIERS or from_zero or (ctx.operation == "mul" and gates_itself):
        return None
    origins = {ctx.origin(tensor) for tensor in features}
    return "made" if origins == {"made"} or (ctx.operation == "add" and "made" in origins) else None


@rule_of(
    "detach", "alias", "_to_copy", "copy", "lift_fresh", "native_dropout", "where", "masked_fill", "hardswish",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli", "_prelu_kernel",
    "complex", "fill", "zero", "rrelu_with_noise", "_conj", "polar", "floor_divide", "uniform", "normal", "exponential",
    "log_sigmoid_forward", "hardsigmoid", "hardtanh", "_conj_physical", "leaky_relu", "elu", "celu",
)  # fmt: skip
def pointwise(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Broadcast: aligned axes shrink together. Listed are the operations without torch's tag, some only up to 2.11."""
    operands = [tensor for tensor in tensors((args, kwargs)) if tensor.ndim]
    origin = _origin_after(ctx, args, operands)
    for result in (each for each in tensors(out) if each.ndim):
        joined: list[Ids | None] = []
        for axis in range(1, result.ndim + 1):
            aligned = [t for t in operands if t.ndim >= axis and t.shape[-axis] == result.shape[-axis] != 1]
            labels = [ctx.axes(tensor)[-axis] for tensor in aligned]
            ids = labels[0] if labels else None
            for other in labels[1:]:
                ids = ctx.merge(ids, other)
            if ids is not None and ctx.operation not in ("mul", "div"):
                made = [own for t, own in zip(aligned, labels, strict=True) if own is not None and ctx.is_features(t)]
                if len(made) > 1:
                    ctx.sums.append(ids)
                    if ctx.operation == "add" and not all(_equal([own], [made[0]]) for own in made):
                        ctx.residuals.append(ids)
            joined.append(ids)
        ctx.label(result, joined[::-1], origin)


_NUMBERING = {"max", "min", "median", "nanmedian", "mode", "kthvalue", "topk"}  # their second result holds indices


@rule_of(
    "mean", "sum", "var", "std", "var_mean", "amax", "amin", "linalg_vector_norm", "norm", "logsumexp", "prod", "max",
    "min", "any", "all", "argmax", "argmin", "std_mean", "count_nonzero", "nansum", "aminmax", "median", "nanmedian",
    "mode", "kthvalue", "topk",
)  # fmt: skip
def reduce(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Drop the reduced axes; indices, if any, number their units."""
    source = args[0]
    if ctx.operation in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        return pointwise(ctx, args, kwargs, out)
    results = tensors(out)
    given = arguments(ctx.schema, args, kwargs).get("dim")
    dims = [given] if isinstance(given, int) else given or range(source.ndim)
    reduced = {dim % source.ndim for dim in dims} if source.ndim else set()
    axes = ctx.axes(source)
    for dim in reduced if ctx.origin(source) != "weights" else ():
        ctx.meet(axes[dim])
    if ctx.operation == ctx.call.name in ("kthvalue", "topk"):
        ctx.constrain(ctx.call.argument(1, "k"), None, int(args[1]))
    for result in results:
        keep = result.ndim == source.ndim
        left = [None if dim in reduced else ids for dim, ids in enumerate(axes) if keep or dim not in reduced]
        ctx.label(result, left, ctx.origin(source))
    indices = results[1:] if ctx.operation in _NUMBERING else results if ctx.operation.startswith("arg") else []
    for result in indices:
        ctx.number(result, [axes[dim] for dim in reduced])
    return None


@rule_of("constant_pad_nd")
def pad(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Padding adds units before and after those of an axis, and is always kept."""
    axes = ctx.axes(args[0])
    amounts = [int(amount) for amount in args[1]]
    for i in range(len(amounts) // 2):
        ids, (before, after) = axes[-1 - i], amounts[2 * i : 2 * i + 2]
        if min(before, after) < 0:
            ctx.pin(ids, "is cropped")
            axes[-1 - i] = None
        elif ids is not None and before + after:
            first, last = ctx.labels.fresh(before), ctx.labels.fresh(after)
            ctx.pin(np.concatenate([first, last]), "is padding")
            axes[-1 - i] = np.concatenate([first, ids, last])
    ctx.label(out, axes, ctx.origin(args[0]))


@rule_of(
    "zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full",
    "scalar_tensor", "new_empty_strided", "empty_strided", "empty_permuted", "randint", "randperm", "linspace",
    "logspace", "eye", "arange",
)  # fmt: skip
def factory(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """An axis of a new tensor follows the size that was asked for; if values depend on their position, in order."""
    asked = ctx.call.name.removeprefix("new_") == ctx.operation.removeprefix("new_")
    given = tree_leaves((list(ctx.call.args), dict(ctx.call.kwargs))) if asked else []
    if asked and ctx.operation == "arange":
        given = [_steps(ctx.call.args, ctx.call.kwargs)]
    traced = {int(size): size for size in given if isinstance(size, TracedInt)}
    axes: list[Ids | None] = []
    for units in out.shape:
        size = traced.get(int(units))
        ids: Ids | None = None
        if size is not None:
            if ctx.operation != "randperm":
                ids = size.expression.value if size.expression.kind == "size" else ctx.labels.fresh(int(units))
            ctx.constrain(size, ids, int(units))
            if ids is not None and ctx.operation in ("linspace", "logspace", "eye", "arange"):
                ctx.labels.order(ids)
        axes.append(ids)
    ctx.label(out, axes, "constant")


def _steps(given: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Return how many numbers `arange` makes of these arguments."""
    names = ("start", "end", "step") if len(given) > 1 else ("end",)
    ends = {"start": 0, "step": 1, **named, **dict(zip(names, given, strict=False))}
    start, end, step = ends["start"], ends["end"], ends["step"]
    return end if (start, step) == (0, 1) else -((start - end) // step)
