"""Kept units as published: `int(units * width)`, and units that narrower widths do not share."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import slimmable
from slimmable import layers
from slimmable._widths import kept_units
from slimmable.errors import ConversionError, UsageError, WidthError
from tests.convert import oracles

F64 = {"dtype": torch.float64}
quick = settings(max_examples=25, deadline=None)
percents = st.integers(1, 99)


@given(st.integers(1, 4096), st.floats(1e-3, 0.999))
def test_the_floor_is_what_published_code_computes(units, width):
    assert kept_units(units, width, rounding="floor") == max(1, int(units * width))
    assert kept_units(units, 1.0, rounding="floor") == units


def test_the_floor_keeps_what_floating_point_makes_of_it():
    assert kept_units(100, 0.29, rounding="floor") == int(100 * 0.29) == 28  # 28.999999999999996
    assert kept_units(10, 0.3, rounding="floor") == 3
    assert kept_units(10, 0.75, rounding="floor") == 7 != kept_units(10, 0.75)


@given(st.integers(1, 200), st.floats(0.01, 0.99), st.integers(1, 16))
def test_the_floor_of_multiples(units, width, round_to):
    kept = kept_units(units, width, round_to, "floor")
    assert kept == min(units, max(round_to, int(units * width / round_to) * round_to))
    assert kept <= max(round_to, units * width)


class Network(nn.Module):
    """Not one of timm's: two convolutions, a residual one, and a classifier, of any sizes."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, first, 3, **F64), nn.BatchNorm2d(first, **F64)
        self.inner, self.outer = nn.Conv2d(first, second, 1, **F64), nn.Conv2d(second, first, 1, **F64)
        self.head = nn.Linear(first, 5, **F64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


def published(model: Network, first: range, second: range) -> Network:
    """The plain narrow network, sliced as published, with no help of the library."""
    small = Network(len(first), len(second)).eval()
    a, b = torch.tensor(first), torch.tensor(second)
    state = {name: tensor if name.startswith("head") else tensor[a] if tensor.ndim and name[0] in "sn" else tensor
             for name, tensor in model.state_dict().items()}  # fmt: skip
    state["inner.weight"], state["inner.bias"] = state["inner.weight"][b][:, a], state["inner.bias"][b]
    state["outer.weight"], state["outer.bias"] = state["outer.weight"][a][:, b], state["outer.bias"][a]
    state["head.weight"] = state["head.weight"][:, a]
    small.load_state_dict(state)
    return small


@quick
@given(st.integers(1, 20), st.integers(1, 20), st.sets(percents, min_size=1, max_size=3))
def test_slimify_keeps_the_published_units(first, second, narrow):
    widths = (1.0, *(percent / 100 for percent in sorted(narrow, reverse=True)))
    model, x = oracles.randomise(Network(first, second).eval()), torch.randn(2, 3, 5, 5, **F64)
    slim = slimmable.slimify(model, widths, example_inputs=x, rounding="floor")
    oracles.full_width_is_the_original(model, slim, x)
    for width in widths:
        kept = [range(max(1, int(units * width))) for units in (first, second)]
        expected = published(model, *kept)
        with slimmable.at_width(slim, width), torch.no_grad():
            torch.testing.assert_close(slim(x), expected(x), rtol=1e-12, atol=1e-12)
        assert slimmable.extract(slim, width).inner.weight.shape == expected.inner.weight.shape


@quick
@given(st.integers(4, 20), st.integers(4, 20), st.sampled_from([(1.0, 0.5), (1.0, 0.7, 0.26), (1.0, 0.5, 0.3, 0.2)]))
def test_slimify_without_overlap_keeps_disjoint_units(first, second, widths):
    model, x = oracles.randomise(Network(first, second).eval()), torch.randn(2, 3, 5, 5, **F64)
    options = {"example_inputs": x, "overlap": False, "rounding": "floor"}
    counts = [[max(1, int(units * width)) for width in widths[1:]] for units in (first, second)]
    if any(sum(kept) > units for kept, units in zip(counts, (first, second), strict=True)):
        with pytest.raises(WidthError, match=r"disjoint units .* group, made by"):
            slimmable.slimify(model, widths, **options)
        return
    slim = slimmable.slimify(model, widths, **options)
    oracles.full_width_is_the_original(model, slim, x)
    for index, width in enumerate(widths[1:]):
        kept = [range(sum(each[index + 1 :]), sum(each[index:])) for each in counts]
        with slimmable.at_width(slim, width), torch.no_grad():
            torch.testing.assert_close(slim(x), published(model, *kept)(x), rtol=1e-12, atol=1e-12)
    oracles.every_width_is_its_extraction(slim, x, limit=0)
    oracles.permuting_units_changes_nothing(model, slimmable.plan(slim), x, limit=1e-10)


def test_without_overlap_narrower_widths_train_disjoint_weights():
    model, x = Network(8, 12), torch.randn(4, 3, 5, 5, **F64)
    slim = slimmable.slimify(model, (1.0, 0.5, 0.25), example_inputs=x, overlap=False)
    used = {name: torch.zeros(tensor.shape) for name, tensor in slim.named_parameters() if "narrow" not in name}
    for width in (0.5, 0.25):
        slim.zero_grad()
        with slimmable.at_width(slim, width):
            slim(x).square().sum().backward()
        for name, tensor in slim.named_parameters():
            if name in used and tensor.grad is not None:
                used[name] += tensor.grad != 0
    assert all(used[name].max() == 1 for name in ("stem.weight", "inner.weight", "outer.weight", "head.weight"))
    assert used["head.bias"].max() == 2  # which every width has in full


@pytest.mark.parametrize("rules", [{"rounding": "floor"}, {"overlap": False}, {"rounding": "floor", "overlap": False}])
def test_a_file_keeps_the_rules(rules, tmp_path):
    model, x = oracles.randomise(Network(10, 14).eval()), torch.randn(2, 3, 5, 5, **F64)
    slim = slimmable.slimify(model, (1.0, 0.75, 0.25), example_inputs=x, **rules)
    slimmable.save(slim, tmp_path / "model.safetensors")
    loaded = slimmable.load(tmp_path / "model.safetensors", model)
    found = slimmable.plan(loaded)
    assert found.to_dict() == slimmable.plan(slim).to_dict()
    assert {name: found.to_dict()[name] for name in rules} == rules
    assert slimmable.slimify(loaded, (1.0, 0.75, 0.25), example_inputs=x, **rules)._slim.plan is found  # nothing to do
    assert str(slimmable.plan(slimmable.slimify(loaded, (1.0, 0.75, 0.25), example_inputs=x))) != str(found)
    run = oracles.run_on(x)
    before, after = oracles.outputs_of(slim, run), oracles.outputs_of(loaded, run)
    assert all(torch.equal(before[width][0], after[width][0]) for width in before)
    oracles.every_width_is_its_extraction(copy.deepcopy(loaded), x, limit=0)


def test_any_width_of_a_universal_model_is_rounded_alike():
    model, x = Network(10, 14).eval(), torch.randn(2, 3, 5, 5, **F64)
    slim = slimmable.slimify(model, (1.0, 0.25), example_inputs=x, rounding="floor", universal=True)
    slimmable.set_width(slim, 0.79)
    assert slim.inner.weight.shape == (11, 7, 1, 1) == (int(14 * 0.79), int(10 * 0.79), 1, 1)
    with pytest.raises(ConversionError, match="universal=True needs widths that share"):
        slimmable.slimify(model, (1.0, 0.25), example_inputs=x, overlap=False, universal=True)


def test_heads_stay_whole():
    attention = nn.TransformerEncoderLayer(24, 4, 33, batch_first=True, **F64).eval()
    x = torch.randn(2, 5, 24, **F64)
    slim = slimmable.slimify(
        nn.Sequential(nn.Linear(24, 24, **F64), attention), (1.0, 0.7), example_inputs=x, rounding="floor"
    )
    oracles.every_width_is_its_extraction(slim, x, limit=1e-14)
    small = slimmable.extract(slim, 0.7)[1]
    assert small.linear1.out_features == int(33 * 0.7) == 23
    assert small.self_attn.embed_dim % small.self_attn.num_heads == 0


@quick
@given(st.integers(1, 20), st.integers(1, 20), percents)
def test_layers_built_by_hand_keep_the_published_units(ins, outs, percent):
    width = percent / 100
    options = {"widths": (1.0, width), "rounding": "floor"}
    kept_in, kept_out = max(1, int(ins * width)), max(1, int(outs * width))
    linear = layers.SlimLinear(ins, outs, **options)
    norms = [layers.SlimLayerNorm(outs, **options), layers.SlimLayerNorm.from_plain(nn.LayerNorm(outs), **options)]
    switched = layers.SwitchableBatchNorm1d(outs, **options)
    for module in (linear, layers.SlimConv2d(ins, outs, 1, **options), *norms, switched):
        slimmable.set_width(module, width)
    assert linear.weight.shape == (kept_out, kept_in)
    assert [norm.weight.shape for norm in (*norms, switched)] == [(kept_out,)] * 3
    probes = layers.SwitchableProbe(ins, 3, **options), layers.SwitchableProbe.from_plain(nn.Linear(ins, 3), **options)
    assert [probe.module_at(1).in_features for probe in probes] == [kept_in] * 2
    with pytest.raises(UsageError, match="rounding must be one of"):
        layers.SlimLinear.from_plain(nn.Linear(ins, outs), (1.0, width), rounding="up")
