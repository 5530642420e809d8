"""Rules of torch's less common operations."""

import torch

from slimmable.rules._operation import Operation
from slimmable.rules._register import register_rule


def _one_by_one(operations: str, tensors: str, *special: int | str) -> None:
    """Register operations that treat units one by one, except on special axes: numbers, or arguments with numbers."""

    def rule(op: Operation) -> None:
        if any(isinstance(each, str) and each not in op for each in special):
            return  # over all axes, such as the median of all numbers
        numbers = [op[each] if isinstance(each, str) else each for each in special]
        but = [axis for each in numbers for axis in (each if isinstance(each, list) else [each])]
        for name in tensors.split():
            for output in range(len(op.outputs)):
                op.keeps(name, *but, output=output)

    for operation in operations.split():
        register_rule(f"aten::{operation}", rule)


_one_by_one("index_add index_copy index_reduce", "self source", "dim")
_one_by_one("index_fill", "self", "dim")
_one_by_one("kthvalue median nanmedian mode cummax cummin", "self", "dim")
_one_by_one("tril triu", "self", -1, -2)
_one_by_one("max_unpool2d", "self indices", -1, -2)
_one_by_one("max_unpool3d", "self indices", -1, -2, -3)
_one_by_one("rot90", "self", "dims")
_one_by_one("diagonal", "self", "dim1", "dim2")
_one_by_one("linalg_cross", "self other", "dim")
_one_by_one("bucketize fake_quantize_per_tensor_affine_cachemask", "self")
_one_by_one("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "self")
_one_by_one("_fake_quantize_learnable_per_tensor_affine", "self")


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
    for name in ("running_min", "running_max", "scale", "zero_point") if op["per_row_fake_quant"] else ():
        op.same("self", op["ch_axis"], name, 0)


@register_rule("aten::scatter")
@register_rule("aten::scatter_add")
@register_rule("aten::scatter_reduce")
def scatter(op: Operation) -> None:
    """Elements are written or added at places along one axis."""
    op.keeps("self", op["dim"])
    for axis in set(range(op["self"].ndim)) - {op["dim"] % max(op["self"].ndim, 1)}:
        for name in {"index", "src"} & op.tensors.keys():
            if op[name].shape[axis] == op["self"].shape[axis]:
                op.same("self", axis, name, axis)
            else:
                op.pins("self", axis, "is written in part")


@register_rule("aten::index_put")
@register_rule("aten::_index_put_impl")
@register_rule("aten::_unsafe_index_put")
def index_put(op: Operation) -> None:
    """Values are written or added where indices of some axes, or masks, say."""
    parts = op["indices"]
    covered = [1 if part is None or part.dtype != torch.bool else part.ndim for part in parts]  # a mask covers several
    starts = [sum(covered[:i]) for i in range(len(parts))]
    used = [start + i for part, start, n in zip(parts, starts, covered, strict=True) if part is not None for i in range(n)]
    rest: list[int | None] = [axis for axis in range(op["self"].ndim) if axis not in used]
    front = used[0] if used[-1] - used[0] == len(used) - 1 else 0
    picked = max(1 if part.dtype == torch.bool else part.ndim for part in parts if part is not None)
    rest[front:front] = [None] * picked  # now the axes of what is written
    op.keeps("self", *used)
    for number, axis in enumerate(reversed(rest), 1):
        if axis is not None and number <= op["values"].ndim:
            op.same("self", axis, "values", -number)


@register_rule("aten::_embedding_bag")
@register_rule("aten::_embedding_bag_forward_only")
def embedding_bag(op: Operation) -> None:
    """Vectors of a table are added up or averaged; as an embedding, it makes their units."""
    op.makes("weight", 1, to=1)


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
