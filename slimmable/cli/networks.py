"""Networks for pre-training: a timm backbone with a method around it."""

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
from slimmable.cli.extras import explained
from slimmable.errors import ConversionError, UsageError
from slimmable.gating import gate


def new_method(config: PretrainConfig, channels: int, classes: int) -> methods.Method:
    """Return the method of `config` around a converted network, with fresh weights drawn from the config's seed.

    The network takes images of `channels` channels; supervised training tells `classes` classes apart.
    """
    torch.manual_seed(config.seed)
    backbone = timm_backbone(config.model, channels, config.image_size, num_classes=0)
    return build_method(config, backbone, channels, classes)


def build_method(config: PretrainConfig, backbone: nn.Module, channels: int, classes: int) -> methods.Method:
    """Return the method of `config` around `backbone`, which is converted together with its head; see `new_method`."""
    example = torch.zeros(2, channels, config.image_size, config.image_size)
    output = output_for(example, backbone, config.model)
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise UsageError(f"{config.model} does not output one feature vector per image; choose another --model")
    features = output.shape[1]
    hidden, dim = config.proj_hidden_dim or features, config.proj_dim
    patches = getattr(backbone, "patch_embed", None)  # a vision transformer
    backbone.train()

    def encoder(projector: nn.Module) -> nn.Module:
        if config.gate_budget is None:
            return _slimmed(config, methods.Encoder(backbone, projector), example)
        slim = _slimmed(config, backbone, example)  # the head has no gates, and its cost does not count
        try:
            return methods.Encoder(gate(slim, example_inputs=example, inplace=True), projector)
        except ConversionError as error:
            raise UsageError(f"--gate-budget needs a --model that can be gated: {error}") from error

    if config.method == "supervised":
        return methods.Supervised(encoder(methods.Supervised.projector(features, classes)))
    if config.method == "simclr":
        return methods.SimCLR(encoder(methods.SimCLR.projector(features, hidden, dim)), temperature=config.temperature)
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
        predictor = _slimmed(config, methods.BYOL.predictor(hidden, dim), torch.zeros(2, dim))
        return methods.BYOL(online, predictor, momentum=config.ema_momentum)
    if isinstance(patches, nn.Module):
        patches.requires_grad_(False)  # frozen at random, it trains more stably (Chen et al. 2021, section 4)
    projector = methods.MoCoV3.projector(features, hidden, dim, layers=2 if patches is None else 3)
    predictor = methods.MoCoV3.predictor(hidden, dim, last_norm=patches is not None)
    slim = _slimmed(config, predictor, torch.zeros(2, dim))
    return methods.MoCoV3(encoder(projector), slim, momentum=config.ema_momentum, temperature=config.temperature)


def converted_backbone(config: PretrainConfig, channels: int) -> nn.Module:
    """Return a fresh backbone of `config`, converted without the head of the method."""
    backbone = timm_backbone(config.model, channels, config.image_size, num_classes=0)
    return _slimmed(config, backbone, torch.zeros(2, channels, config.image_size, config.image_size))


def _slimmed(config: PretrainConfig, network: nn.Module, example: Tensor) -> nn.Module:
    return slimify(network, config.widths, example_inputs=example, universal=config.universal, inplace=True)


def output_for(images: Tensor, model: nn.Module, name: str) -> Any:
    """Return the output of `model` in eval mode, or raise SlimmableError if it does not accept images of this size."""
    size = " x ".join(map(str, images.shape[2:]))
    with torch.no_grad(), explained(f"{name} does not accept images of {size} pixels", "; choose another --image-size"):
        return model.eval()(images)


def timm_backbone(name: str, channels: int, image_size: int | None, **settings: object) -> nn.Module:
    """Return the timm model `name`; see `make_timm`."""
    return make_timm(name, {"in_chans": channels, **settings}, image_size)[0]


def make_timm(name: str, settings: Mapping[str, Any], image_size: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the timm model `name` and the settings that `timm.create_model` accepted.

    Those include `image_size`, if given, for a model with a fixed image size.
    """
    check_name(name)
    sized: dict[str, Any] = dict(settings) if image_size is None else {**settings, "img_size": image_size}
    try:
        try:
            return timm.create_model(name, **sized), sized
        except TypeError:  # a model for images of any size has no `img_size`
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
