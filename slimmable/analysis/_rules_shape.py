"""Rules of operations that move, fold, split, join or index axes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from slimmable.analysis._context import Context, dim_of, rule_of
from slimmable.analysis._rules_arithmetic import Args, Kwargs, unknown
from slimmable.analysis.labels import Ids, spread


def _blocks(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the shortest runs of source and target axes with equal products; axes of size 1 belong to no run."""
    left = [i for i, n in enumerate(source) if n != 1]
    right = [i for i, n in enumerate(target) if n != 1]
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        m, n = source[a[0]], target[b[0]]
        while m != n:
            if m < n:
                a.append(left.pop(0))
                m *= source[a[-1]]
            else:
                b.append(right.pop(0))
                n *= target[b[-1]]
        yield a, b


def _size_arguments(ctx: Context, names: set[str], out: Tensor) -> list[Any]:
    """Return the size argument of each output axis as the caller passed it, or None if there was none."""
    nothing: list[Any] = [None] * out.ndim
    if ctx.call.name not in names:
        return nothing
    if ctx.call.name.endswith("_as"):
        return [ctx.size(ctx.call.args[1], axis) for axis in range(out.ndim)]
    given = list(ctx.call.args[1:]) + [v for k, v in ctx.call.kwargs.items() if k in ("size", "shape", "sizes")]
    if ctx.call.name == "unflatten":
        dim, sizes = given if len(given) == 2 else (ctx.call.kwargs["dim"], given[0])
        front = int(dim) % (out.ndim - len(sizes) + 1)
        return nothing[:front] + list(sizes) + nothing[front + len(sizes) :]
    sizes = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    return sizes if len(sizes) == out.ndim and all(isinstance(size, int) for size in sizes) else nothing


