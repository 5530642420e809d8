"""Small modules, one for each thing that a model can do with its channels; every oracle on each of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import slimmable
from slimmable.analysis.fake import FakeModel
from tests.convert import oracles

WIDTHS = (1.0, 0.75, 0.5, 0.25)


class Fn(nn.Module):
    """A module made of layers and a function of them."""

    def __init__(self, run, **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Attention(nn.Module):
    def __init__(self, dim: int = 48, heads: int = 4, fused: bool = True):
        super().__init__()
        self.num_heads, self.head_dim, self.fused = heads, dim // heads, fused
        self.scale = self.head_dim**-0.5
        self.embed, self.head = nn.Linear(8, dim), nn.Linear(dim, 5)
        self.qkv, self.proj, self.norm = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return self.head(x.mean(1))


def conv(i: int, o: int, k: int = 3, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **kwargs)


def head(m: nn.Module, x: Tensor) -> Tensor:
    return m.fc(x.mean((2, 3)))


def shuffle(m: nn.Module, x: Tensor) -> Tensor:
    x = m.b(m.a(x))
    n, c, h, w = x.shape
    x = x.view(n, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
    return head(m, m.c(x))


def split_unequal(m: nn.Module, x: Tensor) -> Tensor:
    first, second = torch.split(m.a(x), [m.left, m.right], dim=1)
    return head(m, torch.cat([m.b(first), second], 1))


def tokens(m: nn.Module, x: Tensor) -> Tensor:
    x = m.a(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1) + m.pos
    return m.fc(m.norm(x)[:, 0])


def sampled(m: nn.Module, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    y = m.a(x).view(n, m.heads, -1, h, w).flatten(0, 1)
    grid = m.grid(x).view(n, m.heads, 2, 2, h, w).mean(3).flatten(0, 1).permute(0, 2, 3, 1).tanh()
    y = F.grid_sample(y, grid, align_corners=False)
    return head(m, m.b(y.view(n, m.heads, -1, h, w).flatten(1, 2)))


def with_attribute(module: Fn, **attributes: object) -> Fn:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


CASES = {
    "chain": lambda: Fn(lambda m, x: head(m, m.b(m.a(x).relu())), a=conv(3, 16), b=conv(16, 24), fc=nn.Linear(24, 5)),
    "residual": lambda: Fn(
        lambda m, x: head(m, (y := m.a(x)) + m.c(m.b(y).relu())), a=conv(3, 16), b=conv(16, 8), c=conv(8, 16),
        fc=nn.Linear(16, 5),
    ),
    "concatenation": lambda: Fn(
        lambda m, x: head(m, m.c(torch.cat([y := m.a(x), m.b(y)], 1))), a=conv(3, 16), b=conv(16, 8), c=conv(24, 12),
        fc=nn.Linear(12, 5),
    ),
    "depthwise": lambda: Fn(
        lambda m, x: head(m, m.c(m.b(m.a(x)))), a=conv(3, 16), b=conv(16, 32, groups=16), c=conv(32, 8, 1),
        fc=nn.Linear(8, 5),
    ),
    "grouped": lambda: Fn(
        lambda m, x: head(m, m.c(m.b(m.a(x)))), a=conv(3, 32), b=conv(32, 16, groups=4), c=conv(16, 8, 1),
        fc=nn.Linear(8, 5),
    ),
    "shuffled": lambda: with_attribute(
        Fn(shuffle, a=conv(3, 24), b=conv(24, 24, groups=3), c=conv(24, 8), fc=nn.Linear(8, 5)), groups=3
    ),
    "gated": lambda: Fn(
        lambda m, x: head(m, m.b(torch.mul(*m.a(x).chunk(2, 1)))), a=conv(3, 32), b=conv(16, 8), fc=nn.Linear(8, 5)
    ),
    "glu": lambda: Fn(lambda m, x: head(m, m.b(F.glu(m.a(x), 1))), a=conv(3, 32), b=conv(16, 8), fc=nn.Linear(8, 5)),
    "chunked unequally": lambda: Fn(
        lambda m, x: head(m, m.b(torch.cat(m.a(x).chunk(3, 1), 1))), a=conv(3, 32), b=conv(32, 8), fc=nn.Linear(8, 5)
    ),
    "split unequally": lambda: with_attribute(
        Fn(split_unequal, a=conv(3, 24), b=conv(16, 16), fc=nn.Linear(24, 5)), left=16, right=8
    ),
    "sliced in halves": lambda: Fn(
        lambda m, x: head(m, m.b((y := m.a(x))[:, : y.shape[1] // 2]) + y[:, y.shape[1] // 2 :]), a=conv(3, 32),
        b=conv(16, 16), fc=nn.Linear(16, 5),
    ),
    "flattened": lambda: Fn(
        lambda m, x: m.fc(m.b(m.a(x)).flatten(1)), a=conv(3, 16), b=conv(16, 8), fc=nn.Linear(8 * 64, 5)
    ),
    "squeeze and excitation": lambda: Fn(
        lambda m, x: head(m, (y := m.a(x)) * m.d(m.c(y.mean((2, 3), keepdim=True)).relu()).sigmoid()), a=conv(3, 16),
        c=conv(16, 8, 1), d=conv(8, 16, 1), fc=nn.Linear(16, 5),
    ),
    "batch norm": lambda: Fn(
        lambda m, x: head(m, m.b(m.bn(m.a(x)).relu())), a=conv(3, 16), bn=nn.BatchNorm2d(16), b=conv(16, 8),
        fc=nn.Linear(8, 5),
    ),
    "group norm": lambda: Fn(
        lambda m, x: head(m, m.b(m.gn(m.a(x)))), a=conv(3, 32), gn=nn.GroupNorm(8, 32), b=conv(32, 8),
        fc=nn.Linear(8, 5),
    ),
    "group norm with few groups": lambda: Fn(
        lambda m, x: head(m, m.b(m.gn(m.a(x)))), a=conv(3, 32), gn=nn.GroupNorm(2, 32), b=conv(32, 8),
        fc=nn.Linear(8, 5),
    ),
    "instance norm": lambda: Fn(
        lambda m, x: head(m, m.b(m.n(m.a(x)))), a=conv(3, 16), n=nn.InstanceNorm2d(16, affine=True), b=conv(16, 8),
        fc=nn.Linear(8, 5),
    ),
    "transposed": lambda: Fn(
        lambda m, x: head(m, m.c(m.b(m.a(x)))), a=conv(3, 16), b=nn.ConvTranspose2d(16, 12, 2, 2), c=conv(12, 8),
        fc=nn.Linear(8, 5),
    ),
    "transposed depthwise": lambda: Fn(
        lambda m, x: head(m, m.c(m.b(m.a(x)))), a=conv(3, 16), b=nn.ConvTranspose2d(16, 16, 2, 2, groups=16),
        c=conv(16, 8), fc=nn.Linear(8, 5),
    ),
    "experts in one flat axis": lambda: Fn(
        lambda m, x: head(
            m, m.c(F.conv2d(y := m.a(x), (m.mix @ m.experts).view(m.b.out_channels, y.shape[1], 3, 3), padding=1))
        ),
        a=conv(3, 16), b=conv(16, 8), mix=nn.Parameter(torch.randn(4)), c=conv(8, 8),
        experts=nn.Parameter(torch.randn(4, 8 * 16 * 9)), fc=nn.Linear(8, 5),
    ),
    "transposed depthwise with a multiplier": lambda: Fn(
        lambda m, x: head(m, m.c(m.b(m.a(x)))), a=conv(3, 16), b=nn.ConvTranspose2d(16, 48, 2, 2, groups=16),
        c=conv(48, 8), fc=nn.Linear(8, 5),
    ),
    "neighbouring channels attend": lambda: Fn(
        lambda m, x: head(m, m.c((y := m.a(x)) * m.b(y.mean((2, 3))[:, None]).sigmoid()[..., None].transpose(1, 2))),
        a=conv(3, 16), b=nn.Conv1d(1, 1, 3, padding=1), c=conv(16, 8), fc=nn.Linear(8, 5),
    ),
    "transposed grouped": lambda: Fn(
        lambda m, x: head(m, m.c(m.b(m.a(x)))), a=conv(3, 16), b=nn.ConvTranspose2d(16, 24, 2, 2, groups=2),
        c=conv(24, 8), fc=nn.Linear(8, 5),
    ),
    "pixel shuffle": lambda: Fn(
        lambda m, x: head(m, m.b(F.pixel_shuffle(m.a(x), 2))), a=conv(3, 32), b=conv(8, 8), fc=nn.Linear(8, 5)
    ),
    "pixel unshuffle": lambda: Fn(
        lambda m, x: head(m, m.b(F.pixel_unshuffle(m.a(x), 2))), a=conv(3, 8), b=conv(32, 8), fc=nn.Linear(8, 5)
    ),
    "unfold and fold": lambda: Fn(
        lambda m, x: head(m, m.b(F.fold(F.unfold(m.a(x), 2, stride=2), (8, 8), 2, stride=2))), a=conv(3, 16),
        b=conv(16, 8), fc=nn.Linear(8, 5),
    ),
    "normalised": lambda: Fn(
        lambda m, x: head(m, m.b(F.normalize(m.a(x), dim=1))), a=conv(3, 16), b=conv(16, 8), fc=nn.Linear(8, 5)
    ),
    "prelu": lambda: Fn(
        lambda m, x: head(m, m.b(m.act(m.a(x)))), a=conv(3, 16), act=nn.PReLU(16), b=conv(16, 8), fc=nn.Linear(8, 5)
    ),
    "einsum": lambda: Fn(
        lambda m, x: head(m, m.b(torch.einsum("nchw,c->nchw", m.a(x), m.scale))), a=conv(3, 16),
        scale=nn.Parameter(torch.ones(16)), b=conv(16, 8), fc=nn.Linear(8, 5),
    ),
    "tokens": lambda: Fn(
        tokens, a=conv(3, 16), cls=nn.Parameter(torch.ones(1, 1, 16)), pos=nn.Parameter(torch.ones(1, 65, 16)),
        norm=nn.LayerNorm(16), fc=nn.Linear(16, 5),
    ),
    "tied": lambda: Fn(
        lambda m, x: m.fc(F.linear(F.linear(x.mean((2, 3)), m.w), m.w.T)), w=nn.Parameter(torch.randn(16, 3)),
        fc=nn.Linear(3, 5),
    ),
    "padded": lambda: Fn(
        lambda m, x: head(m, m.b(F.pad(m.a(x), (0, 0, 0, 0, 0, 4)))), a=conv(3, 16), b=conv(20, 8), fc=nn.Linear(8, 5)
    ),
    "indexed": lambda: Fn(
        lambda m, x: head(m, m.b(m.a(x)[:, [3, 2, 1, 0]])), a=conv(3, 4), b=conv(4, 8), fc=nn.Linear(8, 5)
    ),
    "sorted": lambda: Fn(
        lambda m, x: head(m, m.b(m.a(x).sort(1).values)), a=conv(3, 8), b=conv(8, 8), fc=nn.Linear(8, 5)
    ),
    "spectral norm": lambda: Fn(
        lambda m, x: head(m, m.b(m.a(x).relu())), a=nn.utils.parametrizations.spectral_norm(conv(3, 16)),
        b=nn.utils.spectral_norm(conv(16, 8)), fc=nn.utils.parametrizations.spectral_norm(nn.Linear(8, 5)),
    ),
    "bag of embeddings": lambda: Fn(
        lambda m, x: m.fc(m.bag((x[:, 0].flatten(1) > 0).long()).relu()), bag=nn.EmbeddingBag(2, 16),
        fc=nn.Linear(16, 5),
    ),
    "codebook": lambda: Fn(
        lambda m, x: head(m, m.c(m.book(torch.cdist(m.a(x).flatten(2).mT, m.book.weight).argmin(2)).mT[..., None])),
        a=conv(3, 16), book=nn.Embedding(8, 16), c=conv(16, 8), fc=nn.Linear(8, 5),
    ),
    "bilinear": lambda: Fn(
        lambda m, x: m.fc(m.c(m.a(x).mean((2, 3)), m.b(x).mean((2, 3))).relu()), a=conv(3, 16), b=conv(3, 12),
        c=nn.Bilinear(16, 12, 8), fc=nn.Linear(8, 5),
    ),
    "sampled by a grid of each head": lambda: with_attribute(
        Fn(sampled, a=conv(3, 32, 1), grid=conv(3, 4 * 2 * 2, 1), b=conv(32, 8), fc=nn.Linear(8, 5)), heads=4
    ),
    "rolled": lambda: Fn(
        lambda m, x: head(m, m.b(m.a(x).roll(1))), a=conv(3, 16), b=conv(16, 8), fc=nn.Linear(8, 5)
    ),
    "triangle": lambda: Fn(lambda m, x: m.fc(m.a(x[:, 0]).tril()).mean(1), a=nn.Linear(8, 8), fc=nn.Linear(8, 5)),
    "tokens with a plain table of positions": lambda: with_attribute(
        Fn(tokens, a=conv(3, 16), cls=nn.Parameter(torch.ones(1, 1, 16)), norm=nn.LayerNorm(16), fc=nn.Linear(16, 5)),
        pos=torch.randn(1, 65, 16, dtype=torch.float64),
    ),
    "frozen norm": lambda: Fn(
        lambda m, x: head(m, m.b(m.n(m.a(x)).relu())), a=conv(3, 16), n=FrozenBatchNorm2d(16), b=conv(16, 8),
        fc=nn.Linear(8, 5),
    ),
    "padding by name": lambda: Fn(
        lambda m, x: head(m, m.b(m.a(x).relu())), a=nn.Conv2d(3, 16, 3, padding="valid"),
        b=nn.Conv2d(16, 8, 3, padding="same"), fc=nn.Linear(8, 5),
    ),
    "weight norm": lambda: Fn(
        lambda m, x: head(m, m.b(m.a(x))), a=nn.utils.parametrizations.weight_norm(conv(3, 16)), b=conv(16, 8),
        fc=nn.Linear(8, 5),
    ),
}  # fmt: skip
PINNED = {
    "experts in one flat axis": {"a", "b"},
    "padded": {"a"},
    "indexed": {"a"},
    "sorted": {"a"},
    "rolled": {"a"},
    "tied": {"w"},
    "bilinear": {"a", "b"},
}  # what rightly stays full there


@pytest.mark.parametrize("case", CASES)
def test_every_oracle_holds(case):
    torch.manual_seed(0)
    model = oracles.randomise(CASES[case]().double().eval())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=x)
    plan = slimmable.plan(model, WIDTHS, example_inputs=x)
    oracles.full_width_is_the_original(model, slim, x)
    oracles.every_width_is_its_extraction(slim, x, limit=1e-12)
    oracles.permuting_units_changes_nothing(model, plan, x, limit=1e-10)
    made = {path or name for (path, name), axes in plan.tensors.items() if axes[-1] and axes[-1][0] is not None}
    for name, module in model.named_children():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and name not in PINNED.get(case, ()):
            assert any(path.split(".")[0] == name for path in made), f"{name} is not slimmed:\n{plan}"


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(48, 5)
        self.rnn = kind(32, 24, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0].mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind, dtype):
    torch.manual_seed(0)
    model = Recurrent(kind).to(dtype).eval()
    x = torch.randn(2, 7, 8, dtype=dtype)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=x)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    oracles.full_width_is_the_original(model, slim, x)
    oracles.every_width_is_its_extraction(slim, x, limit=limit)
    oracles.permuting_units_changes_nothing(model, slimmable.plan(model, WIDTHS, example_inputs=x), x, limit=limit)
    small = slimmable.extract(slim, 0.5)
    assert (small.rnn.input_size, small.rnn.hidden_size, small.head.in_features) == (16, 12, 24)
    slimmable.set_width(slim, 0.5)
    slim(x).sum().backward()
    assert torch.equal(copy.deepcopy(slim)(x), slim(x))


class States(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        steps, state = self.rnn(self.embed(x))
        last = state[0] if isinstance(state, tuple) else state
        return self.head(steps) + self.head(steps[1:] + steps[:-1]).mean() + last.mean()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_long_sequence_is_traced_in_two_steps(kind, batch_first, monkeypatch):
    """Whoever reads steps and states gets those of the shapes that the layer gives, at a cost that does not grow."""
    model = States(kind).double().eval()
    model.rnn.batch_first = batch_first
    run, counts = FakeModel.run, []

    def counted(fake, *modes):
        out = run(fake, *modes)
        counts.append(len(fake.made))
        return out

    monkeypatch.setattr(FakeModel, "run", counted)
    for steps in (20, 200):
        x = torch.randn(*((2, steps) if batch_first else (steps, 2)), 8, dtype=torch.float64)
        slim = slimmable.slimify(model, WIDTHS, example_inputs=x)
        oracles.full_width_is_the_original(model, slim, x)
        oracles.every_width_is_its_extraction(slim, x, limit=1e-12)
    assert counts[: len(counts) // 2] == counts[len(counts) // 2 :]
    assert slimmable.extract(slim, 0.5).rnn.hidden_size == 12


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("heads", "kept_heads", "kept_dims"), [(4, [4, 3, 2, 1], [12, 12, 12, 12]), (3, [3, 3, 3, 3], [16, 12, 8, 4])]
)
def test_attention_slims_whole_heads_where_every_width_gives_an_integer(heads, kept_heads, kept_dims, fused):
    torch.manual_seed(0)
    model = Attention(heads=heads, fused=fused).double().eval()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=x)
    plan = slimmable.plan(model, WIDTHS, example_inputs=x)
    oracles.full_width_is_the_original(model, slim, x)
    oracles.every_width_is_its_extraction(slim, x, limit=1e-12)
    oracles.permuting_units_changes_nothing(model, plan, x, limit=1e-10)
    for width, heads_kept, dims_kept in zip(WIDTHS, kept_heads, kept_dims, strict=True):
        small = slimmable.extract(slim, width)
        assert (small.num_heads, small.head_dim) == (heads_kept, dims_kept)
        assert small.scale == pytest.approx(dims_kept**-0.5)
        with torch.no_grad(), slimmable.at_width(slim, width):
            outputs = []
            for slim.fused in (True, False):
                outputs.append(slim(x))
        assert oracles.difference(*outputs) < 1e-12


def test_the_choice_of_the_axis_that_carries_heads_is_revised_where_it_would_pin():
    class Shared(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.temperature.sum() * 0

    model = Shared(heads=4)
    model.temperature = nn.Parameter(torch.ones(4, 1, 1))
    plan = slimmable.plan(model, WIDTHS, example_inputs=torch.zeros(2, 7, 8))
    assert plan.tensors["qkv", "weight"][-1][0] is not None


class GroupedQueries(nn.Module):
    """Each head of keys and values serves several heads of queries, and positions rotate units of the heads."""

    def __init__(self, heads: int, served: int, size: int = 16):
        super().__init__()
        self.size, self.groups = size, heads // served
        self.embed, self.q, self.out = nn.Linear(8, 32), nn.Linear(32, heads * size), nn.Linear(heads * size, 5)
        self.k, self.v = nn.Linear(32, served * size), nn.Linear(32, served * size)
        self.register_buffer("turn", torch.rand(7, size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (f(x).view(*x.shape[:-1], -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (self.repeated(each) for each in (k * self.turn, v))
        out = ((q * self.turn) @ k.mT).softmax(-1) @ v
        return self.out(out.transpose(1, 2).reshape(*x.shape[:-1], -1))

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, steps, size = x.shape
        return x[:, :, None].expand(batch, heads, self.groups, steps, size).reshape(batch, -1, steps, size)


def test_heads_of_queries_follow_those_of_keys_that_no_width_keeps_whole():
    """Two heads of keys are not whole at every width, but eight of queries are."""
    torch.manual_seed(0)
    model, x = GroupedQueries(heads=8, served=2).double().eval(), torch.randn(2, 7, 8, dtype=torch.float64)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=x)
    plan = slimmable.plan(slim)
    assert plan.columns[2].macs < 0.34 * plan.columns[0].macs
    oracles.full_width_is_the_original(model, slim, x)
    oracles.every_width_is_its_extraction(slim, x, limit=1e-12)
    oracles.permuting_units_changes_nothing(model, plan, x, limit=1e-10)


class EqualLinear(nn.Linear):
    """Scales its weight by a size that it knows as an attribute, as StyleGAN's layers do."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * self.in_features**-0.5


