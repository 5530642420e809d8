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
    num_classes: int = 0,
    channels: Sequence[int] = (16, 32, 64, 128),
    blocks: Sequence[int] = (1, 1, 1, 1),
    zero_init_last: bool = True,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
) -> nn.Module:
    """Return timm's ResNet with basic blocks, by default one per stage, and a stem that keeps the image's size.

    Args:
        pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir: passed by timm; there are no pretrained weights.
        in_chans, channels, blocks: channels of the images and of the four stages, and the stages' blocks.
        zero_init_last: as in timm's ResNets, whether each block starts as the identity.
        num_classes: of the classifier; 0 for a backbone that returns features.

    >>> import timm, torch
    >>> timm.create_model("small_resnet", in_chans=1)(torch.zeros(2, 1, 24, 24)).shape
    torch.Size([2, 128])
    """
    network = resnet.ResNet(
        resnet.BasicBlock,  # type: ignore[arg-type]
        tuple(blocks),
        channels=tuple(channels),
        stem_type="deep",  # the only stem whose width can be set; one convolution then replaces its three
        stem_width=channels[0] // 2,
        in_chans=in_chans,
        num_classes=num_classes,
        zero_init_last=zero_init_last,
    )
    stem = nn.Conv2d(in_chans, channels[0], kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    network.conv1, network.maxpool = stem, nn.Identity()  # type: ignore[assignment]
    network.pretrained_cfg = {  # type: ignore[assignment]
        "architecture": "small_resnet",
        "input_size": (in_chans, 24, 24),
        "first_conv": "conv1",
        "mean": (0.0,) * in_chans,
        "std": (1.0,) * in_chans,
    }
    return network


@register_model
def resnet18_cifar(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Return ResNet-18 for images of 32 x 32 pixels (Krishna et al. 2023), with the arguments of `small_resnet`."""
    given = {"channels": (64, 128, 256, 512), "blocks": (2, 2, 2, 2), "zero_init_last": False, **settings}
    network: nn.Module = small_resnet(**given)
    size = (given.get("in_chans", 3), 32, 32)
    network.pretrained_cfg |= {"architecture": "resnet18_cifar", "input_size": size}  # type: ignore[operator]
    return network
