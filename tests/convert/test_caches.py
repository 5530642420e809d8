"""Modules that keep what they have computed: every width must have its own."""

import copy

import pytest
import timm
import torch
from torch import nn

import slimmable
from tests.convert import oracles

WIDTHS = (1.0, 0.5, 0.25)


class Cached(nn.Module):
    """Keeps a table made from its parameters in eval mode, as some of timm's attention modules do."""

    def __init__(self, blank):
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)
        self.bias = nn.Parameter(torch.randn(16))
        self.blank, self.cache = blank, copy.copy(blank)
        self.constants = {"shift": torch.ones(1)}

    def train(self, mode: bool = True):
        self.cache = copy.copy(self.blank)
        return super().train(mode)

    def table(self):
        if isinstance(self.cache, dict):
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias * 2
            return self.cache["bias"]
        if self.cache is None:
            self.cache = self.bias * 2
        return self.cache

    def forward(self, x):
        return self.second(self.first(x) + (self.bias * 2 if self.training else self.table()) + self.constants["shift"])


def test_a_constant_is_no_cache():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.scale = nn.Linear(4, 8), nn.Linear(8, 2), torch.ones(2)

        def forward(self, x):
            return self.second(self.first(x)) * self.scale

    slim = slimmable.slimify(Scaled(), WIDTHS, example_inputs=torch.zeros(2, 4))
    slim.scale = torch.full((2,), 5.0)
    for width in WIDTHS:
        with slimmable.at_width(slim, width):
            assert slim.scale.tolist() == [5, 5]
        assert slimmable.extract(slim, width).scale.tolist() == [5, 5]


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("blank", [{}, None])
def test_every_width_has_its_own_cache(blank, filled):
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = Cached(blank).eval()
    if filled:
        model(x)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=x)
    with slimmable.at_width(slim, 0.5):
        assert slim.bias.shape == (8,)
    for twin in (slim, copy.deepcopy(slim)):
        for _ in range(2):
            for width in WIDTHS:
                with slimmable.at_width(twin, width), torch.no_grad():
                    assert torch.equal(twin(x), slimmable.extract(twin, width).train()(x))
    with torch.no_grad():
        slim.train().bias.add_(1)
        for width in WIDTHS:
            with slimmable.at_width(slim, width):
                assert torch.equal(slim.eval()(x), slimmable.extract(slim, width).train()(x))


class Watched(nn.Module):
    """Keeps what it computed for others to look at, counts its calls and averages its input, in plain attributes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)
        self.attended, self.calls, self.mean = None, 0, torch.zeros(())

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        self.attended = self.first(x).softmax(1)
        return self.second(self.attended)


def test_what_a_narrow_forward_keeps_leaves_that_of_the_full_width_alone():
    x, plain = torch.ones(2, 4), Watched()
    slim = slimmable.slimify(plain, WIDTHS, example_inputs=x)
    for _ in range(3):
        slimmable.run_widths(slim, x)
        plain(x)
    assert slim.calls == plain.calls == 3
    assert torch.equal(slim.mean, plain.mean)
    assert torch.equal(slim.attended, plain.attended)
    slimmable.set_width(slim, 0.5)
    slim(x)
    assert slim.attended.shape == (2, 8)
    slim.attended, slim.calls = None, 0  # a reset is one for all widths
    slimmable.set_width(slim, 1.0)
    assert slim.attended is None
    assert slim.calls == 0


def test_attention_that_caches_its_biases():
    torch.manual_seed(0)
    model = oracles.randomise(timm.create_model("levit_128s").double().eval())
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    expected = model(x)  # with gradient, so that the caches hold a history
    slim = slimmable.slimify(model)
    with torch.no_grad():
        assert torch.equal(slim(x), expected)
        with slimmable.at_width(slim, 0.25):
            narrow = slim(x)
        assert torch.equal(slim(x), expected)
        assert oracles.difference(narrow, slimmable.extract(slim, 0.25)(x)) < 1e-12


class Placed(nn.Module):
    """Adds positions that are neither a parameter nor a buffer, as many do; `counted` also counts its calls."""

    def __init__(self, counted: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.positions, self.calls = torch.randn(5, 8), torch.zeros(()) if counted else None

    def forward(self, x):
        if self.calls is not None:
            self.calls = self.calls + 1
        return self.second(self.first(x).relu() + self.positions)


@pytest.mark.parametrize("importance", [None, "magnitude"])
def test_a_plain_table_gets_thinner_at_any_width(importance):
    torch.manual_seed(0)
    model, x = Placed(), torch.randn(2, 5, 4)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=x, universal=True, importance=importance)
    torch.testing.assert_close(slim(x), model(x))
    for width, kept in ((1.0, 8), (0.75, 6), (0.5, 4), (0.25, 2)):
        slimmable.set_width(slim, width)
        small = slimmable.extract(slim, width)
        assert slim.positions.shape == small.positions.shape == (5, kept)
        torch.testing.assert_close(small(x), slim(x))
    assert slim.__dict__["positions"].shape == model.positions.shape == (5, 8)
    torch.testing.assert_close(slimmable.extract(slim, 1.0)(x), model(x))


def test_an_attribute_that_the_forward_writes_stays_a_cache():
    x = torch.randn(2, 5, 4)
    slim = slimmable.slimify(Placed(counted=True), WIDTHS, example_inputs=x)
    assert list(slimmable.plan(slim, WIDTHS).caches[""]) == ["calls"]
    assert slim.positions.shape == (5, 8)
    with slimmable.at_width(slim, 0.5):
        slim(x)
        assert (slim.calls.item(), slim.positions.shape) == (1, (5, 4))
