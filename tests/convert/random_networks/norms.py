"""Normalisation, pointwise operations, positions and gates."""

from __future__ import annotations

import einops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convert.random_networks.parts import (
    Part,
    channels,
    divisor,
    grid,
    need,
    simple,
    sinusoid,
    unary,
    vector,
    weight,
)


# -- normalisation
@unary("layer norm")
def _(m: Part, x: Tensor, units: int, variant: int):
    c, axis = x.shape[channels(x)], channels(x)
    m.norm, m.weight, m.bias, m.dims = nn.LayerNorm(c), vector(c), vector(c), (c,)
    inner = (
        lambda m, x: m.norm(x),
        lambda m, x: F.layer_norm(x, x.shape[-1:], m.weight, m.bias),
        lambda m, x: F.layer_norm(x, (x.shape[-1],)),
        lambda m, x: F.layer_norm(x, m.dims, m.weight),
        lambda m, x: F.rms_norm(x, (x.shape[-1],), m.weight),
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.weight,
    )[variant % 6]
    return (lambda m, x: inner(m, x.movedim(1, -1)).movedim(-1, 1)) if axis == 1 else inner


@unary("norm by hand")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.weight, m.bias = vector(x.shape[1]), vector(x.shape[1])

    def over_channels(m: Part, x: Tensor) -> Tensor:
        y = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-3).sqrt()
        return m.weight[:, None, None] * y + m.bias[:, None, None]

    def over_places(m: Part, x: Tensor) -> Tensor:  # GRN
        size = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x + x * (size / (size.mean(1, keepdim=True) + 1e-3)) * m.weight.view(1, -1, 1, 1)

    return (over_channels, over_places)[variant % 2]


@unary("batch norm")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim in (2, 4))
    c = x.shape[1]
    m.norm = (nn.BatchNorm2d if x.ndim == 4 else nn.BatchNorm1d)(c, affine=variant % 3 > 0)
    return lambda m, x: m.norm(x)


@unary("group norm")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim in (2, 3, 4))
    c = x.shape[1]
    m.groups, m.weight, m.bias = divisor(c, 2, 4, 3), vector(c), vector(c)
    m.norm, m.instance = nn.GroupNorm(m.groups, c), nn.InstanceNorm2d(c, affine=True)
    need(variant % 6 < 3 or x.ndim == 4)
    return (
        lambda m, x: m.norm(x),
        lambda m, x: F.group_norm(x, m.groups, m.weight, m.bias),
        lambda m, x: F.group_norm(x, 1, m.weight),
        lambda m, x: m.instance(x),
        lambda m, x: F.instance_norm(x),
        lambda m, x: F.instance_norm(x, weight=m.weight, bias=m.bias),
    )[variant % 6]


@unary("normalize")
def _(m: Part, x: Tensor, units: int, variant: int):
    dim = (channels(x), x.ndim - 1)[variant % 2]
    return (
        lambda m, x: F.normalize(x, dim=dim),
        lambda m, x: x / (x.norm(dim=dim, keepdim=True) + 1e-3),
        lambda m, x: x / (x.abs().amax(dim, keepdim=True) + 1e-3),
    )[variant // 2 % 3]


@unary("weight norm")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim != 4)
    m.layer = nn.utils.parametrizations.weight_norm(nn.Linear(x.shape[-1], units), dim=(0, 1)[variant % 2])
    return lambda m, x: m.layer(x)


simple(
    "softmax",
    lambda x: x.softmax(channels(x)),
    lambda x: F.log_softmax(x, -1),
    lambda x: x.softmax(-1),
    lambda x: torch.logsumexp(x, -1, keepdim=True) - x,
)
simple("relu", F.relu, F.gelu, F.silu, torch.sigmoid, torch.tanh, lambda x: F.leaky_relu(x, 0.1))
simple("relu in place", lambda x: x.clone().relu_(), lambda x: F.relu_(x + 0.1), lambda x: (x * 1).clamp_(-1, 1))
simple("pointwise", F.softplus, F.hardswish, lambda x: x.abs(), lambda x: x.clamp(-1, 2), lambda x: x * x * 0.3, F.elu)
simple(
    "where",
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x.masked_fill(x < -0.5, 0.3),
    lambda x: x * (x > 0),
    lambda x: torch.where(x > x.mean(-1, keepdim=True), x, torch.zeros_like(x)),
)
simple("dropout", lambda x: F.dropout(x, 0.5, training=False), lambda x: x.detach() * 0.5 + x)


@unary("scale and shift")
def _(m: Part, x: Tensor, units: int, variant: int):
    c = x.shape[channels(x)]
    m.scale, m.shift, m.one, m.prelu = vector(c), vector(c), nn.Parameter(torch.ones(1)), nn.PReLU(c)
    broad = (lambda t: t[:, None, None]) if x.ndim == 4 else (lambda t: t)
    return (
        lambda m, x: x * broad(m.scale) + broad(m.shift),
        lambda m, x: torch.addcmul(x, x, broad(m.scale)),
        lambda m, x: x * m.one,
        lambda m, x: x + broad(m.shift) * m.one,
        lambda m, x: x.clone().mul_(broad(m.scale)).add_(broad(m.shift)),
        lambda m, x: m.prelu(x) if x.ndim != 3 else m.prelu(x.transpose(1, 2)).transpose(1, 2),
    )[variant % 6]


