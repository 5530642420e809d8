"""Rules of torch's operations that treat units one by one, except along certain axes."""

from slimmable.rules._operation import Operation
from slimmable.rules._register import register_rule

ORDER = "the order of the units matters"
NEIGHBOURS = "neighbouring units are mixed"


def _one_by_one(operations: str, why: str = "", *special: int | str, also: str = "") -> None:
    """Register operations that treat units one by one, except along `special` axes: numbers, or arguments with numbers.

    They work on their first tensor, and alike on the one that `also` names.
    """

    def rule(op: Operation) -> None:
        first = next(iter(op.tensors))
        axes: list[int] = []
        for each in special:
            number = each if isinstance(each, int) else op[each] if each in op else range(op[first].ndim)
            axes += [number] if isinstance(number, int) else number
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

    for operation in operations.split():
        register_rule(f"aten::{operation}", rule)


_one_by_one("bucketize view_as_real fake_quantize_per_tensor_affine_cachemask")
_one_by_one("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fake_quantize_learnable_per_tensor_affine")
_one_by_one("view_as_complex", "is the real and imaginary part", -1)
_one_by_one("cumsum cumprod logcumsumexp", ORDER, "dim")
_one_by_one("flip rot90", ORDER, "dims")
_one_by_one("tril triu", ORDER, -1, -2)
_one_by_one("cummax cummin", "units are ranked", "dim")
_one_by_one("diagonal", "a diagonal is taken", "dim1", "dim2")
_one_by_one("unfold", "is cut into windows", "dimension")
_one_by_one("linalg_cross", "is a space", "dim", also="other")
_one_by_one("_fft_r2c _fft_c2r _fft_c2c", "is transformed", "dim")
_one_by_one("index_fill", "is indexed", "dim")
_one_by_one("index_add index_copy index_reduce", "is indexed", "dim", also="source")

for _dims in (1, 2, 3):
    _kinds = (
        "max_pool{}d_with_indices max_pool{}d avg_pool{}d adaptive_max_pool{}d adaptive_avg_pool{}d "
        "reflection_pad{}d replication_pad{}d upsample_nearest{}d _upsample_nearest_exact{}d"
    )
    _one_by_one(_kinds.replace("{}", str(_dims)), NEIGHBOURS, *range(-_dims, 0))
_one_by_one("upsample_linear1d", NEIGHBOURS, -1)
_one_by_one("upsample_bilinear2d upsample_bicubic2d mkldnn_max_pool2d mkldnn_adaptive_avg_pool2d", NEIGHBOURS, -2, -1)
_one_by_one("_upsample_bilinear2d_aa _upsample_bicubic2d_aa _adaptive_avg_pool2d", NEIGHBOURS, -2, -1)
_one_by_one("upsample_trilinear3d _adaptive_avg_pool3d", NEIGHBOURS, -3, -2, -1)
_one_by_one("max_unpool2d", NEIGHBOURS, -2, -1, also="indices")
_one_by_one("max_unpool3d", NEIGHBOURS, -3, -2, -1, also="indices")
_one_by_one("fractional_max_pool2d", NEIGHBOURS, -2, -1)
_one_by_one("fractional_max_pool3d", NEIGHBOURS, -3, -2, -1)


@register_rule("aten::roll")
def roll(op: Operation) -> None:
    """Units are moved along axes, or along all of them as one."""
    if op["dims"]:
        op.keeps("self", *op["dims"])
    for axis in op["dims"] or range(op["self"].ndim):
        op.pins("self", axis, ORDER)
