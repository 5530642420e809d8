"""Blocks of published networks, written as their authors write them."""

from __future__ import annotations

import einops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convert.random_networks.parts import Part, divisor, need, unary, vector, weight


@unary("patch merging")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4, x.shape[2] % 2 == 0, x.shape[3] % 2 == 0)
    m.norm, m.reduction = nn.LayerNorm(4 * x.shape[1]), nn.Linear(4 * x.shape[1], units)

    def run(m: Part, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if variant % 2:
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        else:
            corners = x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]
            x = torch.cat(corners, -1)
        return m.reduction(m.norm(x)).permute(0, 3, 1, 2)

    return run


@unary("coordinate attention")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    c = x.shape[1]
    m.down, m.rows, m.columns = nn.Conv2d(c, units, 1), nn.Conv2d(units, c, 1), nn.Conv2d(units, c, 1)

    def run(m: Part, x: Tensor) -> Tensor:
        _, _, h, w = x.size()
        y = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)], dim=2)
        rows, columns = torch.split(F.hardswish(m.down(y)), [h, w], dim=2)
        return x * m.rows(rows).sigmoid() * m.columns(columns.permute(0, 1, 3, 2)).sigmoid()

    return run


@unary("selective kernels")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    c = x.shape[1]
    m.small, m.large = nn.Conv2d(c, units, 3, padding=1), nn.Conv2d(c, units, 3, padding=2, dilation=2)
    m.down, m.up, m.units = nn.Linear(units, 6), nn.Linear(6, 2 * units), units

    def run(m: Part, x: Tensor) -> Tensor:
        branches = torch.stack([m.small(x), m.large(x)], 1)
        y = m.up(m.down(branches.sum(1).mean((2, 3))).relu())
        if variant % 3 == 0:
            y = y.reshape(-1, 2, m.units)
        else:
            y = y.view(x.shape[0], 2, -1) if variant % 3 == 1 else torch.stack(y.chunk(2, 1), 1)
        return (branches * y.softmax(1)[..., None, None]).sum(1)

    return run


