"""Networks written with einops: models of vit_pytorch, and two small ones in the styles of Restormer and Perceiver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, metadata
from typing import Any

import torch
from einops import rearrange, repeat
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.other_models.entry import FULL, SLIM, Entry, noise

VIT = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "mlp_dim": 128, "num_classes": 10}
SQUARE = {"image_size": 32, "patch_size": 8, **VIT}


def entries() -> Iterator[Entry]:
    small, large = partial(noise, 2, 3, 32, 32), partial(noise, 2, 3, 64, 64)
    for module in (
        "vit", "simple_vit", "deepvit", "parallel_vit", "vit_for_small_dataset", "simple_vit_with_register_tokens",
        "simple_flash_attn_vit", "simple_vit_with_fft",
    ):  # fmt: skip
        kind = "DeepViT" if module == "deepvit" else "SimpleViT" if "simple" in module else "ViT"
        more = {"freq_patch_size": 8} if "fft" in module else {"depth": 4} if "small" in module else {}
        yield model(module, kind, small, **{**SQUARE, **more})
    yield model("simple_vit_with_qk_norm", "SimpleViT", small, SLIM, **SQUARE)  # its head is a norm
    yield model("cait", "CaiT", small, **SQUARE, cls_depth=1)
    yield model("rvt", "RvT", small, **SQUARE)
    yield model("xcit", "XCiT", small, **SQUARE, cls_depth=1)
    yield model("vit_1d", "ViT", partial(noise, 2, 3, 64), seq_len=64, patch_size=8, **VIT)
    clip = {"image_size": 32, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2}
    yield model("vit_3d", "ViT", partial(noise, 2, 3, 4, 32, 32), **clip, **VIT)
    vivit = {**{k: v for k, v in VIT.items() if k != "depth"}, "spatial_depth": 2, "temporal_depth": 2}
    yield model("vivit", "ViViT", partial(noise, 2, 3, 4, 32, 32), **clip, **vivit)
    yield model("pit", "PiT", small, image_size=32, patch_size=8, **{**VIT, "depth": (1, 1)})
    yield model("t2t", "T2TViT", small, image_size=32, t2t_layers=((7, 4), (3, 2)), **VIT)
    yield model(
        "cct", "CCT", small, img_size=32, embedding_dim=64, num_layers=2, num_heads=4, mlp_ratio=2.0, num_classes=10,
        n_conv_layers=1, kernel_size=3, stride=2, padding=1, positional_embedding="learnable",
    )  # fmt: skip
    yield model(
        "cvt", "CvT", large, num_classes=10, s1_emb_dim=32, s2_emb_dim=64, s3_emb_dim=96, s2_depth=1, s3_depth=1
    )
    stages = {f"s{i}_emb_dim": 32 * i for i in (1, 2, 3, 4)} | {f"s{i}_local_patch_size": 2 for i in (1, 2, 3, 4)}
    stages |= {f"s{i}_global_k": 2 for i in (1, 2, 3, 4)} | {"s3_depth": 1, "s4_depth": 1, "s4_local_patch_size": 1}
    yield model("twins_svt", "TwinsSVT", partial(noise, 2, 3, 64, 64), num_classes=10, **stages)
    yield model(
        "crossformer", "CrossFormer", large, dim=(32, 64, 96, 128), depth=(1, 1, 1, 1), local_window_size=2,
        num_classes=10, global_window_size=(4, 4, 2, 1),
    )  # fmt: skip
    yield model("max_vit", "MaxViT", large, num_classes=10, dim=32, depth=(1, 1), window_size=4, dim_conv_stem=16)
    yield model(
        "mobile_vit", "MobileViT", large, image_size=(64, 64), dims=[32, 48, 64], num_classes=10,
        channels=[8, 16, 24, 24, 32, 32, 48, 48, 56, 56, 64],
    )  # fmt: skip
    yield model(
        "nest", "NesT", large, image_size=64, patch_size=4, num_classes=10, dim=32, heads=2, num_hierarchies=3,
        block_repeats=(1, 1, 1),
    )  # fmt: skip
    yield model(
        "levit", "LeViT", large, image_size=64, num_classes=10, dim=(32, 48, 64), depth=1, heads=(2, 3, 4), mlp_mult=2
    )
    yield model(
        "regionvit", "RegionViT", large, dim=(16, 32, 48, 64), depth=(1, 1, 1, 1), window_size=2, num_classes=10
    )
    yield model(
        "scalable_vit", "ScalableViT", large, num_classes=10, dim=16, depth=(1, 1, 1, 1), heads=(2, 2, 2, 2),
        reduction_factor=(4, 2, 1, 1), window_size=(4, 2, 2, None),
    )  # fmt: skip
    yield model("sep_vit", "SepViT", partial(noise, 2, 3, 56, 56), num_classes=10, dim=32, depth=(1, 1), heads=(2, 4))
    yield model(
        "cross_vit", "CrossViT", small, image_size=32, num_classes=10, sm_dim=32, lg_dim=64, sm_patch_size=4,
        lg_patch_size=8, sm_enc_heads=2, lg_enc_heads=4, sm_enc_mlp_dim=64, lg_enc_mlp_dim=128, sm_enc_dim_head=16,
        lg_enc_dim_head=16,
        lg_enc_depth=1, cross_attn_heads=2, cross_attn_dim_head=16, cross_attn_depth=1, depth=1,
    )  # fmt: skip
    yield Entry("einops", "Restormer", "a Restormer", partial(Restorer, 16), partial(noise, 2, 3, 16, 16))
    yield Entry("einops", "Perceiver", "a Perceiver", partial(Perceiver, 32), partial(noise, 2, 16, 24))
    yield Entry("einops", "MLP-Mixer", "a Mixer of einops layers", mixer, small)


def model(module: str, kind: str, example: Callable[[], Any], outputs: str = FULL, **arguments: Any) -> Entry:
    return Entry("vit_pytorch", module, module, partial(_make, module, kind, **arguments), example, outputs)


def _make(module: str, kind: str, **arguments: Any) -> nn.Module:
    return getattr(import_module(f"vit_pytorch.{module}"), kind)(**arguments)


class ChannelAttention(nn.Module):
    """Attention between channels, whose keys and queries have unit length (Restormer, arXiv 2111.09881)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.local = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim)
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each channel gathers from the others of its head."""
        height, width = x.shape[-2:]
        parts = self.local(self.qkv(x)).chunk(3, dim=1)
        q, k, v = (rearrange(part, "b (head c) h w -> b head c (h w)", head=self.heads) for part in parts)
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        seen = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
        return self.out(rearrange(seen, "b head c (h w) -> b (head c) h w", h=height, w=width))


class GatedFeedForward(nn.Module):
    """A feed-forward layer whose one half gates the other."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.into, self.local = (
            nn.Conv2d(dim, 2 * hidden, 1),
            nn.Conv2d(2 * hidden, 2 * hidden, 3, 1, 1, groups=2 * hidden),
        )
        self.out = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated values."""
        gate, value = self.local(self.into(x)).chunk(2, dim=1)
        return self.out(functional.gelu(gate) * value)


class PixelNorm(nn.Module):
    """A LayerNorm over channels of images."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the image with each pixel normalised."""
        height, width = x.shape[-2:]
        return rearrange(self.norm(rearrange(x, "b c h w -> b (h w) c")), "b (h w) c -> b c h w", h=height, w=width)


