"""Modules that reshape with einops, whose cached recipes must not remember the sizes of another width."""

import pytest
import torch
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange, Reduce
from torch import nn

import slimmable
from tests.convert import oracles

WIDTHS = (1.0, 0.5, 0.25)


class Attention(nn.Module):
    def __init__(self, dim: int = 48, heads: int = 4):
        super().__init__()
        self.heads, self.token = heads, nn.Parameter(torch.randn(1, 1, dim))
        self.embed, self.norm, self.head = nn.Linear(8, dim), nn.LayerNorm(dim), nn.Linear(dim, 5)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        x = torch.cat([repeat(self.token, "1 1 d -> b 1 d", b=x.shape[0]), self.embed(x)], 1)
        q, k, v = rearrange(self.qkv(self.norm(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.head(reduce(x + self.proj(rearrange(y, "b h n d -> b n (h d)")), "b n d -> b d", "mean"))


def convolutions():
    folded = Rearrange("b (c r) h w -> b c h (w r)", r=2)
    body = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), folded, nn.Conv2d(16, 8, 3))
    return nn.Sequential(*body, Reduce("b c h w -> b c", "mean"), nn.Linear(8, 4))


def patches():
    split = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4)
    body = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), split, nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 32))
    return nn.Sequential(*body, Reduce("b n c -> b c", "max"), nn.Linear(32, 5))


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize(
    ("make", "shape", "counts"),
    [
        (Attention, (2, 7, 8), {(24, 2), (12, 1)}),
        (convolutions, (2, 3, 16, 16), {(8, 8, 4), (4, 4, 2)}),
        (patches, (2, 3, 16, 16), {(4, 32, 16), (2, 16, 8)}),
    ],
)
def test_everything_gets_thinner(make, shape, counts, ran_before):
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(*shape, dtype=torch.float64)
    if ran_before:
        model(x)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=x)
    plan = slimmable.plan(slim, WIDTHS)
    assert {column.counts for column in plan.columns[1:]} == counts
    oracles.full_width_is_the_original(model, slim, x)
    oracles.every_width_is_its_extraction(slim, x, limit=1e-12)
    oracles.permuting_units_changes_nothing(model, plan, x, limit=1e-12)
