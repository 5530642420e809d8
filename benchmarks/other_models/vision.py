"""All models of torchvision: classification, video, segmentation, detection, optical flow and quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
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
TOO_BIG = ("convnext_large", "mvit*", "regnet_y_128gf", "s3d", "vit_h_14", "vit_l_*")  # big models, or clips


def entries() -> Iterator[Entry]:
    for name in models.list_models(models):
        yield _entry(name, "classification", noise_of(name), num_classes=10, **_first(ARGUMENTS, name, {}))
    for name in models.list_models(models.video):
        yield _entry(name, "video", partial(noise, 2, 3, *_clip(name)), num_classes=10)
    for name in models.list_models(models.segmentation):
        yield _entry(name, "segmentation", partial(noise, 2, 3, 64, 64), num_classes=10, weights_backbone=None)
    for name in models.list_models(models.detection):
        example = (
            boxed
            if "rcnn" in name
            else partial(noise, 2, 3, 320, 320)
            if "ssd" in name
            else partial(noise, 2, 3, 64, 64)
        )
        make = partial(_dense, name, weights_backbone=None, num_classes=10)
        yield Entry("torchvision", "detection", name, make, example)
    for name in models.list_models(models.optical_flow):
        yield _entry(name, "optical flow", partial(pair, 128))
    for name in models.list_models(models.quantization):
        yield _entry(name, "quantisation", noise_of(name), num_classes=10, **_first(ARGUMENTS, name, {}))


def _entry(name: str, family: str, example: Callable[[], Any], **arguments: Any) -> Entry:
    make = partial(models.get_model, name, weights=None, **arguments)
    numbers = not any(fnmatchcase(name, pattern) for pattern in TOO_BIG)
    return Entry("torchvision", family, name, make, example, FULL, numbers=numbers)


def noise_of(name: str) -> Any:
    size = _first(ARGUMENTS, name, {}).get("image_size", _first(IMAGES, name, 64))
    return partial(noise, 2, 3, size, size)


def _first(choices: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in choices.items() if fnmatchcase(name, pattern)), default)


def _clip(name: str) -> tuple[int, int, int]:
    return (16, 224, 224) if "mvit" in name or name == "s3d" else (4, 64, 64)  # these take no smaller ones


class Dense(nn.Module):
    """The part of a detector that ends before scores decide which boxes stay, on which no shape may depend.

    Converted in place, it makes the whole detector slimmable.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, proposals: list[Tensor] | None = None) -> Any:
        """Return what the heads say; those of an R-CNN also say it of the boxes in `proposals`, for each image."""
        features = self.detector.backbone(images)
        if hasattr(self.detector, "head"):
            return self.detector.head(list(features.values()))
        heads, sizes = self.detector.roi_heads, [(images.shape[-2], images.shape[-1])] * images.shape[0]
        found = {"proposals": self.detector.rpn.head(list(features.values()))}
        for kind in ("box", "mask", "keypoint"):
            if getattr(heads, f"{kind}_head", None) is not None:
                pooled = getattr(heads, f"{kind}_roi_pool")(features, proposals, sizes)
                found[kind] = getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled))
        return found


def _dense(name: str, **arguments: Any) -> Dense:
    return Dense(models.get_model(name, weights=None, **arguments))


def boxed() -> tuple[Tensor, list[Tensor]]:
    boxes = torch.tensor([[4.0, 4.0, 40.0, 32.0], [20.0, 8.0, 60.0, 60.0]])
    return noise(2, 3, 64, 64), [boxes, boxes.flip(0)]


def pair(size: int) -> tuple[Tensor, Tensor]:
    return noise(1, 3, size, size), noise(1, 3, size, size).flip(-1)


def version() -> tuple[str, str]:
    return "torchvision", torchvision.__version__
