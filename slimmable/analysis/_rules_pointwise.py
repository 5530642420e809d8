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


def unknown(ctx: Context, args: Args, kwargs: Kwargs, out: Any, why: str = "has no rule") -> None:
    """Pin all axes of all inputs."""
    ctx.pin_all(tensors((args, kwargs)), why)
    for tensor in tensors(out):
        ctx.label(tensor, [None] * tensor.ndim)


_AFFINE = {"add", "sub", "mul", "div", "rsub", "neg"}
_IDENTITY = {"clone", "detach", "alias", "_to_copy", "copy", "lift_fresh", "dropout", "native_dropout"}


def origin_after(ctx: Context, operands: Sequence[Tensor]) -> str | None:
    """Return the origin of a pointwise result: that of its operands, if the operation is affine and they agree."""
    origins = {ctx.origin(tensor) for tensor in operands}
    if origins == {"weights"}:
        return "weights"
    if ctx.operation not in _AFFINE | _IDENTITY:
        return None
    channels = {
        ctx.origin(tensor)
        for tensor in operands
        if ctx.origin(tensor) not in ("weights", "spread") and any(ids is not None for ids in ctx.axes(tensor))
    }
    if channels <= {"mixed", "normed"} and channels:
        return "normed" if {"normed", "spread"} & (channels | origins) else "mixed"
    return None


@RULES.of(
    "clone", "detach", "alias", "_to_copy", "copy", "lift_fresh", "native_dropout", "where", "masked_fill", "lerp",
    "hardswish", "hardsigmoid", "hardtanh", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like",
    "randn_like", "bernoulli", "bernoulli_p", "_prelu_kernel", "complex", "fill", "zero", "nan_to_num", "addcmul",
    "addcdiv", "glu_jvp", "contiguous", "floor_divide", "polar", "rrelu_with_noise", "_conj", "resolve_conj", "isnan", "isinf",
    "uniform", "normal", "exponential", "dropout", "log_sigmoid_forward", "conj_physical", "_conj_physical",
    "leaky_relu", "elu", "celu", "selu",  # some of these lack torch's tag up to 2.11
)  # fmt: skip
def pointwise(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Broadcast: aligned axes shrink together."""
    operands = [tensor for tensor in tensors((args, kwargs)) if tensor.ndim]
    for result in tensors(out):
        if result.ndim:
            ctx.label(result, broadcast(ctx, operands, result.shape), origin_after(ctx, operands))


def broadcast(ctx: Context, operands: Sequence[Tensor], shape: Sequence[int]) -> list[Ids | None]:
    """Merge the aligned axes of tensors that are broadcast to this shape, and return its labels."""
    joined: list[Ids | None] = []
    for axis in range(1, len(shape) + 1):
        aligned = [t for t in operands if t.ndim >= axis and t.shape[-axis] == shape[-axis] != 1]
        labels = [ctx.axes(tensor)[-axis] for tensor in aligned]
        ids = labels[0] if labels else None
        for other in labels[1:]:
            ids = ctx.merge(ids, other)
        if ids is not None and ctx.operation not in ("mul", "div"):
            features = [t for t, own in zip(aligned, labels, strict=True) if own is not None]
            if sum(ctx.origin(tensor) != "weights" for tensor in features) > 1:
                ctx.sums.append(ids)
        joined.append(ids)
    return joined[::-1]


@RULES.of("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "flip", "roll", "logcumsumexp")
def along_an_axis(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Keep the labels; an axis on which the order of units matters cannot shrink."""
    axes = ctx.axes(args[0])
    if "softmax" not in ctx.operation:
        dims = kwargs.get("dims", args[2] if len(args) > 2 else []) if ctx.operation == "roll" else args[1]
        every = ctx.operation == "roll" and not dims  # as one flat axis
        for dim in range(len(axes)) if every or not axes else dims if isinstance(dims, (list, tuple)) else [dims]:
            ctx.pin(axes[dim], "the order of the units matters")
    else:
        ctx.meet(axes[args[1]])
    ctx.label(out, axes)


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
            ctx.label(result, axes[:front] + [None] * dims)

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
    "mkldnn_max_pool2d", "mkldnn_adaptive_avg_pool2d",
)(_spatial(2))  # fmt: skip
RULES.of("upsample_trilinear3d")(_spatial(3))


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
    ctx.label(out, axes)


@RULES.of("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """A transform mixes the units along its axes."""
    axes = ctx.axes(args[0])
    for dim in args[1]:
        ctx.pin(axes[dim], "is transformed")
        axes[dim] = None
    ctx.label(out, axes)


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
    ctx.label(out, axes)
