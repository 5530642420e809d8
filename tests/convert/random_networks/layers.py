"""Operations with weights, and attention."""

from __future__ import annotations

import math

import einops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convert.random_networks.parts import (
    Part,
    causal_mask,
    channels,
    divisor,
    need,
    unary,
    vector,
    weight,
)


# -- layers
@unary("conv")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    kernel, stride = ((3, 1), (1, 1), (3, 2))[variant % 3]
    m.conv = nn.Conv2d(x.shape[1], units, kernel, stride, kernel // 2, bias=variant < 3)
    return lambda m, x: m.conv(x)


@unary("conv, norm, relu")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.conv, m.bn = nn.Conv2d(x.shape[1], units, 3, padding=1, bias=False), nn.BatchNorm2d(units)
    return lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True)


@unary("functional conv")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.weight, m.bias, m.padding = weight(units, x.shape[1], 3, 3), vector(units), 1
    return (
        lambda m, x: F.conv2d(x, m.weight, m.bias, padding=m.padding),
        lambda m, x: F.conv2d(x, m.weight * m.weight.abs().amax((1, 2, 3), keepdim=True), padding=1),
        lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), m.weight),
    )[variant % 3]


@unary("depthwise conv")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    c = x.shape[1]
    m.conv = nn.Conv2d(c, c * (1 + variant % 2), 3, padding=1, groups=c)
    return lambda m, x: m.conv(x)


@unary("functional depthwise conv")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    c = x.shape[1]
    m.weight, m.channels = weight(c, 1, 3, 3), c
    return (
        lambda m, x: F.conv2d(x, m.weight, padding=1, groups=x.shape[1]),
        lambda m, x: F.conv2d(x, m.weight, padding=1, groups=m.channels),
        lambda m, x: F.conv2d(x, m.weight, padding=1, groups=c),
        lambda m, x: F.conv2d(x, m.weight, padding=1, groups=len(m.weight)),
    )[variant % 4]


@unary("blur")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.register_buffer("kernel", torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0]))[None, None] / 16)
    return (
        lambda m, x: F.conv2d(x, m.kernel.expand(x.shape[1], -1, -1, -1), padding=1, groups=x.shape[1]),
        lambda m, x: F.conv2d(x, m.kernel.repeat(x.shape[1], 1, 1, 1), stride=2, padding=1, groups=x.shape[1]),
        lambda m, x: F.conv2d(x.flatten(0, 1)[:, None], m.kernel, padding=1).view(x.shape),
    )[variant % 3]


@unary("grouped conv")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    groups = divisor(math.gcd(x.shape[1], units), 2, 3, 4)
    m.conv = nn.Conv2d(x.shape[1], units, 3, padding=1, groups=groups)
    return lambda m, x: m.conv(x)


@unary("functional grouped conv")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    groups = divisor(math.gcd(x.shape[1], units), 4, 2, 3)
    m.weight, m.groups = weight(units, x.shape[1] // groups, 1, 1), groups
    return (
        lambda m, x: F.conv2d(x, m.weight, groups=groups),
        lambda m, x: F.conv2d(x, m.weight, groups=m.groups),
        lambda m, x: F.conv2d(x, m.weight, groups=x.shape[1] // m.weight.shape[1]),
    )[variant % 3]


@unary("transposed conv")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    c = x.shape[1]
    groups = (1, c, divisor(math.gcd(c, units), 2, 3) if variant % 3 == 2 else 1)[variant % 3]
    m.conv = nn.ConvTranspose2d(c, c if groups == c else units, 3, padding=1, groups=groups)
    return lambda m, x: m.conv(x)


@unary("kernels from the image")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    c = x.shape[1]
    m.kernel = nn.Linear(c, c * 9)

    def run(m: Part, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernels = m.kernel(x.mean((2, 3))).reshape(b * c, 1, 3, 3)
        return F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b * c).view(b, c, h, w)

    return run


@unary("experts")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.experts, m.route = nn.Parameter(torch.randn(3, units, x.shape[1], 3, 3) * 0.2), nn.Linear(x.shape[1], 3)

    def run(m: Part, x: Tensor) -> Tensor:
        mix = m.route(x.mean((0, 2, 3))).softmax(0)
        if variant % 2:
            return F.conv2d(x, torch.einsum("e,eoikl->oikl", mix, m.experts), padding=1)
        return F.conv2d(x, (mix[:, None, None, None, None] * m.experts).sum(0), padding=1)

    return run


@unary("conv along tokens")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    n, c = x.shape[1:]
    m.conv = nn.Conv1d(c, c if variant % 3 == 1 else units, 3, padding=1, groups=c if variant % 3 == 1 else 1)
    m.mixing = nn.Conv1d(n, units, 1)
    return (lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2), lambda m, x: m.mixing(x))[variant % 3 == 2]


@unary("linear")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim != 4 or variant == 5)
    m.layer = nn.Linear(x.shape[-1], units, bias=variant % 2 == 0)
    return lambda m, x: m.layer(x)


