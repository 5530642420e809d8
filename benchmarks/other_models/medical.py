"""Networks of MONAI, in two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import torch
from monai.networks import nets

import slimmable
from benchmarks.other_models.entry import FULL, SLIM, Entry, noise

FLAT, SOLID = partial(noise, 2, 1, 64, 64), partial(noise, 1, 1, 32, 32, 32)


def entries() -> Iterator[Entry]:
    yield model("UNet", FLAT, 2, 1, 3, (8, 16, 32), (2, 2), num_res_units=2)
    yield model("UNet", SOLID, 3, 1, 3, (8, 16, 32), (2, 2), name="UNet without residuals")
    yield model("BasicUNet", FLAT, 2, 1, 2, (16, 16, 32, 64, 128, 16))
    yield model("AttentionUnet", FLAT, 2, 1, 2, (8, 16, 32), (2, 2))
    yield model("FlexibleUNet", FLAT, 1, 2, "resnet18")
    yield model("DynUNet", FLAT, 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32])
    yield model("SegResNet", FLAT, 2, 8, 1, 2)
    yield model("VNet", SOLID, 3, 1, 2)
    yield model("UNETR", SOLID, 1, 2, (32, 32, 32), feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4)
    yield model("SwinUNETR", FLAT, 1, 2, feature_size=12, spatial_dims=2)
    yield model("MedNeXt", FLAT, 2, 8, 1, 2)
    yield model("DenseNet", SOLID, 3, 1, 4, init_features=8, growth_rate=8, block_config=(2, 2))
    yield model("resnet10", SOLID, spatial_dims=3, n_input_channels=1, num_classes=3)
    vit = {"hidden_size": 48, "mlp_dim": 96, "num_layers": 2, "num_heads": 4, "classification": True}
    yield model("ViT", SOLID, 1, (32, 32, 32), (8, 8, 8), outputs={"0": FULL, "*": SLIM}, **vit)
    yield model("AutoEncoder", FLAT, 2, 1, 1, (8, 16), (2, 2))
    sizes = {"channels": (8, 16), "attention_levels": (False, True), "norm_num_groups": 4, "num_res_blocks": 1}
    yield model("DiffusionModelUNet", noisy, 2, 1, 1, num_head_channels=8, **sizes)


def noisy() -> slimmable.Inputs:
    return slimmable.Inputs(noise(2, 1, 32, 32), timesteps=torch.tensor([3, 5]))


def model(
    kind: str, example: Callable[[], Any], *args: Any, name: str = "", outputs: Any = FULL, **settings: Any
) -> Entry:
    return Entry("monai", kind, name or kind, partial(getattr(nets, kind), *args, **settings), example, outputs)


def version() -> tuple[str, str]:
    return "monai", metadata.version("monai")
