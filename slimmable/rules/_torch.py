"""Rules of torch's less common operations."""

import torch

from slimmable.rules._operation import Operation
from slimmable.rules._register import register_rule


@register_rule("aten::fake_quantize_per_channel_affine_cachemask")
@register_rule("aten::_fake_quantize_learnable_per_channel_affine")
def fake_quantize_per_channel(op: Operation) -> None:
    """Numbers are rounded to steps of a size for each unit of an axis."""
    for output in range(len(op.outputs)):
        op.keeps("self", output=output)
    op.same("self", op["axis"], "scale", 0)
    op.same("self", op["axis"], "zero_point", 0)


@register_rule("aten::_fused_moving_avg_obs_fq_helper")
def observe_and_fake_quantize(op: Operation) -> None:
    """The same, after the range of the numbers was noted, for all of them or for each unit of an axis."""
    for output in range(len(op.outputs)):
        op.keeps("self", output=output)
    if op["per_row_fake_quant"] and not op["running_min"].numel():
        op.pins("self", op["ch_axis"], "its observer has seen nothing yet; run the model once before it is converted")
    elif op["per_row_fake_quant"]:
        for name in ("running_min", "running_max", "scale", "zero_point"):
            op.same("self", op["ch_axis"], name, 0)


@register_rule("aten::scatter")
@register_rule("aten::scatter_add")
@register_rule("aten::scatter_reduce")
def scatter(op: Operation) -> None:
    """Elements are written or added at places along one axis."""
    op.keeps("self", op["dim"])
    for name in {"self", "index", "src"} & op.tensors.keys():
        op.pins(name, op["dim"], "is indexed")
    for axis in set(range(op["self"].ndim)) - {op["dim"] % max(op["self"].ndim, 1)}:
        for name in {"index", "src"} & op.tensors.keys():
            if op[name].shape[axis] == op["self"].shape[axis]:
                op.moves(name, axis, to=axis)
            else:
                op.pins("self", axis, "is written in part")
                op.pins(name, axis, "writes a part")


@register_rule("aten::index")
@register_rule("aten::index_put")
@register_rule("aten::_index_put_impl")
@register_rule("aten::_unsafe_index_put")
def index(op: Operation) -> None:
    """Indices of some axes, or masks of them, say what is read, or where `values` are written or added."""
    indices = [(i, part) for i, part in enumerate(op["indices"]) if part is not None]
    masked = any(part.dtype == torch.bool for _, part in indices)
    used: list[int] = []
    axis = 0
    for part in op["indices"]:
        covered = part.ndim if part is not None and part.dtype == torch.bool else 1  # a mask may cover several axes
        used += [] if part is None else range(axis, axis + covered)
        axis += covered
    for axis in used:
        op.pins("self", axis, "is indexed")
    picked = max(1 if part.dtype == torch.bool else part.ndim for _, part in indices)
    rest: list[int | None] = [axis for axis in range(op["self"].ndim) if axis not in used]
    front = used[0] if used[-1] - used[0] == len(used) - 1 else 0
    rest[front:front] = [None] * picked  # now the axes of what is read or written; those of the indices are None
    if "values" in op:
        op.keeps("self", *used)
    for number, own in enumerate(rest):
        if own is not None and "values" not in op:
            op.moves("self", own, to=number)
        elif own is not None and len(rest) - number <= op["values"].ndim and op["values"].shape[number - len(rest)] > 1:
            op.moves("values", number - len(rest), to=own)
    for i, part in () if masked or "values" in op else indices:
        for number in range(part.ndim):
            op.moves(f"indices[{i}]", number, to=front + picked - part.ndim + number)
    for i, part in indices if "values" in op else ():
        for number in range(part.ndim):
            op.pins(f"indices[{i}]", number, "is an index")


@register_rule("aten::_embedding_bag")
@register_rule("aten::_embedding_bag_forward_only")
def embedding_bag(op: Operation) -> None:
    """Vectors of a table are added up or averaged; as an embedding, it makes their units."""
    op.makes("weight", 1, to=1)
    op.pins("weight", 0, "is indexed")


@register_rule("aten::grid_sampler_2d")
@register_rule("aten::grid_sampler_3d")
def grid_sample(op: Operation) -> None:
    """Each image is read at the places of its own grid."""
    op.moves("input", 0, to=0)
    op.moves("input", 1, to=1)
    op.moves("grid", 0, to=0)
    for axis in range(1, op["grid"].ndim - 1):
        op.moves("grid", axis, to=axis + 1)


@register_rule("aten::_cdist_forward")
@register_rule("aten::_euclidean_dist")
def cdist(op: Operation) -> None:
    """Distances between all pairs of vectors."""
    op.keeps("x1", -1)
    op.keeps("x2", -1, -2)
    op.moves("x2", -2, to=-1)
    op.contracts("x1", -1, "x2", -1)


@register_rule("aten::_trilinear")
def trilinear(op: Operation) -> None:
    """Products of three tensors, each with some axes, are added up along others, as in a bilinear layer."""
    axes = {name: iter(range(op[name].ndim)) for name in ("i1", "i2", "i3")}
    target = 0
    for axis in range(op["i1"].ndim + len(op["expand1"])):
        found = {name: next(axes[name]) for name in axes if axis not in op[f"expand{name[1]}"]}
        pairs = list(zip(found.items(), list(found.items())[1:], strict=False))
        if axis in op["sumdim"]:
            for first, second in pairs:
                op.contracts(*first, *second)
            continue
        for name, own in found.items():
            (op.moves if pairs else op.makes)(name, own, to=target)
        target += 1


@register_rule("aten::mse_loss")
@register_rule("aten::smooth_l1_loss")
@register_rule("aten::huber_loss")
@register_rule("aten::binary_cross_entropy")
@register_rule("aten::binary_cross_entropy_with_logits")
def loss(op: Operation) -> None:
    """A loss of each number or, if `reduction` is not 0, of all of them together."""
    for name in (name for name in op.tensors if op[name].ndim == op["self"].ndim):
        for axis in range(op["self"].ndim):
            if op["reduction"] == 0:
                op.moves(name, axis, to=axis)
            else:
                op.same("self", axis, name, axis)
                op.mixes(name, axis)


@register_rule("aten::sort")
def sort(op: Operation) -> None:
    """Units along an axis are put in order, after which it is not known which is which."""
    op.pins("self", op["dim"], "its units are sorted")
    for output in range(2):
        op.keeps("self", output=output)


def grouped_mm(op: Operation) -> None:
    """Each run of rows is multiplied by a matrix of its own, such as that of an expert."""
    if (op["self"].ndim, op["mat2"].ndim) == (2, 3):
        op.moves("self", 0, to=0)
        op.contracts("self", 1, "mat2", 1)
        op.makes("mat2", 2, to=1)
        op.pins("mat2", 0, "each has its own rows")


if hasattr(torch.ops.aten, "_grouped_mm"):  # torch 2.6 has none
    register_rule("aten::_grouped_mm", grouped_mm)
