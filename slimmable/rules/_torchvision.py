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
