"""Models of diffusers, each with a tiny random configuration."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import diffusers
import torch

from benchmarks.other_models.entry import Entry, noise

SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}


def entries() -> Iterator[Entry]:
    unet = {
        "sample_size": 16, **SMALL, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    yield model("UNet2DModel", step, unet)
    conditioned = {
        "sample_size": 16, **SMALL, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32,
    }  # fmt: skip
    yield model("UNet2DConditionModel", conditioned_step, conditioned)
    dit = {
        "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "out_channels": 8,
        "num_embeds_ada_norm": 10,
    }  # fmt: skip
    yield model("DiTTransformer2DModel", labelled_step, dit)
    auto = {
        "sample_size": 32, **SMALL, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    yield model("AutoencoderKL", partial(noise, 2, 3, 32, 32), auto)


def model(kind: str, example: Any, settings: dict[str, Any]) -> Entry:
    return Entry("diffusers", kind, kind, partial(getattr(diffusers, kind), **settings), example)


def step() -> dict[str, Any]:
    return {"sample": noise(2, 3, 16, 16), "timestep": torch.tensor([3, 9])}


def conditioned_step() -> dict[str, Any]:
    return {"sample": noise(2, 4, 16, 16), "timestep": torch.tensor([3, 9]), "encoder_hidden_states": noise(2, 5, 32)}


def labelled_step() -> dict[str, Any]:
    return {"hidden_states": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 9]), "class_labels": torch.tensor([1, 2])}


def version() -> tuple[str, str]:
    return "diffusers", diffusers.__version__
