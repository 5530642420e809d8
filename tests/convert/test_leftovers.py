"""Nothing of a trace survives it, and nothing from before reaches it."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import slimmable
from slimmable.errors import ConversionError, TraceError
from tests.convert import oracles

WIDTHS = (1.0, 0.5)
FILE = Path(__file__).with_name("kept_tables.py")


def load():
    spec = importlib.util.spec_from_file_location("kept_tables", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KEPT = load()
WAYS = [way for way in KEPT.WAYS if way not in ("random", "hidden dict", "hidden attribute")]


@pytest.fixture
def kept():
    torch.manual_seed(0)
    return load()


X = torch.randn(2, 6, 4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("act", ["slimify", "plan", "failed"])
def test_the_plain_model_and_the_converted_one_compute_what_they_did(kept, way, act):
    model = kept.Network(way, fails=act == "failed").eval()
    expected = KEPT.Network(way).eval()
    expected.load_state_dict(model.state_dict())
    slim = model
    if act == "slimify":
        slim = slimmable.slimify(model, WIDTHS, example_inputs=X)
    elif act == "plan":
        slimmable.plan(model, WIDTHS, example_inputs=X)
    else:
        with pytest.raises(TraceError):
            slimmable.plan(model, WIDTHS, example_inputs=X)
        model.fails = False
    for x in (X, X[:, :5], X):
        if way == "partial" and x is not X:
            continue
        want = expected(x)
        for net in (model, slim):
            got = net(x)
            assert type(got) is torch.Tensor
            assert got.tolist() == want.tolist()


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("thread", "object")])
def test_a_plan_does_not_depend_on_what_has_run_before_nor_change_it(kept, way):
    model = kept.Network(way).eval()
    fresh = str(slimmable.plan(model, WIDTHS, example_inputs=X))
    output = model(X)
    table = kept.WAYS[way](6, 16)
    assert type(table) is torch.Tensor
    again = slimmable.plan(model, WIDTHS, example_inputs=X)
    assert str(again) == fresh
    if way != "partial":  # whose function nothing can stand for, so that it is emptied
        assert kept.WAYS[way](6, 16) is table
    assert torch.equal(model(X), output)


def test_numbers_that_only_a_cache_remembers_stay(kept):
    """Clearing a memo would change the plain model."""
    model = kept.Network("random").eval()
    output = model(X)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=X)
    assert torch.equal(model(X), output)
    assert torch.equal(slim(X), output)


def test_hooks_and_counters_of_the_user_see_nothing_of_a_trace(kept):
    seen, model = [], kept.Network("dict")
    model.second.register_forward_hook(lambda module, args, output: seen.append(output))
    slimmable.slimify(model, WIDTHS, example_inputs=X)
    assert seen == []


def test_a_tensor_in_a_place_without_a_name_is_removed_or_named(kept, monkeypatch):
    hidden = {}
    monkeypatch.setattr(sys, "leftovers_of_a_test", hidden, raising=False)  # a module that is not followed
    model = kept.Network("hidden dict").eval()
    slimmable.slimify(model, WIDTHS, example_inputs=X)
    assert hidden == {}
    model.way = "hidden attribute"
    with pytest.raises(ConversionError, match="is still held by"):
        slimmable.slimify(model, WIDTHS, example_inputs=X)
    del sys.leftover_of_a_test


class Noted(nn.Module):
    """Keeps a table in attributes of itself, with the size for which it was made."""

    def __init__(self):
        super().__init__()
        self._size, self._table = -1, None
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)
        self.scale = torch.full((1,), 2.0)  # no cache

    def forward(self, x):
        y = self.first(x) * self.scale
        if self._size != y.shape[-2]:
            self._size, self._table = y.shape[-2], torch.ones(y.shape[-2], y.shape[-1])
        return self.last(y + self._table)


def test_attributes_that_a_forward_sets_together_belong_to_a_width():
    model = Noted().eval()
    slim = slimmable.slimify(model, WIDTHS, example_inputs=X)
    oracles.full_width_is_the_original(model, slim, X)
    for x in (X, X[:, :5]):
        for width in WIDTHS:
            with slimmable.at_width(slim, width):
                assert torch.allclose(slim(x), slimmable.extract(slim, width)(x))


def test_three_threads_plan_at_once(kept):
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    before = [vars(functional)[name] for name in names]
    models = [kept.Network(way).eval() for way in ("lru_cache", "dict", "global")]
    expected = [str(slimmable.plan(model, WIDTHS, example_inputs=X)) for model in models]
    with ThreadPoolExecutor(3) as pool:
        plans = list(pool.map(lambda model: str(slimmable.plan(model, WIDTHS, example_inputs=X)), models * 3))
    assert plans == expected * 3
    assert [vars(functional)[name] for name in names] == before
    assert torch.backends.mkldnn.enabled
    assert torch.backends.mha.get_fastpath_enabled()


class Factories(dict):
    """A dict that calls what it holds."""

    def __getitem__(self, key: str) -> nn.Module:
        kind, options = super().__getitem__(key)
        return kind(**options)

    def keys(self):
        return ["and", "more", *super().keys()]


FACTORIES = Factories(leaky=(nn.LeakyReLU, {"negative_slope": 0.2}), bilinear=(nn.Bilinear, {}))


def test_a_dict_that_makes_what_it_returns_is_only_asked_by_the_forward():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.last(FACTORIES["leaky"](self.first(x)))

    held = dict(FACTORIES.items())
    slim = slimmable.slimify(Network(), WIDTHS, example_inputs=X)
    with slimmable.at_width(slim, 0.5):
        assert slim.first.weight.shape == (8, 4)
    assert dict(FACTORIES.items()) == held


class Enlarges(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x):
        return self.last(functional.interpolate(self.first(x), scale_factor=2, mode="bilinear"))


@pytest.mark.parametrize("warn_only", [False, True])
def test_a_plan_does_not_depend_on_deterministic_algorithms(warn_only):
    """Everywhere but on CPUs, they take interpolation apart into indexing."""
    x, model = torch.rand(2, 3, 8, 8, device="meta"), Enlarges().to("meta")
    expected = slimmable.plan(model, WIDTHS, example_inputs=x)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        found = slimmable.plan(model, WIDTHS, example_inputs=x)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
    assert str(found) == str(expected)
    assert 2 * expected.columns[1].macs == expected.columns[0].macs