def by_sizes(m: nn.Module, x: Tensor) -> Tensor:
    x = m.equal(m.first(x)) * m.first.out_features / math.sqrt(m.equal.out_features)
    x = m.conv(x[:, :, None]) * m.conv.in_channels + 1.5 * m.conv.out_channels
    return m.head(x.mean(2))


def test_sizes_that_the_code_computes_with_are_those_of_the_width():
    torch.manual_seed(0)
    layers = {"first": nn.Linear(8, 16), "equal": EqualLinear(16, 12), "conv": nn.Conv1d(12, 24, 1, groups=4)}
    model, x = Fn(by_sizes, **layers, head=nn.Linear(24, 3)).double().eval(), torch.randn(4, 8, dtype=torch.float64)
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=x)
    assert slim.first.out_features == 16
    with slimmable.at_width(slim, 0.5):
        sizes = slim.first.out_features, slim.equal.out_features, slim.conv.in_channels, slim.conv.out_channels
        assert sizes == (8, slim.equal.weight.shape[0], slim.conv.weight.shape[1] * slim.conv.groups, 12)
    oracles.full_width_is_the_original(model, slim, x)
    oracles.every_width_is_its_extraction(slim, x, limit=1e-12)


def test_a_size_that_only_training_reads_is_that_of_the_width():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (self.in_features**-0.5 if self.training else 1)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), Scaled(16, 3)), torch.randn(4, 8)
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=x).train()
    with slimmable.at_width(slim, 0.5):
        torch.testing.assert_close(slim(x), slimmable.extract(slim, 0.5)(x))


