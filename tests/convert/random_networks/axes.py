"""Operations that move, join, cut and reduce axes, and those of two values."""

from __future__ import annotations

import math
from collections.abc import Callable

import einops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convert.random_networks.parts import (
    Part,
    binary,
    channels,
    divisor,
    need,
    simple,
    unary,
)

# -- moving axes
simple(
    "flatten",
    lambda x: x.flatten(1),
    lambda x: x.reshape(x.shape[0], -1),
    lambda x: x.contiguous().view(x.size(0), x[0].numel()),
    ndim=(3, 4, 5),
)
simple(
    "tokens",
    lambda x: x.flatten(2).transpose(1, 2),
    lambda x: einops.rearrange(x, "b c h w -> b (h w) c"),
    lambda x: x.reshape(*x.shape[:2], -1).permute(0, 2, 1),
    lambda x: einops.rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2),
    lambda x: F.unfold(x, 2, stride=2).transpose(1, 2),
    ndim=(4,),
)
simple("transpose", lambda x: x.transpose(1, 2), lambda x: x.mT, lambda x: x.swapaxes(-1, 1), ndim=(3, 4, 5))
simple("permute", lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2).contiguous(), ndim=(4,))
simple(
    "reduce tokens",
    lambda x: x.mean(1),
    lambda x: x[:, 0],
    lambda x: x.amax(1),
    lambda x: x[:, -1],
    ndim=(3,),
)
simple(
    "reduce places",
    lambda x: x.mean((2, 3)),
    lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    lambda x: einops.reduce(x, "b c h w -> b c", "mean"),
    lambda x: x.var((2, 3), unbiased=False),
    ndim=(4,),
)
simple(
    "reduce",
    lambda x: x.mean(-1),
    lambda x: x.max(1).values,
    lambda x: x.var(-1, unbiased=False),
    lambda x: x.logsumexp(1),
    lambda x: x.sum(1) * 0.3,
    lambda x: x.std(-1, unbiased=False),
    ndim=(3, 4, 5),
)
simple("centre", lambda x: x - x.mean(-1, keepdim=True), lambda x: x - x.amax(1, keepdim=True), lambda x: x - x.mean())
simple(
    "pool",
    lambda x: F.max_pool2d(x, 2),
    lambda x: F.avg_pool2d(x, 3, 1, 1),
    lambda x: F.adaptive_avg_pool2d(x, 2),
    lambda x: F.lp_pool2d(x, 2, 2),
    ndim=(4,),
)
simple(
    "interpolate",
    lambda x: F.interpolate(x, scale_factor=2.0),
    lambda x: F.interpolate(x, size=(4, 4), mode="bilinear"),
    lambda x: F.interpolate(x, size=[s + 1 for s in x.shape[2:]], mode="bicubic"),
    lambda x: F.interpolate(x, size=x.shape[-1]),
    ndim=(4,),
)
simple(
    "pixel shuffle",
    lambda x: F.pixel_shuffle(x, 2),
    lambda x: F.pixel_unshuffle(x, 2),
    lambda x: F.channel_shuffle(x, 2),
    ndim=(4,),
)
simple(
    "pad",
    lambda x: F.pad(x, (1, 0)),
    lambda x: F.pad(x, (0, 0, 1, 1)),
    lambda x: F.pad(x, (0, 0, 0, 0, 0, 2)),
    lambda x: F.pad(x, (-1, 0)),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    lambda x: F.pad(x, (0, 2), value=0.5),
    ndim=(3, 4),
)
simple(
    "roll",
    lambda x: x.roll(1, 1),
    lambda x: torch.roll(x, 2, -1),
    lambda x: x.flip(1),
    lambda x: x.flip(-1),
    lambda x: x.roll((1, 1), (1, 2)),
    ndim=(3, 4),
)
simple("cumsum", lambda x: x.cumsum(1) * 0.3, lambda x: x.cumsum(-1) * 0.3, lambda x: x.cumsum(-2) * 0.2, ndim=(3, 4))
simple(
    "slice",
    lambda x: x[:, 1:],
    lambda x: x[..., :-1],
    lambda x: x[:, ::2],
    lambda x: x[:, :3],
    lambda x: x[..., 1::2],
    lambda x: x[..., : x.shape[-1] // 2],
)
simple(
    "index",
    lambda x: x[:, [1, 0, 1]],
    lambda x: x.index_select(1, torch.tensor([2, 0])),
    lambda x: x[..., [0, 2]],
    lambda x: x.gather(1, torch.zeros_like(x[:, :2], dtype=torch.long) + 1),
    lambda x: x.take_along_dim(torch.tensor([[1, 0]]), 1) if x.ndim == 2 else x[:, 1:2],
    lambda x: x.unbind(1)[1],
)
simple(
    "extra axis",
    lambda x: x[:, None],
    lambda x: x.unsqueeze(-1).expand(*x.shape, 2),
    lambda x: torch.stack([x, x.tanh()], 1),
    ndim=(2, 3),
)
simple(
    "repeat",
    lambda x: x.repeat(*[1] * (x.ndim - 1), 2),
    lambda x: torch.cat([x, x], 1),
    lambda x: x.repeat_interleave(2, 1),
    lambda x: x.repeat_interleave(2, -1),
)
simple(
    "gram",
    lambda x: x @ x.mT,
    lambda x: x.mT @ x * 0.3,
    lambda x: torch.einsum("bnc,bmc->bnm", x, x),
    lambda x: torch.cdist(x, x),
    ndim=(3,),
)
simple("outer", lambda x: x[:, :, None] * x[:, None], lambda x: torch.einsum("bi,bj->bij", x, x).flatten(1), ndim=(2,))


@unary("heads")
def _(m: Part, x: Tensor, units: int, variant: int):

    m.heads = divisor(x.shape[-1], 2, 3, 4)
    heads, m.each = m.heads, x.shape[-1] // m.heads
    m.scale = nn.Parameter(torch.rand(m.heads, 1) + 0.5)
    return (
        lambda m, x: (x.unflatten(-1, (m.heads, -1)) * m.scale).flatten(-2),
        lambda m, x: x.view(*x.shape[:-1], m.heads, x.shape[-1] // m.heads).mean(-1),
        lambda m, x: x.reshape(*x.shape[:-1], heads, -1).amax(-1),
        lambda m, x: einops.reduce(x, "... (h d) -> ... d", "mean", h=m.heads),
        lambda m, x: einops.rearrange(x, "... (h d) -> ... (d h)", d=m.each),
        lambda m, x: x.unflatten(-1, (-1, heads)).softmax(-1).flatten(-2),
    )[variant % 6]


@unary("map")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    side = math.isqrt(x.shape[1])
    need(side > 1, side * side == x.shape[1])
    m.size = (side, side)
    return (
        lambda m, x: x.transpose(1, 2).unflatten(2, m.size),
        lambda m, x: x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side),
        lambda m, x: einops.rearrange(x, "b (h w) c -> b c h w", h=m.size[0]),
        lambda m, x: x.view(x.shape[0], *m.size, -1).permute(0, 3, 1, 2),
    )[variant % 4]


# -- two values
def same(name: str, *runs: Callable[[Tensor, Tensor], Tensor]) -> None:
    @binary(name)
    def make(m: Part, x: Tensor, y: Tensor, units: int, variant: int):
        need(x.shape == y.shape)
        run = runs[variant % len(runs)]
        return lambda m, x, y: run(x, y)


same(
    "add",
    lambda x, y: x + y,
    lambda x, y: x - 0.5 * y,
    lambda x, y: torch.lerp(x, y, 0.3),
    lambda x, y: x.clone().add_(y),
)
same(
    "multiply",
    lambda x, y: x * y,
    lambda x, y: x * y.sigmoid(),
    lambda x, y: torch.maximum(x, y),
    lambda x, y: torch.where(x > 0, x, y),
)
same(
    "stack",
    lambda x, y: torch.stack([x, y], 1).mean(1),
    lambda x, y: torch.stack([x, y], -1).amax(-1),
    lambda x, y: torch.stack([x, y]).sum(0),
    lambda x, y: torch.cat([x[None], y[None]]).prod(0),
)
same(
    "cosine",
    lambda x, y: F.cosine_similarity(x, y, -1)[..., None] * x,
    lambda x, y: (x * y).sum(-1, keepdim=True).tanh() + y,
)


@binary("concatenate")
def _(m: Part, x: Tensor, y: Tensor, units: int, variant: int):
    need(x.ndim == y.ndim)
    axes = (channels(x), 1, x.ndim - 1)
    axis = axes[variant % 3]
    if x.ndim == 4 and variant == 3:
        return lambda m, x, y: torch.cat([x, F.interpolate(y, size=x.shape[2:], mode="bilinear")], 1)
    return lambda m, x, y: torch.cat([x, y], axis)


@binary("broadcast")
def _(m: Part, x: Tensor, y: Tensor, units: int, variant: int):
    need(x.ndim > y.ndim, y.ndim == 2, x.shape[channels(x)] == y.shape[1])
    if x.ndim == 4:
        return (lambda m, x, y: x * y[:, :, None, None], lambda m, x, y: x + y.view(*y.shape, 1, 1))[variant % 2]
    need(x.ndim == 3)
    return (lambda m, x, y: x * y[:, None], lambda m, x, y: torch.einsum("bnc,bc->bnc", x, y))[variant % 2]


@binary("project and add")
def _(m: Part, x: Tensor, y: Tensor, units: int, variant: int):
    c = x.shape[channels(x)]
    if x.ndim == 4:
        need(y.ndim == 4)
        m.conv = nn.Conv2d(y.shape[1], c, 1)
        return lambda m, x, y: x + F.interpolate(m.conv(y), size=x.shape[2:], mode="nearest")
    m.scale, m.shift = nn.Linear(y.shape[-1], c), nn.Linear(y.shape[-1], c)
    need(y.ndim == 2 or y.shape[:-1] == x.shape[:-1])
    if y.ndim == 2 and x.ndim == 3:  # adaptive norms
        return (
            lambda m, x, y: F.layer_norm(x, x.shape[-1:]) * (1 + m.scale(y)[:, None]) + m.shift(y)[:, None],
            lambda m, x, y: x * m.scale(y).unsqueeze(1),
        )[variant % 2]
    return lambda m, x, y: x * m.scale(y).sigmoid() + m.shift(y)


@binary("cross attention")
def _(m: Part, x: Tensor, y: Tensor, units: int, variant: int):
    need(x.ndim == y.ndim == 3)
    m.heads = divisor(units, 2, 3, 4)
    m.q, m.k, m.v = nn.Linear(x.shape[-1], units), nn.Linear(y.shape[-1], units), nn.Linear(y.shape[-1], units)
    m.proj = nn.Linear(units, x.shape[-1])
    m.block = nn.MultiheadAttention(units, m.heads, batch_first=True)

    def run(m: Part, x: Tensor, y: Tensor) -> Tensor:
        if variant % 3 == 2:
            return x + m.proj(m.block(m.q(x), m.k(y), m.v(y))[0])
        q, k, v = (einops.rearrange(part, "b n (h d) -> b h n d", h=m.heads) for part in (m.q(x), m.k(y), m.v(y)))
        weights = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
        out = torch.einsum("bhnm,bhmd->bnhd", weights, v) if variant % 3 else (weights @ v).transpose(1, 2)
        return x + m.proj(out.flatten(2))

    return run


@binary("product")
def _(m: Part, x: Tensor, y: Tensor, units: int, variant: int):
    need(x.ndim == y.ndim == 3)
    if variant % 3 == 0:
        need(x.shape[-1] == y.shape[-1])
        return lambda m, x, y: x @ y.mT * x.shape[-1] ** -0.5
    if variant % 3 == 1:
        need(x.shape[1] == y.shape[1])
        return lambda m, x, y: x.mT @ y * 0.3
    need(x.shape[-1] == y.shape[-1])
    return lambda m, x, y: (x @ y.mT).softmax(-1) @ y


@binary("bilinear")
def _(m: Part, x: Tensor, y: Tensor, units: int, variant: int):
    need(x.ndim == y.ndim == 2)
    m.weight, m.layer = (
        nn.Parameter(torch.randn(units, x.shape[1], y.shape[1]) * 0.1),
        nn.Bilinear(x.shape[1], y.shape[1], units),
    )
    return (
        lambda m, x, y: torch.einsum("bi,oij,bj->bo", x, m.weight, y),
        lambda m, x, y: torch.einsum("bi,bj->bij", x, y).flatten(1),
        lambda m, x, y: m.layer(x, y),
    )[variant % 3]