@unary("positions")
def _(m: Part, x: Tensor, units: int, variant: int):
    m.table = nn.Parameter(torch.randn(1, *x.shape[1:]) * 0.3)
    if x.ndim == 3:
        m.token, m.cache = nn.Parameter(torch.randn(1, 1, x.shape[2]) * 0.3), {}
        m.register_buffer("sinusoid", sinusoid(x.shape[1] + 3, x.shape[2]).clone())

        def kept(m: Part, x: Tensor) -> Tensor:
            key = "table", x.shape[1]
            if key not in m.cache:
                m.cache[key] = m.table[:, : x.shape[1]] * 0.5
            return x + m.cache[key]

        return (
            lambda m, x: x + m.table,
            lambda m, x: x + sinusoid(x.shape[1], x.shape[2]),
            lambda m, x: x + m.sinusoid[: x.shape[1]],
            lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1),
            kept,
            lambda m, x: torch.cat([einops.repeat(m.token, "1 1 d -> b 1 d", b=x.shape[0]), x], dim=1),
        )[variant % 6]
    need(x.ndim == 4)
    return (
        lambda m, x: x + m.table,
        lambda m, x: x * (1 + grid(*x.shape[2:])),
        lambda m, x: torch.cat([x, grid(*x.shape[-2:]).expand(x.shape[0], 1, -1, -1)], 1),
        lambda m, x: x + F.interpolate(m.table[..., ::2, ::2], size=x.shape[-2:], mode="bilinear"),
        lambda m, x: x + m.table.flatten(2).transpose(1, 2).mT.unflatten(2, x.shape[2:]),
    )[variant % 5]


@unary("in place")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim in (3, 4), x.shape[1] > 2)
    m.shift = vector(x.shape[channels(x)])

    def first_token(m: Part, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = x[:, 0] * 2
        return x

    def halves(m: Part, x: Tensor) -> Tensor:
        x = x.clone()
        k = x.shape[-1] // 2
        x[..., :k] += x[..., -k:]
        return x

    def filled(m: Part, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, 1:] = x[:, :-1]
        return out

    def shifted(m: Part, x: Tensor) -> Tensor:  # TSM
        out, fold = torch.zeros_like(x), x.shape[-1] // 4
        out[:, :-1, ..., :fold] = x[:, 1:, ..., :fold]
        out[..., fold:] = x[..., fold:]
        return out

    def copied(m: Part, x: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        out.copy_(x)
        return out.add_(1)

    return (first_token, halves, filled, shifted, copied)[variant % 5]


# -- gates and pieces
@unary("squeeze and excite")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.down, m.up = nn.Linear(x.shape[1], units), nn.Linear(units, x.shape[1])
    m.weight, m.eca = weight(x.shape[1], x.shape[1], 1, 1), nn.Conv1d(1, 1, 3, padding=1, bias=False)
    return (
        lambda m, x: x * m.up(m.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None],
        lambda m, x: x * F.conv2d(F.adaptive_avg_pool2d(x, 1), m.weight).sigmoid().expand_as(x),
        lambda m, x: x * m.eca(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None].sigmoid(),
        lambda m, x: (
            x * torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1).sum(1, keepdim=True).sigmoid()
        ),
        lambda m, x: x * einops.rearrange(m.up(einops.reduce(x, "b c h w -> b c", "max")), "b c -> b c 1 1").tanh(),
        lambda m, x: x * F.hardsigmoid(m.up(m.down(x.flatten(2).amax(-1)))).view(x.size(0), -1, 1, 1),
    )[variant % 6]


@unary("gate")
def _(m: Part, x: Tensor, units: int, variant: int):
    axis = channels(x)
    c = x.shape[axis]
    need(c % 2 == 0, c > 2)
    half = c // 2
    m.half, m.left = half, half // 2 + 1

    def by_split(m: Part, x: Tensor) -> Tensor:
        first, second = x.split([m.left, x.shape[axis] - m.left], axis)
        return torch.cat([first.sigmoid(), second], axis)

    return (
        lambda m, x: torch.mul(*x.chunk(2, axis)),
        lambda m, x: F.glu(x, axis),
        lambda m, x: torch.sub(*x.split(x.shape[axis] // 2, axis)),
        lambda m, x: x.narrow(axis, 0, m.half) * x.narrow(axis, m.half, m.half).sigmoid(),
        by_split,
        lambda m, x: torch.mul(*torch.split(x, half, dim=axis)),
    )[variant % 6]


@unary("pieces")
def _(m: Part, x: Tensor, units: int, variant: int):
    axis = channels(x)
    need(x.shape[axis] >= 4)
    m.weights, m.mix = nn.Parameter(torch.randn(3)), nn.Linear(x.shape[axis] // 2, x.shape[axis] // 2)

    def multi_branch(m: Part, x: Tensor) -> Tensor:
        first, *rest = x.chunk(4, axis)
        return torch.cat([first, *(part.relu() for part in rest)], axis)

    def hierarchical(m: Part, x: Tensor) -> Tensor:  # Res2Net
        parts, found = torch.tensor_split(x, 2, axis), []
        for part in parts:
            found.append(part if not found else part + found[-1])
        return torch.cat(found, axis)

    def half_done(m: Part, x: Tensor) -> Tensor:
        k = x.shape[axis] // 2
        first, second = (x[:, :k], x[:, k:]) if axis == 1 else (x[..., :k], x[..., k:])
        return torch.cat((second, first.tanh()), axis)

    def interleaved(m: Part, x: Tensor) -> Tensor:
        first, second = (x[:, ::2], x[:, 1::2]) if axis == 1 else (x[..., ::2], x[..., 1::2])
        return torch.stack((-second, first), -1).flatten(-2) if axis != 1 else torch.cat((-second, first), 1)

    return (
        multi_branch,
        hierarchical,
        half_done,
        interleaved,
        lambda m, x: sum(
            w * part for w, part in zip(m.weights[:2].softmax(0), x.unflatten(axis, (2, -1)).unbind(axis), strict=True)
        ),
        lambda m, x: x.unflatten(axis, (-1, 2)).flip(axis + 1).flatten(axis, axis + 1),
    )[variant % 6]
