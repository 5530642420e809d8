"""Rules of arithmetic: on channels one by one or as a whole, by weights, in group norms; and of new tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from slimmable.analysis._context import Context, arguments, rule_of, tensors
from slimmable.analysis.integers import TracedInt
from slimmable.analysis.labels import Ids, spread

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


# -- channels are mixed by weights, or normalized in groups
@rule_of("mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv", "_sparse_addmm")
def product(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Matrix product, to which an addend may be added."""
    *addends, first, second = args
    a, b = ctx.axes(first), ctx.axes(second)
    weights = [ctx.origin(tensor) == "weights" for tensor in (first, second)]
    ctx.multiply(int(out.numel()) * int(first.shape[-1]), [*a, b[-1] if len(b) > 1 else None])
    ctx.contract(first, a[-1], second, b[-2 if len(b) > 1 else -1])
    batch = [ctx.merge(x, y) for x, y in zip(a[:-2], b[:-2], strict=True)]
    result = [*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else [])]
    moved = ctx.origin(second if ctx.is_features(second) else first)  # attention weights move the values, for one
    origin = "weights" if all(weights) else "made" if any(weights) else moved
    if origin == "made" and any(weights):
        for ids in (b[-1:] if len(b) > 1 else []) if weights[1] else a[-2:-1]:
            ctx.produce(ids)
    for bias in addends if kwargs.get("beta") != 0 else ():
        for i, ids in enumerate(reversed(ctx.axes(bias)), 1):
            if bias.shape[-i] != 1:
                result[-i] = ctx.merge(result[-i], ids)
    ctx.label(out, result, origin)


