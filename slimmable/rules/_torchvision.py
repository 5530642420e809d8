"""Rules of torchvision's operations."""

from slimmable.rules._operation import Operation
from slimmable.rules._register import register_rule


@register_rule("torchvision::roi_align")
@register_rule("torchvision::roi_pool")
def regions(op: Operation) -> None:
    """Regions are cut out of images; channels are resampled one by one."""
    for output in range(len(op.outputs)):
        op.moves("input", 1, to=1, output=output)
        op.moves("rois", 0, to=0, output=output)


@register_rule("torchvision::deform_conv2d")
def deform_conv2d(op: Operation) -> None:
    """A convolution that reads at positions shifted by `offset`, and weighs what it reads by `mask`."""
    for name in ("input", "offset", "mask"):
        op.moves(name, 0, to=0)
    if op["groups"] == op["offset_groups"] == 1:
        op.contracts("input", 1, "weight", 1, times=op["weight"][0, 0].numel())
        op.makes("weight", 0, to=1)
        op.same("weight", 0, "bias", 0)
