"""All models of torchvision: classification, video, segmentation, detection, optical flow and quantisation."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision import models

from benchmarks.other_models.entry import FULL, Entry, noise

IMAGES = {"inception_v3": 96, "maxvit_t": 224, "quantized_inception_v3": 96, "squeezenet*": 96, "swin_v2*": 64}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "vit_*_16": {"image_size": 64},
    "vit_*_32": {"image_size": 64},
    "vit_h_14": {"image_size": 56},
    "*googlenet": {"aux_logits": False, "init_weights": False},
    "*inception_v3": {"aux_logits": False, "init_weights": False},
    "maxvit_t": {"input_size": (224, 224)},
}
TOO_BIG = ("convnext_large", "regnet_y_128gf", "vit_h_14", "vit_l_*")  # more than 150 million parameters


def entries() -> Iterator[Entry]:
    for name in models.list_models(models):
        yield _entry(name, "classification", noise_of(name), num_classes=10, **_first(ARGUMENTS, name, {}))
    for name in models.list_models(models.video):
        yield _entry(name, "video", partial(noise, 2, 3, *_clip(name)), num_classes=10)
    for name in models.list_models(models.segmentation):
        yield _entry(name, "segmentation", partial(noise, 2, 3, 64, 64), num_classes=10, weights_backbone=None)
    for name in models.list_models(models.detection):
        size = {"min_size": 64, "max_size": 64} if "rcnn" in name or "retina" in name or "fcos" in name else {}
        yield _entry(name, "detection", images, num_classes=10, weights_backbone=None, **size)
    for name in models.list_models(models.optical_flow):
        yield _entry(name, "optical flow", partial(pair, 128))
    for name in models.list_models(models.quantization):
        yield _entry(name, "quantisation", noise_of(name), num_classes=10, **_first(ARGUMENTS, name, {}))


def _entry(name: str, family: str, example: Any, **arguments: Any) -> Entry:
    make = partial(models.get_model, name, weights=None, **arguments)
    numbers = not any(fnmatchcase(name, pattern) for pattern in TOO_BIG)
    return Entry("torchvision", family, name, make, example, FULL, numbers=numbers)


def noise_of(name: str) -> Any:
    size = _first(ARGUMENTS, name, {}).get("image_size", _first(IMAGES, name, 64))
    return partial(noise, 2, 3, size, size)


def _first(choices: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in choices.items() if fnmatchcase(name, pattern)), default)


def _clip(name: str) -> tuple[int, int, int]:
    if "mvit" in name:
        return 16, 224, 224  # its position tables have one size
    return (16, 64, 64) if name == "s3d" else (4, 64, 64)


def images() -> tuple[list[torch.Tensor]]:
    return (list(noise(2, 3, 64, 64)),)


def pair(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return noise(1, 3, size, size), noise(1, 3, size, size).flip(-1)


def version() -> tuple[str, str]:
    return "torchvision", torchvision.__version__
