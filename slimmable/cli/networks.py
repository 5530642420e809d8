"""The networks that are pre-trained: a timm backbone with a method around it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

import slimmable._small_resnet  # noqa: F401  adds it to timm's models
from slimmable import methods
from slimmable._convert import slimify
from slimmable.cli.config import PretrainConfig
from slimmable.errors import ConversionError, UsageError
from slimmable.gating import gate, gate_plan


def new_method(config: PretrainConfig, channels: int, classes: int) -> methods.Method:
    """Return the method of `config` around a converted network, with fresh weights drawn from its seed.

    Args:
        config: of the run.
        channels: of the images.
        classes: of the labels, for supervised training.

    Raises: UsageError: if the backbone does not take images of this size, or its name is unknown.
    """
    torch.manual_seed(config.seed)
    backbone = timm_backbone(config.model, channels, config.image_size, num_classes=0)
    return build_method(config, backbone, channels, classes)


def build_method(config: PretrainConfig, backbone: nn.Module, channels: int, classes: int) -> methods.Method:
    """Return the method of `config` around `backbone`, which is converted with its head; arguments as `new_method`.

    Raises: UsageError: if the backbone does not take images of this size.
    """
    features = _count_features(config, backbone, channels)
    hidden, dim = config.proj_hidden_dim or features, config.proj_dim
    patches = getattr(backbone, "patch_embed", None)  # a vision transformer

    def encoder(projector: nn.Module) -> nn.Module:
        return _converted(config, backbone, projector, channels)

    if config.method == "supervised":
        return methods.Supervised(encoder(methods.Supervised.projector(features, classes)))
    if config.method == "simclr":
        projector = methods.SimCLR.projector(features, hidden, dim)
        return methods.SimCLR(encoder(projector), temperature=config.temperature)
    if config.method == "vicreg":
        return methods.VICReg(encoder(methods.VICReg.projector(features, hidden, dim)))
    if config.method == "mocov2":
        return methods.MoCoV2(
            encoder(methods.MoCoV2.projector(features, hidden, dim)),
            proj_dim=dim,
            queue_size=config.queue_size,
            momentum=config.ema_momentum,
            bn_splits=config.key_parts,
            temperature=config.temperature,
        )
    if config.method == "byol":
        online = encoder(methods.BYOL.projector(features, hidden, dim))
        predictor = _predictor(config, methods.BYOL.predictor(hidden, dim))
        return methods.BYOL(online, predictor, momentum=config.ema_momentum)
    if isinstance(patches, nn.Module):
        patches.requires_grad_(False)  # a random projection trains more stably (Chen et al. 2021, section 4)
    layers = 2 if patches is None else 3
    projector = methods.MoCoV3.projector(features, hidden, dim, layers=layers)
    predictor = methods.MoCoV3.predictor(hidden, dim, last_norm=patches is not None)
    return methods.MoCoV3(
        encoder(projector),
        _predictor(config, predictor),
        momentum=config.ema_momentum,
        temperature=config.temperature,
    )


def converted_backbone(config: PretrainConfig, channels: int) -> nn.Module:
    """Return a fresh backbone of `config` that is converted by itself, without the head of the method."""
    backbone = timm_backbone(config.model, channels, config.image_size, num_classes=0)
    example = torch.zeros(2, channels, config.image_size, config.image_size)
    return slimify(backbone, config.widths, example_inputs=example, universal=config.universal, inplace=True)


def check_budget(config: PretrainConfig, backbone: nn.Module) -> None:
    """Refuse a budget below what the gates and the rest of the network cost with all gates closed.

    Raises: UsageError.
    """
    least = gate_plan(backbone).least_share()
    if config.gate_budget is not None and config.gate_budget < least:
        raise UsageError(
            f"--gate-budget {config.gate_budget:g}: {config.model} with all gates closed costs {least:.3f} of its "
            "multiply-adds; give more"
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
    example = torch.zeros(2, config.proj_dim)
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


def timm_backbone(name: str, channels: int, image_size: int | None, **settings: object) -> nn.Module:
    """Return the timm model `name` for `channels` and, if it has a fixed size and one is given, for `image_size`.

    Raises: UsageError: if timm does not know the name, or cannot make the model for images of this size.
    """
    return make_timm(name, {"in_chans": channels, **settings}, image_size)[0]


def make_timm(name: str, settings: Mapping[str, Any], image_size: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the timm model `name`, and the settings that `timm.create_model` took to make it.

    Raises: UsageError: as `timm_backbone`.
    """
    check_name(name)
    sized: dict[str, Any] = dict(settings) if image_size is None else {**settings, "img_size": image_size}
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
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else "timm.list_models() lists the names."
        raise UsageError(f"timm has no model {name!r}. {hint}")
