"""Rules of torch's operations and torchvision's, see `slimmable.rules`; first, of those that treat units one by one."""

from collections.abc import Callable
from typing import Any

import torch

from slimmable.rules._operation import Operation, register_rule

ORDER = "the order of the units matters"
NEIGHBOURS = "neighbouring units are mixed"


def _rule_of(operations: str) -> Callable[[Callable[[Operation], Any]], Any]:
    def register(rule: Callable[[Operation], Any]) -> Any:
        for operation in operations.split():
            if hasattr(torch.ops.aten, operation) or hasattr(torch.ops.aten, f"{operation}_"):  # older ones lack some
                register_rule(f"aten::{operation}", rule)
        return rule

    return register


def _one_by_one(operations: str, why: str = "", *special: int | str, also: str = "") -> None:
    """Register operations on single units of the first tensor and of `also`; `special` axes or arguments are pinned."""

    @_rule_of(operations)
    def rule(op: Operation) -> None:
        first = next(iter(op.tensors))
        axes: list[int] = []
        for each in special:
            number = each if isinstance(each, int) else op[each]
            axes += [number] if isinstance(number, int) else number or range(op[first].ndim)  # none given: all
        for name in (first, also) if also else (first,):
            for axis in axes if op[name].ndim else ():
                op.pins(name, axis, why)
            for output, result in enumerate(op.outputs):
                whole = result.ndim == op[name].ndim  # then a pinned axis of the same size keeps its labels
                lost = [axis for axis in axes if not (whole and result.shape[axis] == op[name].shape[axis])]
                op.keeps(name, *lost, output=output)
        for name in op.tensors.keys() - {first, also}:
            for axis in range(op.tensors[name].ndim):
                op.pins(name, axis, "is an index or a bound")


_one_by_one("bucketize view_as_real fake_quantize_per_tensor_affine_cachemask")
_one_by_one("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fake_quantize_learnable_per_tensor_affine")
_one_by_one("view_as_complex", "is the real and imaginary part", -1)
_one_by_one("cumsum cumprod logcumsumexp", ORDER, "dim")
_one_by_one("flip rot90 roll", ORDER, "dims")
_one_by_one("tril triu", ORDER, -1, -2)
_one_by_one("cummax cummin", "units are ranked", "dim")
_one_by_one("sort", "its units are sorted", "dim")
_one_by_one("unbind select", "single units are picked", "dim")
_one_by_one("diagonal", "a diagonal is taken", "dim1", "dim2")
_one_by_one("unfold", "is cut into windows", "dimension")
_one_by_one("linalg_cross", "is a space", "dim", also="other")
_one_by_one("_fft_r2c _fft_c2r _fft_c2c", "is transformed", "dim")
_one_by_one("index_fill", "is indexed", "dim")
_one_by_one("index_add index_copy index_reduce", "is indexed", "dim", also="source")

for _dims in (1, 2, 3):
    _kinds = (  # each exists for some numbers of axes
        "max_pool{}d_with_indices max_pool{}d avg_pool{}d adaptive_max_pool{}d adaptive_avg_pool{}d "
        "_adaptive_avg_pool{}d fractional_max_pool{}d reflection_pad{}d replication_pad{}d upsample_nearest{}d "
        "_upsample_nearest_exact{}d upsample_linear{}d upsample_bilinear{}d upsample_bicubic{}d upsample_trilinear{}d "
        "_upsample_bilinear{}d_aa _upsample_bicubic{}d_aa"
    )
    _one_by_one(_kinds.replace("{}", str(_dims)), NEIGHBOURS, *range(-_dims, 0))
    _one_by_one(f"max_unpool{_dims}d", NEIGHBOURS, *range(-_dims, 0), also="indices")


@_rule_of("fake_quantize_per_channel_affine_cachemask _fake_quantize_learnable_per_channel_affine")
@_rule_of("_fused_moving_avg_obs_fq_helper")
def fake_quantize(op: Operation) -> None:
    """Numbers are rounded to steps of a size for each unit of an axis; the fused way, only if asked to."""
    for output in range(len(op.outputs)):
        op.keeps("self", output=output)
    fused = "running_min" in op
    axis = op["ch_axis" if fused else "axis"]
    if fused and op["per_row_fake_quant"] and not op["running_min"].numel():
        op.pins("self", axis, "its observer has seen nothing yet; run the model once before it is converted")
    elif not fused or op["per_row_fake_quant"]:
        for name in ("running_min", "running_max", "scale", "zero_point"):
            if name in op:
                op.same("self", axis, name, 0)


@_rule_of("_softmax _log_softmax _safe_softmax")
def softmax(op: Operation) -> None:
    """The units of an axis compete."""
    op.keeps("self")
    if op["self"].ndim:
        op.mixes("self", op["dim"])