@unary("shuffle block")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4, x.shape[1] % 2 == 0, x.shape[1] > 2)
    half = x.shape[1] // 2
    m.point, m.depth = nn.Conv2d(half, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half)

    def run(m: Part, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        left, right = x.chunk(2, dim=1)
        y = torch.cat([left, m.depth(m.point(right).relu())], 1)
        if variant % 3 == 0:
            return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        if variant % 3 == 1:
            return einops.rearrange(y, "b (g c) h w -> b (c g) h w", g=2)
        return F.channel_shuffle(y, 2)

    return run


@unary("ghost")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.made = units - 1 if variant % 2 else 2 * units
    m.first, m.cheap = nn.Conv2d(x.shape[1], units, 1), nn.Conv2d(units, units, 3, padding=1, groups=units)

    def run(m: Part, x: Tensor) -> Tensor:
        y = m.first(x).relu()
        return torch.cat([y, m.cheap(y)], 1)[:, : m.made]

    return run


@unary("dense connections")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    c = x.shape[1]
    m.a, m.b, m.c = nn.Conv2d(c, units, 1), nn.Conv2d(c + units, units, 1), nn.Conv2d(2 * units, c, 1)

    def run(m: Part, x: Tensor) -> Tensor:
        found = [x, m.a(x).relu()]
        found.append(m.b(torch.cat(found, 1)).tanh())
        if variant % 2:
            return torch.cat(found[::-1], 1)
        return m.c(torch.cat(found[1:], 1)) + x

    return run


@unary("fourier filter")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    _, c, h, w = x.shape
    m.filter = nn.Parameter(torch.randn(c, h, w // 2 + 1, 2) * 0.3)
    m.filters = nn.Parameter(torch.randn(h, w // 2 + 1, c, 2) * 0.3)

    def channels_first(m: Part, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(m.filter)
        return torch.fft.irfft2(y, s=x.shape[-2:], norm="ortho")

    def channels_last(m: Part, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho") * torch.view_as_complex(m.filters)
        return torch.fft.irfft2(y, s=x.shape[-2:], dim=(1, 2), norm="ortho").permute(0, 3, 1, 2)

    return (channels_first, channels_last)[variant % 2]


@unary("local attention")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.q, m.k, m.v = (nn.Conv2d(x.shape[1], units, 1) for _ in range(3))

    def run(m: Part, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = m.q(x), m.k(x), m.v(x)
        k, v = (F.unfold(part, 3, padding=1).view(b, -1, 9, h, w) for part in (k, v))
        weights = (q[:, :, None] * k).sum(1, keepdim=True).softmax(2)
        return (weights * v).sum(2)

    return run


@unary("involution")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.groups = divisor(x.shape[1], 2, 3, 5)
    m.reduce, m.span = nn.Conv2d(x.shape[1], units, 1), nn.Conv2d(units, 9 * m.groups, 1)

    def run(m: Part, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernel = m.span(m.reduce(x).relu()).view(b, m.groups, 9, h, w).unsqueeze(2)
        patches = F.unfold(x, 3, padding=1).view(b, m.groups, c // m.groups, 9, h, w)
        return (kernel * patches).sum(3).view(b, c, h, w)

    return run


@unary("latents")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    m.heads = divisor(units, 2, 3, 4)
    m.latents, m.q = nn.Parameter(torch.randn(4, units)), nn.Linear(units, units)
    m.kv, m.proj = nn.Linear(x.shape[-1], 2 * units, bias=False), nn.Linear(units, units)

    def run(m: Part, x: Tensor) -> Tensor:
        if variant % 2:
            latents = einops.repeat(m.latents, "n d -> b n d", b=x.shape[0])
        else:
            latents = m.latents.unsqueeze(0).expand(x.shape[0], -1, -1)
        k, v = m.kv(x).chunk(2, dim=-1)
        q, k, v = (einops.rearrange(t, "b n (h d) -> (b h) n d", h=m.heads) for t in (m.q(latents), k, v))
        y = torch.einsum("bij,bjd->bid", (torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5).softmax(-1), v)
        return latents + m.proj(einops.rearrange(y, "(b h) n d -> b n (h d)", h=m.heads))

    return run


@unary("talking heads")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    m.heads = divisor(units, 2, 3, 4)
    m.qk, m.v, m.proj = nn.Linear(x.shape[-1], 2 * units), nn.Linear(x.shape[-1], units), nn.Linear(units, x.shape[-1])
    m.mix, m.conv = nn.Linear(m.heads, m.heads), nn.Conv2d(m.heads, m.heads, 1)

    def run(m: Part, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k = m.qk(x).reshape(b, n, 2, m.heads, -1).permute(2, 0, 3, 1, 4)
        v = m.v(x).reshape(b, n, m.heads, -1).transpose(1, 2)
        weights = q @ k.transpose(-2, -1)
        weights = m.conv(weights) if variant % 2 else m.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + m.proj((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return run


@unary("axial attention")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.heads = divisor(units, 2, 3)
    m.qkv, m.proj, m.table = nn.Conv2d(x.shape[1], 3 * units, 1), nn.Conv2d(units, x.shape[1], 1), vector(units)

    def run(m: Part, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        qkv = m.qkv(x)
        if variant % 2:
            qkv = qkv.permute(0, 3, 1, 2).reshape(b * w, m.heads, -1, h)
        else:
            qkv = einops.rearrange(qkv, "b (g c) h w -> (b w) g c h", g=m.heads)
        q, k, v = qkv.chunk(3, dim=2)
        y = torch.einsum("bgij,bgcj->bgci", torch.einsum("bgci,bgcj->bgij", q, k).softmax(-1), v)
        y = y.reshape(b, w, -1, h).permute(0, 2, 3, 1) * m.table[:, None, None]
        return x + m.proj(y)

    return run


@unary("vlad")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    m.assign, m.centres = nn.Linear(x.shape[-1], 4), nn.Parameter(torch.randn(4, x.shape[-1]))

    def run(m: Part, x: Tensor) -> Tensor:
        soft = m.assign(x).softmax(-1)
        if variant % 2:
            residual = x.unsqueeze(2) - m.centres
            y = (residual * soft.unsqueeze(-1)).sum(1)
        else:
            y = torch.einsum("bnk,bnc->bkc", soft, x) - soft.sum(1)[..., None] * m.centres
        return F.normalize(F.normalize(y, dim=2).flatten(1), dim=1)

    return run


@unary("generalised mean")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.power, m.powers = nn.Parameter(torch.ones(1) * 3), vector(x.shape[1])
    return (
        lambda m, x: F.avg_pool2d(x.clamp(min=1e-3).pow(m.power), x.shape[-2:]).pow(1 / m.power).flatten(1),
        lambda m, x: x.abs().pow(m.powers[:, None, None]).mean((2, 3)),
    )[variant % 2]


@unary("tokens learner")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.maps = nn.Conv2d(x.shape[1], units, 1)
    m.proj = nn.Parameter(torch.randn(units, x.shape[1]) * 0.3)
    return (
        lambda m, x: torch.einsum("bkhw,bchw->bkc", m.maps(x).flatten(2).softmax(-1).view_as(m.maps(x)), x),
        lambda m, x: m.maps(x).flatten(2).softmax(-1) @ x.flatten(2).mT,
        lambda m, x: (m.maps(x).flatten(2).softmax(-1) @ x.flatten(2).mT) * m.proj,
    )[variant % 3]


@unary("routing")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    c = x.shape[-1]
    m.router = nn.Linear(c, 3)
    m.experts = nn.ModuleList(nn.Sequential(nn.Linear(c, units), nn.GELU(), nn.Linear(units, c)) for _ in range(3))
    m.up, m.down = nn.Parameter(torch.randn(3, c, units) * 0.3), nn.Parameter(torch.randn(3, units, c) * 0.3)

    def stacked(m: Part, x: Tensor) -> Tensor:
        outs = torch.stack([expert(x) for expert in m.experts], -1)
        return (outs * m.router(x).softmax(-1).unsqueeze(-2)).sum(-1)

    def batched(m: Part, x: Tensor) -> Tensor:
        hidden = torch.einsum("bnc,ecd->bned", x, m.up).relu()
        return torch.einsum("bned,edc,bne->bnc", hidden, m.down, m.router(x).softmax(-1))

    def best(m: Part, x: Tensor) -> Tensor:
        weights, chosen = m.router(x).softmax(-1).topk(2, -1)
        outs = torch.stack([expert(x) for expert in m.experts], 2)
        picked = outs.gather(2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        return (picked * weights[..., None]).sum(2)

    return (stacked, batched, best)[variant % 3]


@unary("state space")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    c = x.shape[-1]
    m.into, m.conv = nn.Linear(c, 2 * units), nn.Conv1d(units, units, 3, padding=2, groups=units)
    m.select, m.out, m.states = nn.Linear(units, 2 * 4 + 1), nn.Linear(units, c), 4
    m.decay, m.direct = nn.Parameter(torch.rand(units, 4)), vector(units)

    def run(m: Part, x: Tensor) -> Tensor:
        n = x.shape[1]
        y, gate = m.into(x).chunk(2, -1)
        y = F.silu(m.conv(y.transpose(1, 2))[..., :n]).transpose(1, 2)
        step, write, read = m.select(y).split([1, m.states, m.states], dim=-1)
        state, found = y.new_zeros(y.shape[0], y.shape[2], m.states), []
        for i in range(n):
            kept = torch.exp(-F.softplus(step[:, i, :, None]) * m.decay)
            state = kept * state + y[:, i, :, None] * write[:, i, None, :]
            found.append(torch.einsum("bdn,bn->bd", state, read[:, i]))
        return m.out((torch.stack(found, 1) + y * m.direct) * F.silu(gate))

    return run


@unary("class attention")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3, x.shape[1] > 1)
    m.token, m.num_heads = nn.Parameter(torch.randn(1, 1, x.shape[-1])), divisor(x.shape[-1], 2, 3, 4)
    m.q, m.k, m.v, m.gamma = *(nn.Linear(x.shape[-1], x.shape[-1]) for _ in range(3)), vector(x.shape[-1])

    def run(m: Part, x: Tensor) -> Tensor:
        token = m.token.expand(len(x), -1, -1)
        u = torch.cat((token, x), dim=1)
        b, n, c = u.shape
        q = m.q(u[:, 0]).unsqueeze(1).reshape(b, 1, m.num_heads, c // m.num_heads).permute(0, 2, 1, 3)
        k = m.k(u).reshape(b, n, m.num_heads, c // m.num_heads).permute(0, 2, 1, 3)
        v = m.v(u).reshape(b, n, m.num_heads, c // m.num_heads).permute(0, 2, 1, 3)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 1, c)
        token = token + m.gamma * y
        return token[:, 0] if variant % 2 else torch.cat([token, x], 1)

    return run


@unary("sampled")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    m.offsets, m.heads = nn.Conv2d(x.shape[1], 2, 3, padding=1), divisor(x.shape[1], 2, 3, 5)
    m.head_offsets = nn.Conv2d(x.shape[1], 2 * m.heads, 1)

    def warped(m: Part, x: Tensor) -> Tensor:
        grid = m.offsets(x).permute(0, 2, 3, 1).tanh()
        return F.grid_sample(x, grid, mode="bilinear", align_corners=False)

    def by_heads(m: Part, x: Tensor) -> Tensor:  # deformable attention
        b, c, h, w = x.shape
        grid = m.head_offsets(x).view(b * m.heads, 2, h, w).permute(0, 2, 3, 1).tanh()
        y = F.grid_sample(x.reshape(b * m.heads, c // m.heads, h, w), grid, align_corners=False)
        return y.reshape(b, c, h, w)

    return (warped, by_heads)[variant % 2]


@unary("scattered")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3, x.shape[1] >= 4)
    edges = torch.tensor([[0, 1, 2, 3, 1, 0], [1, 2, 3, 0, 3, 2]])
    m.register_buffer("edges", edges)
    m.message = nn.Linear(2 * x.shape[-1], units)

    def run(m: Part, x: Tensor) -> Tensor:
        start, end = m.edges
        y = m.message(torch.cat([x[:, start], x.index_select(1, end)], -1)).relu()
        out = y.new_zeros(y.shape[0], x.shape[1], y.shape[2])
        if variant % 3 == 0:
            return out.index_add(1, end, y)
        places = end[None, :, None].expand_as(y)
        return out.scatter_add(1, places, y) if variant % 3 == 1 else out.scatter_reduce(1, places, y, "amax")

    return run


@unary("sorted")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3, x.shape[1] >= 3)
    m.table, m.layer = nn.Embedding(x.shape[1], x.shape[2]), weight(units, x.shape[2])
    return (
        lambda m, x: x.sort(1).values @ m.layer.T,
        lambda m, x: x.topk(3, dim=1).values,
        lambda m, x: x + m.table(torch.arange(x.shape[1])),
        lambda m, x: x.gather(1, x.mean(-1).argsort(1)[..., None].expand_as(x)[:, :3]),
        lambda m, x: torch.max(x, 1)[0],
        lambda m, x: x.roll(2) if x.shape[0] == 1 else torch.roll(x, 1, 1),
    )[variant % 6]


@unary("carafe")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4, x.shape[2] <= 4)
    m.encode = nn.Conv2d(x.shape[1], 4 * 9, 3, padding=1)

    def run(m: Part, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        masks = F.pixel_shuffle(m.encode(x), 2).softmax(1)
        patches = F.unfold(x, 3, padding=1).view(b, c * 9, h, w)
        patches = F.interpolate(patches, scale_factor=2).view(b, c, 9, 2 * h, 2 * w)
        return (patches * masks[:, None]).sum(2)

    return run


@unary("sizes in Python")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3, x.shape[-1] >= 4)
    m.dims, m.layer, m.each = [x.shape[-1], units], nn.Linear(x.shape[-1], units), divisor(x.shape[-1], 2, 3, 5)
    constant = x.shape[-1]

    def checked(m: Part, x: Tensor) -> Tensor:
        _, _, c = x.shape
        assert c == m.dims[0], f"expected {m.dims[0]} channels"
        y = m.layer(x)
        return x + y if y.shape[-1] == c else y * c**-0.5

    def zeros_joined(m: Part, x: Tensor) -> Tensor:
        start = x.new_zeros(x.shape[0], 1, x.shape[-1])
        return torch.cat([start, x, torch.ones(x.size(0), 1, x.size(2), dtype=x.dtype)], 1)

    def by_fraction(m: Part, x: Tensor) -> Tensor:
        k = int(x.shape[-1] * 0.5)
        return torch.cat([x[..., k:].relu(), x[..., :k]], -1)

    def regrouped(m: Part, x: Tensor) -> Tensor:
        y = x.reshape(*x.shape[:-1], m.each, x.shape[-1] // m.each)
        return (y - y.mean(-1, keepdim=True)).reshape(x.shape)

    def ramp(m: Part, x: Tensor) -> Tensor:
        return x * torch.arange(x.shape[-1], dtype=x.dtype) / constant + torch.eye(x.shape[-1], dtype=x.dtype)[0]

    def thirds(m: Part, x: Tensor) -> Tensor:
        c = x.shape[-1]
        first, second = torch.split(x, [c // 3, c - c // 3], dim=-1)
        return torch.cat([second, first.sigmoid()], -1)

    return (checked, zeros_joined, by_fraction, regrouped, ramp, thirds)[variant % 6]


@unary("padded shortcut")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4)
    c = x.shape[1]
    m.planes = c + 4
    m.conv = nn.Conv2d(c, m.planes, 3, stride=2, padding=1)

    def run(m: Part, x: Tensor) -> Tensor:
        y = m.conv(x).relu()
        if variant % 3 == 0:
            return y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        if variant % 3 == 1:
            zeros = x.new_zeros(x.shape[0], m.planes - x.shape[1], *y.shape[2:])
            return y + torch.cat([x[..., ::2, ::2], zeros], 1)
        return y + F.pad(F.avg_pool2d(x, 2, ceil_mode=True), (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))

    return run


@unary("capsules")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 3)
    m.weight = nn.Parameter(torch.randn(3, units, x.shape[-1]) * 0.3)

    def run(m: Part, x: Tensor) -> Tensor:
        votes = torch.einsum("koc,bnc->bkno", m.weight, x) if variant % 2 else (m.weight @ x.mT[:, None]).mT
        logits = votes.new_zeros(votes.shape[:3])
        for _ in range(2):
            out = (logits.softmax(1)[..., None] * votes).sum(2)
            size = (out**2).sum(-1, keepdim=True)
            out = out * size / (1 + size) / (size + 1e-6).sqrt()
            logits = logits + (votes * out.unsqueeze(2)).sum(-1)
        return out

    return run


@unary("axes of an image")
def _(m: Part, x: Tensor, units: int, variant: int):
    need(x.ndim == 4, x.shape[1] % 2 == 0, x.shape[1] > 2)
    m.mix, m.p = nn.Linear(x.shape[3], x.shape[3]), 2
    m.rows, m.columns = (
        nn.Parameter(torch.randn(x.shape[1], x.shape[2], 1)),
        nn.Parameter(torch.randn(x.shape[1], 1, x.shape[3])),
    )
    return (
        lambda m, x: m.mix(x),
        lambda m, x: x + m.rows + m.columns,
        lambda m, x: torch.einsum("bchw,chi,ciw->bchw", x, m.rows, m.columns),
        lambda m, x: einops.rearrange(x, "b (p c) h w -> b c h (w p)", p=m.p),
        lambda m, x: einops.rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=m.p, q=1),
        lambda m, x: x.view(x.shape[0], m.p, -1, *x.shape[2:]).amax(1),
    )[variant % 6]
