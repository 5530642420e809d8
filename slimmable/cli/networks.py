"""The networks that are pre-trained: any timm backbone, or a small ResNet for small images, with a method around it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimmable import methods
from slimmable._convert import slimify
from slimmable.cli.config import SMALL_RESNET, PretrainConfig
from slimmable.cli.extras import require
from slimmable.errors import ConversionError, UsageError
from slimmable.gating import gate


def new_method(config: PretrainConfig, channels: int, classes: int) -> methods.Method:
    """Return the method of `config` around a converted network, with fresh weights drawn from its seed.

    Args:
        config: of the run.
        channels: of the images.
        classes: of the labels, for supervised training.

    Raises: UsageError: if the backbone does not take images of this size, or its name is unknown.
    """
    torch.manual_seed(config.seed)
    if config.model == SMALL_RESNET:
        backbone = small_resnet(channels)
    else:
        backbone = timm_backbone(config.model, channels, config.image_size, num_classes=0)
    return build_method(config, backbone, channels, classes)


def build_method(config: PretrainConfig, backbone: nn.Module, channels: int, classes: int) -> methods.Method:
    """Return the method of `config` around `backbone`, which is converted with its head; arguments as `new_method`.

    Raises: UsageError: if the backbone does not take images of this size.
    """
    features = _count_features(config, backbone, channels)
    hidden, dim = config.hidden or features, config.embedding
    patches = getattr(backbone, "patch_embed", None)  # a vision transformer
    if config.method == "supervised":
        return methods.Supervised(
            _converted(config, backbone, methods.Supervised.projector(features, classes), channels)
        )
    if config.method == "simclr":
        encoder = _converted(config, backbone, methods.SimCLR.projector(features, hidden, dim), channels)
        return methods.SimCLR(encoder, temperature=config.temperature)
    if config.method == "vicreg":
        return methods.VICReg(_converted(config, backbone, methods.VICReg.projector(features, hidden, dim), channels))
    if config.method == "mocov2":
        encoder = _converted(config, backbone, methods.MoCoV2.projector(features, hidden, dim), channels)
        return methods.MoCoV2(
            encoder,
            proj_dim=dim,
            queue_size=config.queue_size,
            momentum=config.momentum,
            bn_splits=config.key_parts,
            temperature=config.temperature,
        )
    if config.method == "byol":
        encoder = _converted(config, backbone, methods.BYOL.projector(features, hidden, dim), channels)
        return methods.BYOL(encoder, _predictor(config, methods.BYOL.predictor(hidden, dim)), momentum=config.momentum)
    if isinstance(patches, nn.Module):
        patches.requires_grad_(False)  # a random projection trains more stably (Chen et al. 2021, section 4)
    layers = 2 if patches is None else 3
    projector = methods.MoCoV3.projector(features, hidden, dim, layers=layers)
    predictor = methods.MoCoV3.predictor(hidden, dim, last_norm=patches is not None)
    return methods.MoCoV3(
        _converted(config, backbone, projector, channels),
        _predictor(config, predictor),
        momentum=config.momentum,
        temperature=config.temperature,
    )


def _converted(config: PretrainConfig, backbone: nn.Module, projector: nn.Module, channels: int) -> nn.Module:
    example = torch.zeros(2, channels, config.image_size, config.image_size)
    if config.gate_budget is not None:  # the head has no gates, and no part in what they may cost
        backbone = slimify(backbone, config.widths, example_inputs=example, inplace=True)
        try:
            return methods.Encoder(gate(backbone, example_inputs=example, inplace=True), projector)
        except ConversionError as error:
            raise UsageError(f"--gate-budget needs a --model that can be gated: {error}") from error
    encoder = methods.Encoder(backbone, projector)
    return slimify(encoder, config.widths, example_inputs=example, universal=config.universal, inplace=True)


def _predictor(config: PretrainConfig, predictor: nn.Module) -> nn.Module:
    example = torch.zeros(2, config.embedding)
    return slimify(predictor, config.widths, example_inputs=example, universal=config.universal, inplace=True)


def _count_features(config: PretrainConfig, backbone: nn.Module, channels: int) -> int:
    """Return how many features the backbone gives for an image."""
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
    backbone.train()
    return features.shape[1]


def small_resnet(channels: int, planes: tuple[int, ...] = (16, 32, 64, 128)) -> nn.Module:
    """Return timm's ResNet with one basic block per stage, `planes` channels, and a stem that keeps the image's size.

    >>> small_resnet(1)(torch.zeros(2, 1, 24, 24)).shape
    torch.Size([2, 128])
    """
    resnet = require("timm.models.resnet", "timm")
    network: nn.Module = resnet.ResNet(
        resnet.BasicBlock,
        (1, 1, 1, 1),
        channels=planes,
        stem_type="deep",  # the one whose width can be set; its three convolutions then make room for one
        stem_width=planes[0] // 2,
        in_chans=channels,
        num_classes=0,
    )
    network.conv1 = nn.Conv2d(channels, planes[0], kernel_size=3, padding=1, bias=False)
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