@unary("linear over channels")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.layer = nn.Linear(x.shape[1], units)
    return (
        lambda m, x: m.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        lambda m, x: m.layer(x.movedim(1, -1)).movedim(-1, 1).contiguous(),
        lambda m, x: m.layer(x.flatten(2).mT).mT.reshape(x.shape[0], -1, *x.shape[2:]),
    )[variant % 3]


@unary("functional linear")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim != 4)
    m.weight, m.bias = weight(units, x.shape[-1]), vector(units)
    return (
        lambda m, x: F.linear(x, m.weight, m.bias),
        lambda m, x: x @ m.weight.T + m.bias,
        lambda m, x: torch.matmul(x, m.weight.t()),
        lambda m, x: F.linear(x, F.normalize(m.weight, dim=1)) * m.bias,
        lambda m, x: F.linear(x, m.weight * (m.weight.abs() > 0.1), m.bias),
        lambda m, x: torch.tensordot(x, m.weight, ([-1], [1])),
    )[variant % 6]


@unary("einsum")
def _(m: Part, x: Tensor, units: int, variant: int):
    c, axis = x.shape[channels(x)], channels(x)
    m.weight, m.scale = weight(units, c), vector(c)
    if variant % 4 == 3:
        m.heads = divisor(c, 2, 3, 4)
        m.each = weight(m.heads, c // m.heads, units)
        need(x.ndim == 3)
        return lambda m, x: torch.einsum("bnhd,hde->bne", x.unflatten(-1, (m.heads, -1)), m.each)
    if axis == 1:
        return (
            lambda m, x: torch.einsum("oc,bchw->bohw", m.weight, x),
            lambda m, x: torch.einsum("bchw,c->bchw", x, m.scale),
            lambda m, x: einops.einsum(x, m.weight, "b c h w, o c -> b o h w"),
        )[variant % 4]
    return (
        lambda m, x: torch.einsum("b...c,oc->b...o", x, m.weight),
        lambda m, x: torch.einsum("...c,c->...c", x, m.scale),
        lambda m, x: einops.einsum(x, m.weight, "b ... c, o c -> b ... o"),
    )[variant % 4]


@unary("mlp")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim != 4)
    c = x.shape[-1]
    m.up, m.gate, m.down = nn.Linear(c, 2 * units), nn.Linear(c, 2 * units), nn.Linear(2 * units, c)
    return (
        lambda m, x: x + m.down(F.gelu(m.up(x))),
        lambda m, x: x + m.down(F.silu(m.gate(x)) * m.up(x)),
        lambda m, x: m.down(m.up(x).relu().square()),
    )[variant % 3]


@unary("mixer")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    m.up, m.down = nn.Linear(x.shape[1], units), nn.Linear(units, x.shape[1])
    return lambda m, x: x + m.down(m.up(x.transpose(1, 2)).relu()).transpose(1, 2)


@unary("recurrent layer")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    kind = (nn.GRU, nn.LSTM, nn.RNN)[variant % 3]
    m.rnn = kind(x.shape[-1], units, batch_first=True, bidirectional=variant >= 3)
    return lambda m, x: m.rnn(x)[0]


@unary("recurrence by hand")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    m.read, m.state, m.start = nn.Linear(x.shape[-1], units), nn.Linear(units, units), nn.Parameter(torch.zeros(units))

    def run(m: Part, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[0], m.start.shape[0]) if variant % 2 else m.start.expand(x.shape[0], -1)]
        for token in m.read(x).unbind(1):
            states.append(torch.tanh(token + m.state(states[-1])))
        return torch.stack(states[1:], 1) if variant % 3 else states[-1]

    return run


