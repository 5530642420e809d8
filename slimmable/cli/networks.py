"""The networks that are pre-trained: any timm backbone, or a small ResNet for small images, with a projection head."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimmable._errors import UsageError
from slimmable.cli.config import SMALL_RESNET, PretrainConfig
from slimmable.cli.extras import require


class PretrainNetwork(nn.Module):
    """A backbone and its projection head, plain PyTorch: images in, embeddings of shape (batch, `embedding`) out."""

    def __init__(self, backbone: nn.Module, features: int, embedding: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, embedding))

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of `images`, not yet of unit length."""
        output: Tensor = self.projector(self.backbone(images))
        return output


def build_network(config: PretrainConfig, channels: int) -> PretrainNetwork:
    """Return the network of `config` for images with `channels` channels, with fresh weights drawn from its seed.

    Raises: UsageError: if the backbone does not take images of this size, or its name is unknown.
    """
    torch.manual_seed(config.seed)
    if config.model == SMALL_RESNET:
        backbone = small_resnet(channels)
    else:
        backbone = timm_backbone(config.model, channels, config.image_size, num_classes=0)
    images = torch.zeros(2, channels, config.image_size, config.image_size)
    try:
        with torch.no_grad():
            features = backbone.eval()(images)
    except Exception as error:
        raise UsageError(
            f"{config.model} does not run on images of {config.image_size} x {config.image_size} pixels ({error}); "
            "choose another --image-size"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UsageError(f"{config.model} does not give one feature vector per image; choose another --model")
    return PretrainNetwork(backbone.train(), features.shape[1], config.embedding)


def small_resnet(channels: int) -> nn.Module:
    """Return timm's ResNet with one basic block per stage, 16 to 128 channels, and a stem that keeps the image's size.

    >>> small_resnet(1)(torch.zeros(2, 1, 24, 24)).shape
    torch.Size([2, 128])
    """
    resnet = require("timm.models.resnet", "timm")
    network: nn.Module = resnet.ResNet(
        resnet.BasicBlock,
        (1, 1, 1, 1),
        channels=(16, 32, 64, 128),
        stem_type="deep",  # the one whose width can be set; its three convolutions then make room for one
        stem_width=8,
        in_chans=channels,
        num_classes=0,
    )
    network.conv1 = nn.Conv2d(channels, 16, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def timm_backbone(name: str, channels: int, image_size: int | None, **settings: object) -> nn.Module:
    """Return the timm model `name` for `channels` and, if it has a fixed size and one is given, for `image_size`.

    Raises: UsageError: if timm does not know the name, or cannot make the model for images of this size.
    """
    return make_timm(name, {"in_chans": channels, **settings}, image_size)[0]


def make_timm(name: str, settings: Mapping[str, object], image_size: int | None) -> tuple[nn.Module, dict[str, object]]:
    """Return the timm model `name`, and the settings that `timm.create_model` took to make it.

    Raises: UsageError: as `timm_backbone`.
    """
    check_name(name)
    timm = require("timm", "timm")
    sized = dict(settings) if image_size is None else {**settings, "img_size": image_size}
    try:
        try:
            return timm.create_model(name, **sized), sized
        except TypeError:  # a model that takes images of any size
            return timm.create_model(name, **settings), dict(settings)
    except (AssertionError, RuntimeError, ValueError) as error:
        asked = ", ".join(f"{key}={value!r}" for key, value in sized.items())
        raise UsageError(f"{name} cannot be made with {asked} ({error})") from error


def check_name(name: str) -> None:
    """Raise UsageError if timm has no model of this name; the message suggests similar ones."""
    timm = require("timm", "timm")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, [SMALL_RESNET, *timm.list_models()], n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else "timm.list_models() lists the names."
        raise UsageError(f"timm has no model {name!r}. {hint}")
