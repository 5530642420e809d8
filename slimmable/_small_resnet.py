"""ResNets for small images, in timm's registry, created, saved and loaded like any timm model."""

from collections.abc import Sequence
from typing import Any

from timm.models import register_model, resnet
from torch import nn


@register_model
def small_resnet(
    pretrained: bool = False,
    *,
    in_chans: int = 3,
    channels: Sequence[int] = (16, 32, 64, 128),
    blocks: Sequence[int] = (0, 1, 1, 1),
    **settings: Any,
) -> nn.Module:
    """Return timm's ResNet with basic blocks, and a stem that keeps the image's size.

    `channels` and `blocks` are those of the four stages, by default none in the first, whose large maps take most time;
    `settings` are any of timm's ResNets; without `num_classes` it returns features. There are no pretrained weights.

    >>> import timm
    >>> timm.create_model("small_resnet", in_chans=1)(torch.zeros(2, 1, 24, 24)).shape
    torch.Size([2, 128])
    """
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm passes them to every model
        settings.pop(name, None)
    # the deep stem is the only one whose width can be set; one convolution then replaces its three
    stem = {"stem_type": "deep", "stem_width": channels[0] // 2, "in_chans": in_chans}
    given = {"num_classes": 0, "channels": tuple(channels), "zero_init_last": False, **stem, **settings}
    network: Any = resnet.ResNet(resnet.BasicBlock, tuple(blocks), **given)  # type: ignore[arg-type]
    network.conv1 = nn.Conv2d(in_chans, channels[0], kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    network.pretrained_cfg = {"architecture": "small_resnet", "input_size": (in_chans, 24, 24), "first_conv": "conv1"}
    network.pretrained_cfg |= {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans}
    return network  # type: ignore[no-any-return]


@register_model
def resnet18_cifar(pretrained: bool = False, *, in_chans: int = 3, **settings: Any) -> nn.Module:
    """Return ResNet-18 for images of 32 x 32 pixels (Krishna et al. 2023), with the arguments of `small_resnet`."""
    given = {"channels": (64, 128, 256, 512), "blocks": (2, 2, 2, 2), **settings}
    network: Any = small_resnet(in_chans=in_chans, **given)
    network.pretrained_cfg |= {"architecture": "resnet18_cifar", "input_size": (in_chans, 32, 32)}
    if in_chans == 3:  # the values of CIFAR-10
        network.pretrained_cfg |= {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    return network  # type: ignore[no-any-return]