@_rule_of("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm")
@_rule_of("_batch_norm_with_update _batch_norm_no_update")
def batch_norm(op: Operation) -> None:
    """Axis 1 shrinks with every per-channel tensor; statistics of the input itself mix the units of the others."""
    op.keeps("input")
    for name in [*op.tensors][1:]:
        op.moves(name, 0, to=1)
    decides = "training" in op
    for axis in range(2, op["input"].ndim) if decides and op["training"] else ():
        op.mixes("input", axis)


@_rule_of("native_layer_norm _fused_rms_norm layer_norm rms_norm")
def layer_norm(op: Operation) -> None:
    """The last axes shrink with weight and bias."""
    op.keeps("input")
    for axis in range(-len(op["normalized_shape"]), 0):
        for name in [*op.tensors][1:]:
            op.moves(name, axis, to=axis)
        op.mixes("input", axis)


@_rule_of("_weight_norm_interface _weight_norm")
def weight_norm(op: Operation) -> None:
    """A weight is given by direction and length, which has one value per slice along one axis."""
    op.keeps("v")
    for output in range(len(op.outputs)):
        op.keeps("g", output=output)


@_rule_of("scatter scatter_add scatter_reduce")
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


@_rule_of("index index_put _index_put_impl _unsafe_index_put")
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
    for i, part in indices:
        for number in range(part.ndim):
            if "values" in op:
                op.pins(f"indices[{i}]", number, "is an index")
            elif not masked:
                op.moves(f"indices[{i}]", number, to=front + picked - part.ndim + number)


@_rule_of("_embedding_bag _embedding_bag_forward_only")
def embedding_bag(op: Operation) -> None:
    """Vectors of a table are added up or averaged; as an embedding, it makes their units."""
    op.makes("weight", 1, to=1)
    op.pins("weight", 0, "is indexed")


@_rule_of("grid_sampler_2d grid_sampler_3d")
def grid_sample(op: Operation) -> None:
    """Each image is read at the places of its own grid."""
    op.moves("input", 0, to=0)
    op.moves("input", 1, to=1)
    op.moves("grid", 0, to=0)
    for axis in range(1, op["grid"].ndim - 1):
        op.moves("grid", axis, to=axis + 1)


@_rule_of("_cdist_forward _euclidean_dist")
def cdist(op: Operation) -> None:
    """Distances between all pairs of vectors."""
    op.keeps("x1", -1)
    op.keeps("x2", -1, -2)
    op.moves("x2", -2, to=-1)
    op.contracts("x1", -1, "x2", -1)


@_rule_of("_trilinear")
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


@_rule_of("mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits")
def loss(op: Operation) -> None:
    """A loss of each number or, if `reduction` is not 0, of all of them together."""
    for name in (name for name in op.tensors if op[name].ndim == op["self"].ndim):
        for axis in range(op["self"].ndim):
            if op["reduction"] == 0:
                op.moves(name, axis, to=axis)
            else:
                op.same("self", axis, name, axis)
                op.mixes(name, axis)


@_rule_of("_grouped_mm")
def grouped_mm(op: Operation) -> None:
    """Each run of rows is multiplied by a matrix of its own, such as that of an expert."""
    if (op["self"].ndim, op["mat2"].ndim) == (2, 3):
        op.moves("self", 0, to=0)
        op.contracts("self", 1, "mat2", 1)
        op.makes("mat2", 2, to=1)
        op.pins("mat2", 0, "each has its own rows")


@register_rule("torchvision::roi_align")
@register_rule("torchvision::roi_pool")
def regions(op: Operation) -> None:
    """Regions are cut out of images; channels are resampled one by one."""
    for output in range(len(op.outputs)):
        op.moves("input", 1, to=1, output=output)
        op.moves("rois", 0, to=0, output=output)
    for name, axis in (("input", 0), ("input", 2), ("input", 3), ("rois", 1)):
        op.pins(name, axis, "regions are cut out")


@register_rule("torchvision::deform_conv2d")
def deform_conv2d(op: Operation) -> None:
    """A convolution that reads at positions shifted by `offset`, and weighs what it reads by `mask`."""
    for name in ("input", "offset", "mask"):
        op.moves(name, 0, to=0)
    for name in ("offset", "mask"):
        for axis in (1, 2, 3):
            op.pins(name, axis, "there is one for each position of the kernel")
    for axis in (2, 3):
        op.pins("input", axis, "neighbouring units are mixed")
        op.pins("weight", axis, "is the kernel of a convolution")
    if op["groups"] == op["offset_groups"] == 1:
        op.contracts("input", 1, "weight", 1, times=op["weight"][0, 0].numel())
        op.makes("weight", 0, to=1)
        op.same("weight", 0, "bias", 0)
