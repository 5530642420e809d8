"""Networks of open_clip, and of x_transformers with its options."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import metadata
from typing import Any

from open_clip.model import CLIP, CustomTextCLIP
from torch import nn
from x_transformers import ContinuousTransformerWrapper, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper

import slimmable
from benchmarks.other_models.entry import FULL, Entry, noise, tokens

VISION: dict[str, Any] = {"layers": 2, "width": 64, "head_width": 16, "image_size": 32, "patch_size": 8}
RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16, "image_size": 64}
TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary_pos_emb": True},
    "RMSNorm": {"use_rmsnorm": True},
    "simple RMSNorm": {"use_simple_rmsnorm": True},
    "ScaleNorm": {"use_scalenorm": True},
    "SwiGLU": {"ff_swish": True, "ff_glu": True},
    "ALiBi": {"alibi_pos_bias": True},
    "T5 bias": {"rel_pos_bias": True},
    "grouped queries": {"attn_kv_heads": 2},
    "one key and value": {"attn_one_kv_head": True},
    "norm of queries and keys": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "flash": {"attn_flash": True},
    "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "gated values": {"attn_gate_values": True},
    "memory": {"attn_num_mem_kv": 4},
    "macaron": {"macaron": True},
    "gated residual": {"gate_residual": True},
    "shifted tokens": {"shift_tokens": 1},
}
SIZES: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}


def pair(size: int) -> slimmable.Inputs:
    return slimmable.Inputs(noise(2, 3, size, size), tokens(2, 16, vocabulary=99))


def entries() -> Iterator[Entry]:
    yield Entry("open_clip", "CLIP", "CLIP", partial(CLIP, 32, VISION, TEXT), partial(pair, 32), FULL)
    yield Entry("open_clip", "CLIP", "CLIP, ResNet", partial(CLIP, 32, RESNET, TEXT), partial(pair, 64), FULL)
    custom = partial(CustomTextCLIP, 32, VISION, TEXT)
    yield Entry("open_clip", "CLIP", "CustomTextCLIP", custom, partial(pair, 32), FULL)
    for name, options in OPTIONS.items():
        make, example = partial(decoder, options), partial(tokens, 2, 12, vocabulary=50)
        yield Entry("x_transformers", "decoder", f"decoder, {name}", make, example, FULL)
    yield Entry("x_transformers", "encoder", "ViTransformerWrapper", vit, partial(noise, 2, 3, 32, 32), FULL)
    yield Entry("x_transformers", "encoder", "ContinuousTransformerWrapper", continuous, partial(noise, 2, 12, 8), FULL)


def decoder(options: dict[str, Any]) -> nn.Module:
    return TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=Decoder(**SIZES, **options))


def vit() -> nn.Module:
    return ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=Encoder(**SIZES))


def continuous() -> nn.Module:
    return ContinuousTransformerWrapper(dim_in=8, dim_out=6, max_seq_len=16, attn_layers=Encoder(**SIZES))


def version() -> tuple[str, str]:
    return "open_clip", f"{metadata.version('open_clip_torch')}, x_transformers {metadata.version('x-transformers')}"