# -- attention
@unary("attention")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    m.num_heads = divisor(units, 2, 3, 4)
    m.head_dim, heads = units // m.num_heads, m.num_heads
    m.scale = m.head_dim**-0.5
    m.qkv, m.proj = nn.Linear(x.shape[-1], 3 * units), nn.Linear(units, x.shape[-1])
    m.temperature = nn.Parameter(torch.ones(m.num_heads, 1, 1))

    def split(m: Part, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        return m.qkv(x).reshape(b, n, 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def fused(m: Part, x: Tensor) -> Tensor:
        return m.proj(F.scaled_dot_product_attention(*split(m, x)).transpose(1, 2).flatten(2))

    def plain(m: Part, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        y = (q * m.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return m.proj(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))

    def with_constant_heads(m: Part, x: Tensor) -> Tensor:
        q, k, v = (part.view(*x.shape[:2], heads, -1).transpose(1, 2) for part in m.qkv(x).chunk(3, -1))
        return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def by_einops(m: Part, x: Tensor) -> Tensor:
        q, k, v = einops.rearrange(m.qkv(x), "b n (three h d) -> three b h n d", three=3, h=m.num_heads)
        y = F.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v
        return m.proj(einops.rearrange(y, "b h n d -> b n (h d)"))

    def over_channels(m: Part, x: Tensor) -> Tensor:
        q, k, v = (part.mT for part in split(m, x))
        y = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * m.temperature).softmax(-1) @ v
        return m.proj(y.permute(0, 3, 1, 2).reshape(*x.shape[:2], -1))

    def without_softmax(m: Part, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        y = torch.einsum("bhnd,bhde->bhne", q.softmax(-1), torch.einsum("bhnd,bhne->bhde", k.softmax(-2), v))
        return m.proj(einops.rearrange(y, "b h n d -> b n (h d)"))

    return (fused, plain, with_constant_heads, by_einops, over_channels, without_softmax)[variant % 6]


@unary("attention with a mask")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    n, m.heads = x.shape[1], divisor(units, 2, 3, 4)
    m.q, m.kv, m.proj = nn.Linear(x.shape[-1], units), nn.Linear(x.shape[-1], 2 * units), nn.Linear(units, x.shape[-1])
    m.table = nn.Parameter(torch.randn(2 * n - 1, m.heads) * 0.1)
    m.register_buffer("places", torch.arange(n)[:, None] - torch.arange(n)[None] + n - 1)
    m.cache, m.mask = {}, None

    def bias(m: Part, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if variant % 6 == 0:
            return causal_mask(tokens)
        if variant % 6 == 1:
            return m.table[m.places].permute(2, 0, 1)
        if variant % 6 == 2:
            if tokens not in m.cache:
                m.cache[tokens] = torch.zeros(tokens, tokens, dtype=x.dtype).masked_fill(~causal_mask(tokens), -1e9)
            return m.cache[tokens]
        if variant % 6 == 3:
            if m.mask is None:
                m.mask = torch.ones(tokens, tokens, dtype=torch.bool).tril(1)
            return m.mask
        if variant % 6 == 4:
            return m.table[m.places.flatten()].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()[None]
        return (torch.arange(tokens)[:, None] >= torch.arange(tokens)[None]).to(x.dtype).log()

    def run(m: Part, x: Tensor) -> Tensor:
        q = m.q(x).unflatten(-1, (m.heads, -1)).transpose(1, 2)
        k, v = m.kv(x).unflatten(-1, (2, m.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias(m, x))
        return m.proj(y.transpose(1, 2).flatten(2))

    return run


@unary("attention with few keys")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    m.heads = divisor(units, 2, 3, 4)
    m.dim = units // m.heads
    m.q, m.kv, m.proj = nn.Linear(x.shape[-1], units), nn.Linear(x.shape[-1], 2 * m.dim), nn.Linear(units, x.shape[-1])

    def run(m: Part, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = m.q(x).view(b, n, m.heads, m.dim).transpose(1, 2)
        k, v = m.kv(x).view(b, n, 2, 1, m.dim).permute(2, 0, 3, 1, 4)
        if variant % 3 == 0:
            k, v = k.expand(-1, m.heads, -1, -1), v.expand(-1, m.heads, -1, -1)
        elif variant % 3 == 1:
            k, v = k.repeat_interleave(m.heads, 1), v.repeat_interleave(m.heads, 1)
        y = F.scaled_dot_product_attention(q, k, v) if variant % 3 < 2 else (q @ k.mT).softmax(-1) @ v
        return m.proj(y.transpose(1, 2).reshape(b, n, m.heads * m.dim))

    return run


@unary("rotary attention")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    m.heads = divisor(units, 2, 3)
    need(units // m.heads % 2 == 0)
    m.qkv, m.proj, dim = nn.Linear(x.shape[-1], 3 * units), nn.Linear(units, x.shape[-1]), units // m.heads
    angles = torch.arange(x.shape[1])[:, None] / 10 ** (torch.arange(dim // 2) / dim)
    m.register_buffer("angles", torch.cat([angles, angles], -1))

    def turned(m: Part, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * m.angles.cos() + torch.cat([-second, first], -1) * m.angles.sin()

    def run(m: Part, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (m.heads, -1)).transpose(1, 2) for part in m.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(turned(m, q), turned(m, k), v, is_causal=variant % 2 == 0)
        return m.proj(y.transpose(1, 2).flatten(2))

    return run


@unary("torch's attention")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    c = x.shape[-1]
    heads = divisor(c, 2, 3)
    if variant % 3 == 2:
        m.block = nn.TransformerEncoderLayer(c, heads, 2 * units, batch_first=True, norm_first=variant >= 3)
        return lambda m, x: m.block(x)
    m.attention = nn.MultiheadAttention(c, heads, batch_first=True)
    return lambda m, x: x + m.attention(x, x, x, need_weights=variant % 3 == 1)[0]


@unary("windows")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4, x.shape[2] % 2 == 0, x.shape[3] % 2 == 0)
    m.window, m.mix, m.table = 2, nn.Linear(x.shape[1], units), nn.Parameter(torch.randn(4, units) * 0.3)

    def run(m: Part, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if variant % 2:
            x = torch.roll(x, (-1, -1), (2, 3))
        k = m.window
        y = x.view(b, c, h // k, k, w // k, k).permute(0, 2, 4, 3, 5, 1).reshape(-1, k * k, c)
        y = m.mix(y) + m.table
        y = y.view(b, h // k, w // k, k, k, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h, w)
        return torch.roll(y, (1, 1), (2, 3)) if variant % 2 else y

    return run
