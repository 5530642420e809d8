"""The models of segmentation_models_pytorch, without downloaded weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp

from benchmarks.other_models.entry import Entry, noise

KINDS = (
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet",
    "Segformer",
)  # fmt: skip


def entries() -> Iterator[Entry]:
    for kind in KINDS:
        size = 128 if kind == "PAN" else 64
        yield model(kind, size, encoder_name="resnet18")
    yield model("Unet", 64, "Unet with scores of an image", encoder_name="resnet18", aux_params={"classes": 5})
    yield model("DPT", 64, encoder_name="tu-vit_tiny_patch16_224", dynamic_img_size=True)


def model(kind: str, size: int, name: str = "", **arguments: Any) -> Entry:
    make = partial(getattr(smp, kind), encoder_weights=None, classes=10, **arguments)
    return Entry("segmentation_models_pytorch", kind, name or kind, make, partial(noise, 2, 3, size, size))


def version() -> tuple[str, str]:
    return "segmentation_models_pytorch", smp.__version__