@rule_of("convolution", "_convolution")
def convolution(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """A convolution is slimmed within each of its groups; a depthwise one loses whole groups."""
    (source, weight, bias), transposed, groups = args[:3], bool(args[6]), int(args[8])
    x, w = ctx.axes(source), ctx.axes(weight)
    space = list(x[2:])
    strides, paddings = (list(sizes) * (1 if len(sizes) > 1 else len(space)) for sizes in args[3:5])  # "valid" is [0]
    for i, (kernel, stride, padding) in enumerate(zip(weight.shape[2:], strides, paddings, strict=True)):
        if (kernel, stride, padding) == (1, 1, 0):  # units along this axis are not mixed
            continue
        ids = space[i]
        if ids is not None and out.shape[2 + i] == source.shape[2 + i]:  # attention over neighbouring channels
            ctx.labels.order(ids)
            ctx.meet(ids)
        else:
            ctx.pin(ids, "is a spatial axis of a convolution")
            space[i] = None
    for ids in w[2:]:
        ctx.pin(ids, "is the kernel of a convolution")
    inner, outer = (w[0], w[1]) if transposed else (w[1], w[0])
    channels, made = int(source.shape[1]), int(out.shape[1])
    if groups == 1:
        ctx.consume(x[1], inner)
        result = outer
    else:
        result = _grouped(ctx, x[1], w, groups, channels, made, transposed)
    ctx.produce(result)
    positions = (source if transposed else out).numel() // (channels if transposed else made)
    ctx.multiply(int(positions) * int(weight.numel()), [x[0], *w, *space])
    if bias is not None:
        result = ctx.merge(result, ctx.axes(bias)[0])
    ctx.label(out, [x[0], result, *space], "made")


def _grouped(
    ctx: Context, x: Ids | None, w: Sequence[Ids | None], groups: int, channels: int, made: int, transposed: bool
) -> Ids | None:
    each_in, each_out = channels // groups, made // groups
    if transposed:
        x, inner_each = ctx.merge(x, w[0]), None
        outer = None if w[1] is None else spread(w[1], groups, 1)
    else:
        inner_each, outer = w[1], w[0]
    given = ctx.call.argument(6, "groups")
    follows = isinstance(given, TracedInt) and given.expression.kind != "constant"
    if each_in == 1 and each_out >= 1 and follows and x is not None:  # depthwise
        made_of = spread(x, 1, each_out)
        outer = made_of if outer is None or transposed else outer  # transposed, all groups share the output axis
        ctx.labels.merge(made_of, outer)
        ctx.consumed.append(x)
        ctx.constrain(given, x, channels)
        return outer
    ctx.constrain(given, None, groups)
    if x is not None:
        block = x.reshape(groups, each_in)
        ctx.labels.merge_rows(block.T)
        if each_in == 1:
            ctx.pin(x, "every group reads one unit")
        elif transposed:
            ctx.consume(x, x)
        else:
            ctx.consume(block[0], inner_each)
    else:
        ctx.consume(None, inner_each)
    if outer is not None:
        ctx.labels.merge_rows(outer.reshape(groups, each_out).T)
        if each_out == 1:
            ctx.pin(outer, "every group makes one unit")
    return outer


@rule_of("embedding")
def embedding(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """A table of vectors makes their units; which rows are read depends on the data."""
    rows, units = ctx.axes(args[0])
    ctx.pin(rows, "is indexed")
    ctx.produce(units)
    ctx.label(out, [*ctx.axes(args[1]), units], "made")


def normalized_shape(ctx: Context, source: Tensor, shape: Sequence[Any]) -> None:
    """Require the sizes passed to a layer or RMS norm to follow the last axes."""
    for i, size in enumerate(reversed(shape), 1):
        if source.shape[-i] > 1:
            ctx.constrain(size, ctx.axes(source)[-i], int(source.shape[-i]))


@rule_of("native_group_norm")
def group_norm(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Channels are (groups, n): whole groups go if every width keeps a whole number of them, else units of each."""
    source, groups = args[0], int(args[6])
    axes = ctx.axes(source)
    for tensor in tensors(args[1:3]):
        axes[1] = ctx.merge(axes[1], ctx.axes(tensor)[0])
    if axes[1] is not None and groups > 1:
        given = ctx.call.argument(1, "num_groups")
        shape = (groups, len(axes[1]) // groups)
        carried = ctx.split(axes[1], shape, [groups if given is None else given, None])
        ctx.constrain(given, carried[0], groups)
    for ids in axes[1:]:
        ctx.meet(ids)
    ctx.label(tensors(out)[0], axes, ctx.origin(source))


def attention(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Scaled dot-product attention as one operation: batches and heads agree, queries and keys share their units."""
    query, key, value = args[:3]
    q, k, v = ctx.axes(query), ctx.axes(key), ctx.axes(value)
    batch = []
    for i in range(query.ndim - 2):
        alike = query.shape[i] == key.shape[i] == value.shape[i]
        for ids in () if alike else (q[i], k[i], v[i]):  # grouped queries
            ctx.pin(ids, "queries and keys have different numbers of heads")
        batch.append(ctx.merge(ctx.merge(q[i], k[i]), v[i]) if alike else None)
    inner = ctx.merge(q[-1], k[-1])
    ctx.meet(inner)
    if inner is not None:
        ctx.contractions.append((ctx.module, inner))
    ctx.merge(k[-2], v[-2])
    if args[5] if len(args) > 5 else kwargs.get("is_causal"):
        for ids in (q[-2], k[-2]):
            ctx.pin(ids, "the order of the units matters")
    ctx.attended.extend(ids for ids in (*k, *v) if ids is not None)
    for axis in (q[-1], v[-1]):  # queries times keys, then the resulting weights times values
        macs = int(out.numel() // out.shape[-1]) * int(key.shape[-2])
        ctx.multiply(macs * int((query if axis is q[-1] else value).shape[-1]), [*batch, q[-2], k[-2], axis])
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if isinstance(mask, Tensor):
        for i, ids in enumerate(reversed([*batch, q[-2], k[-2]][-mask.ndim :]), 1):
            if mask.shape[-i] != 1:
                ctx.merge(ids, ctx.axes(mask)[-i])
    ctx.label(out, [*batch, q[-2], v[-1]], ctx.origin(value))