class RestorerBlock(nn.Module):
    """Attention between channels and a gated feed-forward layer, each added to its input."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attention = PixelNorm(dim), ChannelAttention(dim, heads)
        self.norm2, self.feed_forward = PixelNorm(dim), GatedFeedForward(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the image after attention and the feed-forward layer."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Restorer(nn.Module):
    """Restores an image: an encoder, a decoder with one skip connection, and what it adds to its input."""

    def __init__(self, dim: int):
        super().__init__()
        self.first = nn.Conv2d(3, dim, 3, padding=1)
        self.encoder, self.bottom = RestorerBlock(dim, 2), RestorerBlock(2 * dim, 4)
        self.down = nn.Sequential(nn.Conv2d(dim, dim // 2, 3, padding=1), nn.PixelUnshuffle(2))
        self.up = nn.Sequential(nn.Conv2d(2 * dim, 4 * dim, 3, padding=1), nn.PixelShuffle(2))
        self.decoder = RestorerBlock(2 * dim, 2)
        self.last = nn.Conv2d(2 * dim, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the restored image."""
        high = self.encoder(self.first(image))
        low = self.up(self.bottom(self.down(high)))
        return self.last(self.decoder(torch.cat([low, high], 1))) + image


class CrossAttention(nn.Module):
    """Attention of latents to a context."""

    def __init__(self, dim: int, context: int, heads: int, dim_head: int):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.q, self.kv = (
            nn.Linear(dim, heads * dim_head, bias=False),
            nn.Linear(context, 2 * heads * dim_head, bias=False),
        )
        self.out = nn.Linear(heads * dim_head, dim)
        self.norm, self.context_norm = nn.LayerNorm(dim), nn.LayerNorm(context)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return what each latent gathers from the context."""
        k, v = self.kv(self.context_norm(context)).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (self.q(self.norm(x)), k, v))
        seen = torch.einsum("bij,bjd->bid", (torch.einsum("bid,bjd->bij", q, k) * self.scale).softmax(-1), v)
        return self.out(rearrange(seen, "(b h) n d -> b n (h d)", h=self.heads))


class Perceiver(nn.Module):
    """Latents that read a sequence and then each other, as often as told (Perceiver, arXiv 2103.03206)."""

    def __init__(self, dim: int, inputs: int = 24, latents: int = 8, times: int = 2):
        super().__init__()
        self.latents, self.times = nn.Parameter(torch.randn(latents, dim)), times
        self.read, self.think = CrossAttention(dim, inputs, 2, 16), CrossAttention(dim, dim, 4, 8)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )
        self.head = nn.Sequential(Reduce("b n d -> b d", "mean"), nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, sequence: Tensor) -> Tensor:
        """Return class scores of a sequence."""
        x = repeat(self.latents, "n d -> b n d", b=sequence.shape[0])
        for _ in range(self.times):
            x = x + self.read(x, sequence)
            x = x + self.think(x, x)
            x = x + self.feed_forward(x)
        return self.head(x)


def mixer() -> nn.Module:
    """Return an MLP-Mixer block of einops layers between a patch embedding and a head."""
    tokens = nn.Sequential(
        nn.LayerNorm(64),
        Rearrange("b n c -> b c n"),
        nn.Linear(16, 32),
        nn.GELU(),
        nn.Linear(32, 16),
        Rearrange("b c n -> b n c"),
    )
    return nn.Sequential(
        Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=8, p2=8), nn.Linear(192, 64), tokens, nn.Linear(64, 128),
        nn.GELU(), nn.Linear(128, 64), Reduce("b n c -> b c", "mean"), nn.Linear(64, 10),
    )  # fmt: skip


def version() -> tuple[str, str]:
    return "vit_pytorch", metadata.version("vit-pytorch")