@rule_of("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "unsqueeze", "squeeze")
def view(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Fold and split blocks of axes; those of size 1 come and go."""
    source = args[0]
    sizes = _size_arguments(ctx, {"view", "reshape", "unflatten", "view_as", "reshape_as"}, out)
    before, after = ctx.axes(source), [None] * out.ndim  # type: list[Ids | None], list[Ids | None]
    if out.dtype != source.dtype or (out.numel() == 0 and "squeeze" not in ctx.operation):  # blocks cannot be told
        return unknown(ctx, args, kwargs, out)
    shape = getattr(source, "slim_shape", source.shape)  # that before squeeze_ or unsqueeze_
    for a, b in _blocks(shape, out.shape):
        ids = ctx.fold([before[i] for i in a], [shape[i] for i in a])
        if ids is not None:
            parts = [ids] if len(b) == 1 else ctx.split(ids, [out.shape[i] for i in b], [sizes[i] for i in b])
            for axis, labels in zip(b, parts, strict=True):
                after[axis] = labels
    for axis, size in enumerate(sizes):
        if size is not None and int(size) != -1 and out.shape[axis] > 1:
            ctx.constrain(size, after[axis], out.shape[axis])
    ctx.label(out, after, ctx.origin(source))
    return None


@rule_of("permute", "transpose", "t")
def permute(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    axes = ctx.axes(args[0])
    if ctx.operation == "permute":
        axes = [axes[dim] for dim in args[1]]
    elif ctx.operation == "transpose" and axes:
        a, b = args[1:3]
        axes[a], axes[b] = axes[b], axes[a]
    else:
        axes.reverse()
    ctx.label(out, axes, ctx.origin(args[0]))


@rule_of("expand", "repeat")
def expand(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Repeat along an axis: a single unit becomes any number of them, several are tiled."""
    source = args[0]
    sizes = _size_arguments(ctx, {"expand", "expand_as", "broadcast_to", "repeat"}, out)
    axes = [None] * (out.ndim - source.ndim) + ctx.axes(source)
    old = [1] * (out.ndim - source.ndim) + list(source.shape)
    for axis, size in enumerate(sizes):
        if old[axis] == out.shape[axis]:
            continue
        ids = axes[axis]
        if ids is not None:
            axes[axis] = spread(ids, out.shape[axis] // old[axis], 1)
        elif old[axis] == 1:
            axes[axis] = ctx.labels.fresh(out.shape[axis])
            if size is not None and int(size) != -1:
                ctx.constrain(size, axes[axis], out.shape[axis])
    constant = all(ids is None for ids in ctx.axes(source)) and ctx.origin(source) != "weights"
    ctx.label(out, axes, "constant" if constant else ctx.origin(source))


@rule_of("cat", "stack")
def join(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Join along an axis, or along a new one; pieces without labels keep their size."""
    stacked = ctx.operation == "stack"
    pieces = [piece for piece in args[0] if stacked or piece.ndim == out.ndim]
    dim = dim_of(ctx, args, kwargs, out.ndim)
    rows = [ctx.axes(piece) for piece in pieces]
    along = [] if stacked else [row.pop(dim) for row in rows]
    axes = rows[0]
    for row in rows[1:]:
        axes = [ctx.merge(first, second) for first, second in zip(axes, row, strict=True)]
    axes.insert(dim, None)
    if any(ids is not None for ids in along):
        for i, piece in enumerate(pieces):
            if along[i] is None:
                along[i] = ctx.labels.fresh(piece.shape[dim])
                ctx.pin(along[i], "is joined as it is")
        axes[dim] = np.concatenate([ids for ids in along if ids is not None])
    fixed = all(ctx.origin(piece) == "weights" for piece in pieces)
    origins = {ctx.origin(piece) for piece in pieces if ctx.is_features(piece)} or {"weights" if fixed else "constant"}
    ctx.label(out, axes, origins.pop() if len(origins) == 1 else None)


@rule_of("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes", "split_copy")
def split(ctx: Context, args: Args, kwargs: Kwargs, out: Sequence[Tensor]) -> None:
    """Cut along an axis: equal pieces shrink alike, unequal ones each by its own size."""
    source = args[0]
    dim = dim_of(ctx, args, kwargs, source.ndim)
    axes = ctx.axes(source)
    ids = axes[dim]
    pieces: list[Ids | None] = [None] * len(out)
    if ids is not None:
        cuts = np.split(ids, np.cumsum([piece.shape[dim] for piece in out])[:-1])
        pieces = list(cuts)
        alike = len(set(map(len, cuts))) == 1
        if not alike:
            ctx.labels.roles.extend(cuts)
        for other in cuts[1:] if alike else ():
            ctx.labels.merge(cuts[0], other)
        if ctx.call.name.removeprefix("unsafe_") in ("split", "split_with_sizes"):
            given = ctx.call.args[1] if len(ctx.call.args) > 1 else next(iter(ctx.call.kwargs.values()))
            sizes = list(given) if isinstance(given, (list, tuple)) else [given] * len(out)
            for size, part in zip(sizes, cuts, strict=False):
                ctx.constrain(size, part if len(part) > 1 else None, len(part))
        elif ctx.call.name == "chunk":
            for part in cuts[:-1]:  # each but the last has ceil(size / chunks) units
                ctx.constrain(-(-ctx.size(source, dim) // len(out)), part, len(part))
        elif not alike:
            ctx.pin(ids, f"is cut into {[len(part) for part in cuts]}")
    for piece, labels in zip(out, pieces, strict=True):
        ctx.label(piece, [labels if i == dim else other for i, other in enumerate(axes)], ctx.origin(source))


@rule_of("glu")
def glu(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """The second half of an axis gates the first."""
    axes = ctx.axes(args[0])
    dim = dim_of(ctx, args, kwargs, out.ndim)
    ids = axes[dim]
    if ids is not None:
        first, second = np.split(ids, 2)
        axes[dim] = ctx.merge(first, second)
    ctx.label(out, axes, ctx.origin(args[0]))


@rule_of("slice", "narrow")
def cut(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Take a range of an axis; if it is labelled, the ends of the range must follow the units before them."""
    source, dim = args[0], dim_of(ctx, args, kwargs, args[0].ndim)
    axes, ids = ctx.axes(source), ctx.axes(source)[dim]
    if ids is not None:
        start, stop, step = [*args[2:], None, None, None][:3]
        axes[dim] = _range(ctx, ids, *slice(start, stop, step).indices(len(ids)))
    ctx.label(out, axes, ctx.origin(source))


def _range(ctx: Context, ids: Ids, start: int, stop: int, step: int) -> Ids | None:
    units = len(ids)
    if step > 1:
        if start >= step or units % step or stop < units - step + 1:
            ctx.pin(ids, f"every {step}th unit from {start} to {stop} is taken")
        else:
            ctx.labels.merge_rows(ids.reshape(-1, step))
        return ids[start:stop:step]
    for end, at, outermost in zip(_ends_in_call(ctx, start, stop, units), (start, stop), (0, units), strict=True):
        if at != outermost and end is not None and int(end) < 0:
            ctx.constrain(-end, ids[at:], units - at)
        elif at != outermost or ctx.call.name == "narrow":  # which does not cut off what is beyond the end
            ctx.constrain(at if end is None else end, ids[:at], at)
    if stop - start < units:
        ctx.labels.roles.extend(piece for piece in (ids[:start], ids[start:stop], ids[stop:]) if len(piece))
    return ids[start:stop]


def _ends_in_call(ctx: Context, start: int, stop: int, units: int) -> tuple[Any, Any]:
    if ctx.call.name == "narrow":
        values = dict(zip(("dim", "start", "length"), ctx.call.args[1:], strict=False)) | dict(ctx.call.kwargs)
        return values["start"], values["start"] + values["length"]
    if ctx.call.name in ("__getitem__", "__setitem__"):
        index = ctx.call.args[1]
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, slice) and part.indices(units) == (start, stop, 1):
                return part.start, part.stop
    return None, None


@rule_of("as_strided", "resize", "set")
def as_strided(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """A change of memory layout alone keeps the labels."""
    if out.shape != args[0].shape or ctx.call.name == "as_strided":
        return unknown(ctx, args, kwargs, out)
    return ctx.label(out, ctx.axes(args[0]), ctx.origin(args[0]))


@rule_of("index_select", "gather")
def pick_by_index(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Read units of an axis at indices: one list of them, or one for each place."""
    source, chosen, each = args[0], args[2], ctx.operation == "gather"
    axes, picked = ctx.axes(source), ctx.axes(chosen)
    dim = args[1] % max(source.ndim, 1)
    for i, ids in enumerate(axes):
        if i == dim:
            ctx.pin(ids, "is indexed")
            axes[i] = picked[i if each else 0] if picked else None
        elif each and source.shape[i] == chosen.shape[i]:
            axes[i] = ctx.merge(ids, picked[i])
        elif each:
            ctx.pin(ids, "is read in part")
            axes[i] = picked[i]
    ctx.label(out, axes, ctx.origin(source))


@rule_of("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im", "channel_shuffle", "native_channel_shuffle")
def blocks_of_channels(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Turn each input channel into a block of output channels, or the reverse, or shuffle them."""
    axes = ctx.axes(args[0])
    shuffled = "channel_shuffle" in ctx.operation
    channel = 1 if shuffled else len(axes) - (2 if ctx.operation == "col2im" else 3)
    new = ids = axes[channel]
    rest = axes[channel + 1 :]
    if not shuffled:
        for space in rest:
            ctx.pin(space, "is cut into blocks")
        rest = [None] * (out.ndim - channel - 1)
    after = int(out.shape[channel])
    if ids is not None and shuffled:  # (groups, n) -> (n, groups)
        block = ids.reshape(args[1], -1)
        ctx.labels.merge_rows(block.T)
        new = block.T.reshape(-1)
    elif ids is not None and after >= len(ids):
        new = spread(ids, 1, after // len(ids))
    elif ids is not None:
        block = ids.reshape(after, -1)
        ctx.labels.merge_rows(block)
        new = block[:, 0]
    ctx.label(out, [*axes[:channel], new, *rest], ctx.origin(args[0]))