def test_a_size_may_be_that_of_a_layer_without_weights():
    def scaled(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(m.norm(m.first(x)) / m.norm.num_channels)

    model = Fn(scaled, first=nn.Linear(8, 16), norm=nn.GroupNorm(4, 16, affine=False), last=nn.Linear(16, 3))
    slim, x = slimmable.slimify(model, (1.0, 0.5), example_inputs=torch.randn(4, 8)), torch.randn(4, 8)
    with slimmable.at_width(slim, 0.5):
        assert slim.first.weight.shape == (8, 8)
        torch.testing.assert_close(slim(x), slimmable.extract(slim, 0.5)(x))


@pytest.mark.parametrize("causal", [False, True])
def test_latents_get_fewer_only_where_their_order_does_not_matter(causal):
    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents, self.kv, self.out = nn.Parameter(torch.randn(1, 6, 8)), nn.Linear(4, 16), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            k, v = self.kv(x).chunk(2, -1)
            y = (self.latents @ k.transpose(1, 2)).softmax(-1) @ v
            return self.out(F.scaled_dot_product_attention(y, y, y, is_causal=causal).mean(1))

    model, x = Latents().double().eval(), torch.randn(2, 3, 4).double()
    plan = slimmable.plan(model, WIDTHS, example_inputs=x)
    fewer = any(("", "latents", 1) in group.members for group in plan.groups)
    assert fewer != causal
    oracles.permuting_units_changes_nothing(model, plan, x, limit=1e-10)


def test_a_spectrum_keeps_what_its_channels_came_from():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft2(torch.fft.rfft2(self.last(self.first(x).relu())), s=(6, 6))

    plan = slimmable.plan(Spectrum(), WIDTHS, example_inputs=torch.randn(1, 3, 8, 8))
    assert plan.output_shapes[-1] == plan.output_shapes[0]  # an image of five colours, only transformed
    assert [group.units for group in plan.groups] == [8]
