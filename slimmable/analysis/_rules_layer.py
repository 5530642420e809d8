"""Rules of operations that mix channels by weights, and of group norms."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from slimmable.analysis._context import Context, rule_of, tensors
from slimmable.analysis._rules_pointwise import Args, Kwargs
from slimmable.analysis.integers import TracedInt
from slimmable.analysis.labels import Ids, spread


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
