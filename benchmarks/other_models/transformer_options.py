"""Networks of x_transformers: its decoder with one option after the other, and its encoders."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import metadata
from typing import Any

from torch import nn
from x_transformers import ContinuousTransformerWrapper, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper

from benchmarks.other_models.entry import FULL, Entry, noise, tokens

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


def entries() -> Iterator[Entry]:
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
    return "x_transformers", metadata.version("x-transformers")
