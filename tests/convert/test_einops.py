"""Modules that reshape with einops, whose cached recipes must not remember the sizes of another width."""

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from einops import einsum, rearrange, reduce, repeat
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


class Tokens(nn.Module):
    """Blocks in the style of Restormer: attention between channels, `h` and `w` by hand."""

    def __init__(self, dim: int = 32, heads: int = 4, before: tuple[int, ...] = ()):
        super().__init__()
        widths = (3, *before, dim)
        self.heads = heads
        self.stem = nn.Sequential(*(nn.Conv2d(*pair, 3, padding=1) for pair in itertools.pairwise(widths)))
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.last = nn.Conv2d(dim, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        h, w = x.shape[-2:]
        y = rearrange(self.norm(rearrange(x, "b c h w -> b (h w) c")), "b (h w) c -> b c h w", h=h, w=w)
        parts = self.qkv(y).chunk(3, dim=1)
        q, k, v = (rearrange(part, "b (head c) h w -> b head c (h w)", head=self.heads) for part in parts)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.last(x + self.proj(rearrange(y, "b head c (h w) -> b (head c) h w", head=self.heads, h=h, w=w)))


class Latents(nn.Module):
    """In the style of Perceiver: learned latents read the tokens; einsum of einops with packed axes."""

    def __init__(self, dim: int = 32, heads: int = 4):
        super().__init__()
        self.heads, self.latents = heads, nn.Parameter(torch.randn(8, dim))
        self.embed, self.q, self.kv = nn.Linear(8, dim), nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.norm, self.out, self.head = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, 5)

    def forward(self, x):
        latents = repeat(self.latents, "n d -> b n d", b=x.shape[0])
        k, v = self.kv(self.norm(self.embed(x))).chunk(2, dim=-1)
        q, k, v = (rearrange(part, "b n (h d) -> (b h) n d", h=self.heads) for part in (self.q(latents), k, v))
        y = einsum(einsum(q, k, "b i d, b j d -> b i j").softmax(-1), v, "b i j, b j d -> b i d")
        latents = latents + self.out(rearrange(y, "(b h) n d -> b n (h d)", h=self.heads))
        return self.head(reduce(latents, "b n d -> b d", "mean"))


STYLES = {
    "attention": (lambda: Attention(32), (2, 8, 8)),
    "tokens": (Tokens, (2, 3, 8, 8)),
    "deeper tokens": (lambda: Tokens(before=(32, 24)), (2, 3, 8, 8)),
    "latents": (Latents, (2, 8, 8)),
    "patches": (patches, (2, 3, 16, 16)),
}


def plan_of(style):
    make, shape = STYLES[style]
    return str(slimmable.plan(make().eval(), WIDTHS, example_inputs=torch.zeros(shape)))


def fresh_plan(style):
    """Print the plan of one of the models in a process of its own."""
    code = f"from tests.convert.test_einops import plan_of; print(plan_of({style!r}))"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, text=True, stdout=-1).stdout.strip()


def test_a_plan_is_the_same_whatever_ran_before():
    fresh = {style: fresh_plan(style) for style in STYLES}
    assert all("16" in plan for plan in fresh.values())
    for order in itertools.permutations(STYLES, 2):
        for style in order:
            assert plan_of(style) == fresh[style]
            make, shape = STYLES[style]
            make()(torch.zeros(shape))


def heads():
    split, joined = Rearrange("b (h d) -> b h d", h=4), Rearrange("b h d -> b (h d)", h=4)
    both = (split, Reduce("b h (d k) -> b h d", "mean", k=2), joined)
    return nn.Sequential(nn.Linear(8, 32), *both, nn.Linear(16, 16), Rearrange("b (h d) -> b h d", d=4), nn.Flatten())


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_copies_of_layers_that_keep_their_arguments_alone_have_the_widths(width):
    """Pickled and copied, those of einops run their constructor again, in narrow networks too."""
    torch.manual_seed(0)
    model, x = nn.Sequential(heads(), nn.Linear(16, 3)), torch.randn(2, 8)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=x)
    slimmable.set_width(slim, width)
    expected = slim(x)
    small = slimmable.extract(slim, width)
    assert [type(module) for module in small.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(small(x), expected)
    for twin in (
        copy.deepcopy(slim),
        pickle.loads(pickle.dumps(slim)),
        slimmable.slimify(slim, (*WIDTHS, 0.75), example_inputs=x),
    ):
        assert slimmable.width_of(twin) in (width, 1.0)
        for other in WIDTHS:
            with slimmable.at_width(twin, other), slimmable.at_width(slim, other):
                assert torch.equal(twin(x), slim(x))
