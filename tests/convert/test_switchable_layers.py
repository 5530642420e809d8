"""Layers that hold their own weights at each width: `slimify(..., switchable=...)` and `SwitchableLinear`."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import slimmable
from slimmable.errors import ConversionError
from slimmable.layers import SwitchableLinear
from tests.convert import oracles
from tests.convert.test_published_units import Network, published

F64 = {"dtype": torch.float64}
WIDTHS = (1.0, 0.5, 0.25)
OWN = ("inner", "head")
quick = settings(max_examples=15, deadline=None)


def images() -> Tensor:
    return torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0), **F64)


def learned(model: nn.Module) -> nn.Module:
    """Move all parameters, so that no width's are part of another's."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, **F64), alpha=0.1)
    return model


def converted(widths: tuple[float, ...] = WIDTHS, **options: object) -> nn.Module:
    model = oracles.randomise(Network(8, 12).eval())
    return slimmable.slimify(model, widths, example_inputs=images(), **{"switchable": OWN, **options})


def all_outputs(model: nn.Module) -> dict[float, Tensor]:
    with torch.no_grad():
        return slimmable.run_widths(model, images())


@quick
@given(st.integers(1, 16), st.integers(1, 16), st.sets(st.integers(1, 99), min_size=1, max_size=3), st.booleans())
def test_each_width_trains_its_own_weights(first, second, narrow, floor):
    widths = (1.0, *(percent / 100 for percent in sorted(narrow, reverse=True)))
    model, x = oracles.randomise(Network(first, second).eval()), images()
    options = {"example_inputs": x, "rounding": "floor" if floor else "nearest"}
    slim = slimmable.slimify(model, widths, switchable=OWN, **options)
    sliced = slimmable.slimify(model, widths, **options)
    before, start = all_outputs(slim), all_outputs(sliced)
    assert all(torch.equal(before[width], start[width]) for width in widths)  # they start as what was read before
    plain = {}
    for width in widths:
        kept = [range(max(1, (int if floor else round)(units * width))) for units in (first, second)]
        plain[width] = published(model, *kept)
        plain[width](x).square().sum().backward()
        with slimmable.at_width(slim, width):
            slim(x).square().sum().backward()
    for index, width in enumerate(widths):
        for layer in OWN:
            mine, theirs = getattr(slim, layer).module_at(index), getattr(plain[width], layer)
            for name, parameter in theirs.named_parameters():
                torch.testing.assert_close(mine.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-10)
    summed = torch.zeros(first, 3, 3, 3, **F64)
    for each in plain.values():
        summed[: len(each.stem.weight)] += each.stem.weight.grad
    torch.testing.assert_close(slim.stem._parameters["weight"].grad, summed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rules", [{}, {"overlap": False, "rounding": "floor"}])
def test_what_holds_for_every_model(rules, tmp_path):
    slim = learned(converted(**rules))
    expected = all_outputs(slim)
    full = Network(8, 12).eval()
    full.load_state_dict(slimmable.full_state_dict(slim))
    with torch.no_grad():
        assert torch.equal(full(images()), expected[1.0])
    oracles.every_width_is_its_extraction(slim, images(), limit=0)
    oracles.permuting_units_changes_nothing(full, slimmable.plan(slim), images(), limit=1e-10)
    assert slimmable.extract(slim, 0.25).head.in_features == 2
    slimmable.save(slim, tmp_path / "model.safetensors")
    again = slimmable.load(tmp_path / "model.safetensors", Network(8, 12))
    assert slimmable.plan(again).to_dict() == slimmable.plan(slim).to_dict()
    assert "switchable=('inner', 'head')" in str(slimmable.plan(again))
    for twin in (
        again,
        copy.deepcopy(slim),
        pickle.loads(pickle.dumps(slim)),
        slimmable.slimify(slim, WIDTHS, switchable=OWN, example_inputs=images(), **rules),
    ):
        found = all_outputs(twin)
        assert all(torch.equal(found[width], expected[width]) for width in WIDTHS)
    learned(twin)
    assert all(
        torch.equal(before, after) for before, after in zip(all_outputs(slim).values(), expected.values(), strict=True)
    )


def test_widths_that_stay_keep_what_they_learned():
    slim = learned(converted())
    expected = all_outputs(slim)
    with pytest.warns(UserWarning, match=r"lose what a width has learned.*inner"):
        plain = slimmable.slimify(slim, WIDTHS, example_inputs=images())
    assert not torch.equal(all_outputs(plain)[0.5], expected[0.5])
    more = slimmable.slimify(slim, (1.0, 0.75, 0.5), example_inputs=images(), switchable=OWN)
    found = all_outputs(more)
    assert torch.equal(found[1.0], expected[1.0])
    assert torch.equal(found[0.5], expected[0.5])
    narrow = slimmable.slimify(slim, (1.0, 0.5, 0.4), example_inputs=images(), switchable=OWN)
    start = narrow.inner.module_at(2).weight  # a new width starts from the nearest wider one's
    assert torch.equal(start, slim.inner.module_at(1).weight[: start.shape[0], : start.shape[1]])


def test_layers_follow_their_units_into_another_order():
    slim = learned(converted(widths=(1.0, 0.5)))
    with pytest.warns(UserWarning, match="lose what a width has learned"):
        again = slimmable.slimify(slim, (1.0, 0.5), example_inputs=images(), switchable=OWN, importance="magnitude")
    moved = [int((slim.norm.full.weight == gain).nonzero()) for gain in again.norm.full.weight]
    units = [int((slim.inner.full.bias == bias).nonzero()) for bias in again.inner.full.bias]
    mine, had, whole = again.inner.module_at(1).weight, slim.inner.module_at(1).weight, slim.inner.full.weight
    for row, out in enumerate(units[:6]):
        for column, into in enumerate(moved[:4]):
            kept = out < 6 and into < 4  # a weight that the width had
            assert mine[row, column] == (had if kept else whole)[out, into]


def test_a_plain_checkpoint_fills_every_width():
    slim, other = converted(), oracles.randomise(Network(8, 12).eval(), seed=3)
    slim.load_state_dict(other.state_dict())
    expected = all_outputs(slimmable.slimify(other, WIDTHS, example_inputs=images()))
    assert all(torch.equal(found, expected[width]) for width, found in all_outputs(slim).items())
    names = [name for name, _ in slim.named_parameters() if name.startswith("head")]
    assert names == [
        "head.weight",
        "head.bias",
        *(f"head.narrow.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
    ]


def test_other_sub_networks_read_part_of_the_full_weights():
    slim = learned(converted())
    slimmable.set_width(slim, {"stem": 0.75, "outer": 0.75, "inner": 0.25})
    assert torch.equal(slim.inner.weight, slim.inner.full.weight[:3, :6])
    assert slimmable.extract(slim, {"stem": 0.75, "outer": 0.75, "inner": 0.25}).inner.weight.shape == (3, 6, 1, 1)


class Every(nn.Module):
    """Layers of several kinds, with integers that follow the width."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 8, 3, padding=1)
        self.depthwise, self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.Conv1d(8, 8, 1, groups=2)
        self.group_norm, self.norm = nn.GroupNorm(4, 8), nn.LayerNorm(8)
        self.act, self.recurrent = nn.PReLU(8), nn.GRU(8, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.group_norm(self.grouped(self.depthwise(self.up(x)))))
        return self.head(self.recurrent(self.norm(x.mT))[0][:, -1])


def test_every_kind_of_layer():
    x = torch.randn(2, 4, 5)
    model = oracles.randomise(Every().eval())
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=x, switchable="*")
    sliced = slimmable.slimify(model, (1.0, 0.5), example_inputs=x)
    assert len(slimmable.plan(slim).switchable) == 8
    assert all(
        torch.equal(slimmable.run_widths(slim, x)[width], slimmable.run_widths(sliced, x)[width]) for width in (1, 0.5)
    )
    oracles.every_width_is_its_extraction(slim, x, limit=0)
    assert str(slimmable.extract(slim, 0.5)) == str(slimmable.extract(sliced, 0.5))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("test_vit", "blocks.0.mlp*"), ("test_resnet", ("fc", "layer1*")), ("test_efficientnet", "*conv_dw")],
)
def test_models_of_timm(name, pattern, tmp_path):
    torch.manual_seed(0)
    model = oracles.randomise(timm.create_model(name, num_classes=5).eval())
    slim = slimmable.slimify(model, (1.0, 0.5), switchable=pattern)
    x = torch.randn(1, 3, 64, 64) if name != "test_vit" else torch.randn(1, 3, 160, 160)
    oracles.full_width_is_the_original(model, slim, x)
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    oracles.every_width_is_its_extraction(slim, x, limit=1e-6)
    slimmable.save(slim, tmp_path / "model.safetensors")
    with (
        slimmable.at_width(slim, 0.5),
        slimmable.at_width(again := slimmable.load(tmp_path / "model.safetensors"), 0.5),
    ):
        assert torch.equal(slim(x), again(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize(
    ("model", "switchable", "message"),
    [
        (Tied(), "second", "'second', a Linear, which has modules inside or shares its weights"),
        (nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)), "1", "'1', a MultiheadAttention"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "1", "names no layer with weights"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "2", "switchable pattern '2' matches no module"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), 3, "switchable is 3; it is a name pattern"),
    ],
)
def test_what_cannot_be_switched(model, switchable, message):
    kind, state = type(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ConversionError, match=message.replace("(", r"\(")):
        slimmable.slimify(model, (1.0, 0.5), example_inputs=torch.zeros(1, 4), switchable=switchable, inplace=True)
    assert type(model) is kind
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_does_not_go_together():
    with pytest.raises(ConversionError, match="universal=True needs widths that share their weights"):
        converted(universal=True)
    for options in ({}, {"switchable": (), "overlap": False}):
        with pytest.raises(ConversionError, match="gates need widths that share their weights"):
            slimmable.gating.gate(converted(**options), example_inputs=images())


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 99), st.booleans(), st.booleans(), st.booleans())
def test_switchable_linear(ins, outs, percent, slim_in, slim_out, bias):
    options = {"slim_in": slim_in, "slim_out": slim_out, "rounding": "floor"}
    layer = SwitchableLinear(ins, outs, (1.0, percent / 100), bias, **F64, **options)
    sizes = [max(1, int(size * (percent / 100))) if slim else size for size, slim in ((ins, slim_in), (outs, slim_out))]
    slimmable.set_width(layer, percent / 100)
    weight = layer.linears[1].weight
    assert weight.shape == (sizes[1], sizes[0])
    x = torch.randn(3, sizes[0], **F64)
    torch.testing.assert_close(layer(x), x @ weight.T + (layer.linears[1].bias if bias else 0))
    layer(x).sum().backward()
    assert layer.linears[0].weight.grad is None
    assert weight.grad is not None
    linear = nn.Linear(ins, outs, bias, **F64)
    made = SwitchableLinear.from_plain(linear, (1.0, percent / 100), **options)
    assert made.to_plain() is linear
    assert torch.equal(made.linears[1].weight, linear.weight[: sizes[1], : sizes[0]])
    assert f"in_features={ins}, out_features={outs}, bias={bias}" in repr(made)
    assert type(slimmable.extract(made, percent / 100)) is nn.Linear


def test_switchable_linear_in_a_network_built_by_hand():
    net = nn.Sequential(
        slimmable.SlimLinear(8, 8, widths=WIDTHS, slim_in=False),
        SwitchableLinear(8, 8, WIDTHS, slim_out=False),
        nn.Linear(8, 2),
    )
    outputs = slimmable.run_widths(net, torch.randn(4, 8))
    assert {tuple(output.shape) for output in outputs.values()} == {(4, 2)}
