"""Rules of operations that treat channels one by one or as a whole, or create tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from slimmable.analysis._context import Context, Rule, Rules, tensors
from slimmable.analysis.integers import TracedInt
from slimmable.analysis.labels import Ids

Args = Sequence[Any]
Kwargs = dict[str, Any]

RULES = Rules()


def unknown(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Pin all axes of all inputs."""
    ctx.pin_all(tensors((args, kwargs)), "has no rule")
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


@RULES.of(
    "clone", "detach", "alias", "_to_copy", "copy", "lift_fresh", "native_dropout", "where", "masked_fill", "lerp",
    "hardswish", "hardsigmoid", "hardtanh", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like",
    "randn_like", "bernoulli", "bernoulli_p", "_prelu_kernel", "complex", "fill", "zero", "nan_to_num", "addcmul",
    "addcdiv", "glu_jvp", "contiguous", "tril", "triu", "rrelu_with_noise", "_conj", "resolve_conj", "isnan", "isinf",
    "uniform", "normal", "exponential", "dropout", "log_sigmoid_forward", "conj_physical", "_conj_physical",
    "leaky_relu", "elu", "celu", "selu",  # some of these lack torch's tag up to 2.11
)  # fmt: skip
def pointwise(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Broadcast: aligned axes shrink together."""
    operands = [tensor for tensor in tensors((args, kwargs)) if tensor.ndim]
    origin = _origin_after(ctx, args, operands)
    for result in tensors(out):
        if result.ndim == 0:
            continue
        joined: list[Ids | None] = []
        for axis in range(1, result.ndim + 1):
            aligned = [t for t in operands if t.ndim >= axis and t.shape[-axis] == result.shape[-axis] != 1]
            labels = [ctx.axes(tensor)[-axis] for tensor in aligned]
            ids = labels[0] if labels else None
            for other in labels[1:]:
                ids = ctx.merge(ids, other)
            if ids is not None and ctx.operation not in ("mul", "div"):
                features = [
                    own for t, own in zip(aligned, labels, strict=True) if own is not None and ctx.is_features(t)
                ]
                if len(features) > 1:
                    ctx.sums.append(ids)
                    if ctx.operation == "add" and not all(_equal([own], [features[0]]) for own in features):
                        ctx.residuals.append(ids)
            joined.append(ids)
        ctx.label(result, joined[::-1], origin)


@RULES.of("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "flip", "roll", "logcumsumexp")
def along_an_axis(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Keep the labels; an axis on which the order of units matters cannot shrink."""
    axes = ctx.axes(args[0])
    if "softmax" not in ctx.operation:
        dims = args[2] if ctx.operation == "roll" else args[1]
        for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
            ctx.pin(axes[dim], "the order of the units matters")
    else:
        ctx.meet(axes[args[1]])
    ctx.label(out, axes, ctx.origin(args[0]))


@RULES.of(
    "mean", "sum", "var", "std", "var_mean", "amax", "amin", "linalg_vector_norm", "norm", "logsumexp", "prod", "max",
    "min", "any", "all", "argmax", "argmin", "std_mean", "count_nonzero", "nansum",
)  # fmt: skip
def reduce(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Drop the reduced axes, which an operation that returns indices pins."""
    source = args[0]
    if ctx.operation in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        return pointwise(ctx, args, kwargs, out)
    results = tensors(out)
    position = 2 if ctx.operation in ("linalg_vector_norm", "norm") else 1
    given = args[position] if len(args) > position else kwargs.get("dim")
    every = given is None or given == []
    dims = range(source.ndim) if every else given if isinstance(given, (list, tuple)) else [given]
    reduced = {dim % source.ndim for dim in dims} if source.ndim else set()
    axes = ctx.axes(source)
    indices = ctx.operation.startswith("arg") or (ctx.operation in ("max", "min") and len(results) == 2)
    for dim in reduced if ctx.origin(source) != "weights" else ():
        ctx.meet(axes[dim])
    for dim in reduced if indices else ():
        ctx.pin(axes[dim], "a unit's number is used")
    for result in results:
        keep = result.ndim == source.ndim
        left = [None if dim in reduced else ids for dim, ids in enumerate(axes) if keep or dim not in reduced]
        ctx.label(result, left, ctx.origin(source))
    return None


def _spatial(dims: int) -> Rule:
    """Return the rule of operations that mix neighbours along the last `dims` axes; the others keep their labels."""

    def rule(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
        axes = ctx.axes(args[0])
        front = len(axes) - dims
        for ids in axes[front:]:
            ctx.pin(ids, "neighbouring units are mixed")
        for result in tensors(out):
            ctx.label(result, axes[:front] + [None] * dims, ctx.origin(args[0]))

    return rule


for _dims in (1, 2, 3):
    _kinds = (
        "max_pool{}d_with_indices", "avg_pool{}d", "_adaptive_avg_pool{}d", "adaptive_avg_pool{}d",
        "adaptive_max_pool{}d", "reflection_pad{}d", "replication_pad{}d", "max_pool{}d", "upsample_nearest{}d",
        "_upsample_nearest_exact{}d", "fractional_max_pool{}d",
    )  # fmt: skip
    RULES.of(*(kind.format(_dims) for kind in _kinds))(_spatial(_dims))
RULES.of("upsample_linear1d")(_spatial(1))
RULES.of(
    "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "grid_sampler_2d", "mkldnn_max_pool2d", "mkldnn_adaptive_avg_pool2d",
)(_spatial(2))  # fmt: skip
RULES.of("upsample_trilinear3d", "grid_sampler_3d")(_spatial(3))


@RULES.of("constant_pad_nd")
def pad(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Padding adds units before and after those of an axis, and is always kept."""
    axes = ctx.axes(args[0])
    amounts = [int(amount) for amount in args[1]]
    for i in range(len(amounts) // 2):
        ids, (before, after) = axes[-1 - i], amounts[2 * i : 2 * i + 2]
        if ids is None or before == after == 0:
            continue
        if min(before, after) < 0:
            ctx.pin(ids, "is cropped")
            axes[-1 - i] = None
            continue
        new = [ctx.labels.fresh(before), ids, ctx.labels.fresh(after)]
        for padding in (new[0], new[2]):
            ctx.pin(padding, "is padding")
        axes[-1 - i] = np.concatenate(new)
    ctx.label(out, axes, ctx.origin(args[0]))


@RULES.of("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """A transform mixes the units along its axes."""
    axes = ctx.axes(args[0])
    for dim in args[1]:
        ctx.pin(axes[dim], "is transformed")
        axes[dim] = None
    ctx.label(out, axes, ctx.origin(args[0]))


@RULES.of(
    "zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full",
    "scalar_tensor", "new_empty_strided", "empty_strided", "empty_permuted", "randint", "randperm", "linspace", "eye",
    "arange",
)  # fmt: skip
def factory(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """An axis of a new tensor follows the size that was asked for, unless values depend on their position."""
    values = ctx.operation in ("randperm", "linspace", "eye", "arange")
    asked = ctx.call.name.removeprefix("new_") == ctx.operation.removeprefix("new_")
    given = tree_leaves((list(ctx.call.args), dict(ctx.call.kwargs))) if asked else []
    traced = {int(size): size for size in given if isinstance(size, TracedInt)}
    axes: list[Ids | None] = []
    for units in out.shape:
        size = traced.get(int(units))
        ids: Ids | None = None
        if size is not None:
            if not values:
                ids = size.expression.value if size.expression.kind == "size" else ctx.labels.fresh(int(units))
            ctx.constrain(size, ids, int(units))
        axes.append(ids)
    ctx.label(out, axes, "constant")
