"""Universal models, widths by layer, and counts of channels: each is a network of its own, and leaves no trace."""

from __future__ import annotations

import copy
import io
from functools import cache

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from timm.layers import convert_sync_batchnorm
from torch import nn

import slimmable
from slimmable.errors import ConversionError, WidthError
from tests.convert import oracles

WIDTHS = (1.0, 0.5, 0.25)
NAMES = ("test_resnet", "test_vit", "test_efficientnet", "test_convnext")


@cache
def network(name: str, universal: bool) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    plain = oracles.randomise(timm.create_model(name, num_classes=7).double().eval())
    model = slimmable.slimify(plain, WIDTHS, universal=universal)
    return model, torch.randn(2, 3, 64, 64, dtype=torch.float64) if "vit" not in name else images(model)


def images(model: nn.Module) -> torch.Tensor:
    return torch.randn(2, *model.pretrained_cfg["input_size"], dtype=torch.float64)


def equals_its_extraction(model: nn.Module, setting, x: torch.Tensor) -> None:
    small = slimmable.extract(model, setting)
    assert not [m for m in small.modules() if "_slim" in m.__dict__ or type(m).__module__.startswith("slimmable")]
    with torch.no_grad(), slimmable.at_width(model, setting):
        assert oracles.difference(model(x), small(x)) <= 1e-12


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NAMES), st.floats(0.25, 1.0))
def test_a_universal_model_runs_at_any_width_from_the_narrowest_on(name, width):
    model, x = network(name, True)
    equals_its_extraction(model, width, x)
    plan = slimmable.plan(model, WIDTHS, universal=True)
    found = plan.sub_network(width)
    for count, group in zip(found.counts, plan.groups, strict=True):
        assert group.kept[-1] <= count <= group.units
    with slimmable.at_width(model, width):
        named = slimmable.width_of(model)
        assert named == width or plan.sub_network(named).counts == found.counts  # as a width that the model keeps
    assert slimmable.width_of(model) == 1.0


class Attention(nn.Module):
    """Its stream and its heads agree at few counts: 5 or 8 heads, that no width between halves and quarters divides."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        y = self.norm(x)
        q = self.q(y).reshape(batch, tokens, self.heads, dim // self.heads).transpose(1, 2)
        k, v = self.kv(y).reshape(batch, tokens, 2, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


@pytest.mark.parametrize(("dim", "heads"), [(320, 5), (512, 8)])
def test_no_width_costs_more_than_a_wider_one_of_the_model(dim, heads):
    torch.manual_seed(0)
    blocks = [Attention(dim, heads) for _ in range(2)]
    net = nn.Sequential(nn.Linear(6, dim), *blocks, nn.Flatten(0, 1), nn.Linear(dim, 3)).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    widths = (1.0, 0.75, 0.5, 0.25)
    model = slimmable.slimify(net, widths, example_inputs=x, universal=True)
    plan = slimmable.plan(model, widths, universal=True)
    for percent in range(25, 101, 3):
        wider = next(c for w, c in zip(widths[::-1], plan.columns[::-1], strict=True) if w >= percent / 100)
        found = plan.sub_network(percent / 100)
        assert max(np.array(found.counts) - np.array(wider.counts)) <= 0, percent
    equals_its_extraction(model, 0.37, x)


layers = st.dictionaries(
    st.sampled_from(["*", "conv1", "layer1*", "layer2", "layer3.0", "layer4.*.conv2"]),
    st.sampled_from([0.1, 0.25, 0.37, 0.5, 0.75, 1.0]),
    min_size=1,
)


@settings(max_examples=25, deadline=None)
@given(layers, st.booleans())
def test_widths_by_layer_are_a_network_of_their_own(widths, universal):
    model, x = network("test_resnet", universal)
    equals_its_extraction(model, widths, x)


def test_the_last_pattern_counts_and_shared_channels_are_as_wide_as_their_widest_maker():
    model, _ = network("test_resnet", False)
    with slimmable.at_width(model, {"*": 0.5, "layer2.0.conv1": 1.0, "layer3": 0.25}):
        assert model.layer1[0].conv1.weight.shape[0] == model.layer1[0].conv1.out_channels // 2
        assert model.layer2[0].conv1.weight.shape[0] == model.layer2[0].conv1.out_channels
        assert model.layer3[0].conv1.weight.shape[0] == model.layer3[0].conv1.out_channels // 4
    stream = model.layer2[0].conv2
    with slimmable.at_width(model, {"layer2.0.conv2": 0.25}):  # the shortcut, at 1, adds to the same channels
        assert stream.weight.shape[0] == stream.out_channels


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(NAMES))
def test_counts_of_groups_are_a_network_of_their_own_or_refused(data, name):
    model, x = network(name, True)
    groups = slimmable.plan(model, WIDTHS, universal=True).groups
    counts = tuple(data.draw(st.integers(1, group.units)) for group in groups)
    try:
        slimmable.set_width(model, counts)
    except WidthError:
        assert slimmable.width_of(model) == 1.0
        with pytest.raises(WidthError, match=r"do not go together: group \d+ with \d+"):
            slimmable.extract(model, counts)
        return
    try:
        assert slimmable.width_of(model) == counts
        equals_its_extraction(model, counts, x)
    finally:
        slimmable.set_width(model, 1.0)


def test_uniform_widths_by_layer_and_counts_are_the_width_itself():
    model, _ = network("test_resnet", False)
    plan = slimmable.plan(model, WIDTHS)
    for setting in ({"*": 0.5}, plan.columns[1].counts, [group.kept[1] for group in plan.groups]):
        with slimmable.at_width(model, setting):
            assert slimmable.width_of(model) == 0.5


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (0.2, r"0.2 is not a number in \[0.25, 1\]"),
        (1.5, "1.5"),
        ("0.5", "0.5"),
        ({"layer9*": 0.5}, "'layer9\\*'"),
        ({"layer1*": 0}, "width 0 of layers 'layer1\\*'"),
        ({"fc": 0.5}, "'fc'"),
        ((1, 2), "2 counts"),
        ([0] * 11, "cannot keep 0"),
    ],
)
def test_what_is_no_sub_network_is_refused_and_nothing_changes(setting, says):
    model, _ = network("test_resnet", True)
    if setting == [0] * 11:
        setting = [0] * len(slimmable.plan(model, WIDTHS, universal=True).groups)
    with pytest.raises(WidthError, match=says):
        slimmable.set_width(model, setting)
    assert slimmable.width_of(model) == 1.0


def test_a_model_that_is_not_universal_has_only_its_own_widths():
    model, _ = network("test_resnet", False)
    with pytest.raises(WidthError, match=r"Nearest is 0\.5"):
        slimmable.set_width(model, 0.4)


def test_hand_made_layers_have_only_their_widths():
    layer = slimmable.SlimLinear(4, 8, widths=WIDTHS)
    with pytest.raises(WidthError, match="made by hand"):
        slimmable.set_width(layer, {"*": 0.5})


# -- norms
def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, slimmable.layers.SwitchableNorm)]


def test_universal_norms_share_gain_and_bias_and_have_statistics_of_their_own():
    model = copy.deepcopy(network("test_resnet", True)[0])
    keys = [key for key in model.state_dict() if ".narrow." in key]
    assert keys
    assert not [key for key in keys if key.endswith(("weight", "bias"))]
    assert not [name for name, _ in model.named_parameters() if ".narrow." in name]
    norm = norms(model)[0]
    before = {name: buffer.clone() for name, buffer in norm.full.named_buffers()}
    slimmable.set_width(model, 0.5)
    model.train()(torch.randn(4, 3, 64, 64, dtype=torch.float64)).sum().backward()
    kept = norm.module_at(1).num_features
    gradient = norm.full.weight.grad
    assert gradient[:kept].all()
    assert not gradient[kept:].any()
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.full.named_buffers())


def test_a_guest_width_starts_with_the_statistics_of_the_full_width_and_leaves_none():
    model = copy.deepcopy(network("test_resnet", True)[0])
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    slimmable.set_width(model, 0.4)
    for norm in norms(model):
        kept = norm.num_features
        assert torch.equal(norm.running_mean, norm.full.running_mean[:kept])
        assert torch.equal(norm.weight, norm.full.weight[:kept])
    model.train()(x)
    assert not torch.equal(
        norms(model)[0].running_mean, norms(model)[0].full.running_mean[: norms(model)[0].num_features]
    )
    slimmable.set_width(model, 1.0)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_calibration_keeps_a_new_width_and_computes_what_a_registered_one_would_have():
    model, _ = network("test_resnet", True)
    data = [torch.randn(4, 3, 64, 64, dtype=torch.float64) for _ in range(3)]
    found = copy.deepcopy(model)
    slimmable.calibrate_bn(found, data, [0.4, {"layer1*": 0.5}])
    assert slimmable.widths_of(found) == (1.0, 0.5, 0.4, 0.25)
    made = slimmable.slimify(slimmable.extract(model, 1.0), (1.0, 0.5, 0.4, 0.25), universal=True)
    slimmable.calibrate_bn(made, data, [0.4])
    small = slimmable.extract(model, {"layer1*": 0.5})
    slimmable.calibrate_bn(slimmable.slimify(small, (1.0,), inplace=True), data)
    for width, other in ((0.4, made), ({"layer1*": 0.5}, small)):
        for key, tensor in slimmable.extract(found, width).state_dict().items():
            expected = slimmable.extract(other, width if other is made else 1.0).state_dict()[key]
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)
    again = copy.deepcopy(found)
    again.load_state_dict(found.state_dict())
    assert [key for key in found.state_dict() if ".narrow.3." in key]


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_universal_norms_survive_converters(convert):
    model, x = copy.deepcopy(network("test_resnet", True))
    slimmable.calibrate_bn(model, [x], [0.4])
    expected = slimmable.run_widths(model, x)
    converted = convert(model)
    assert not [module for module in converted.modules() if type(module) is nn.BatchNorm2d]
    for width, y in slimmable.run_widths(converted.eval(), x).items():
        torch.testing.assert_close(y, expected[width])
    with torch.no_grad():
        for norm in norms(converted):
            norm.full.weight.zero_()
            assert not norm.module_at(2).weight.any()  # it is still a part of the full norm's


# -- life
@pytest.mark.parametrize("setting", [0.4, {"layer3*": 0.3}])
def test_copies_and_pickles_made_at_a_guest_width_are_at_it_and_are_independent(setting):
    model, x = copy.deepcopy(network("test_resnet", True))
    slimmable.set_width(model, setting)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert slimmable.width_of(twin) == slimmable.width_of(model)
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
        slimmable.set_width(twin, 0.6)
        assert slimmable.width_of(model) != 0.6
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_contexts_of_guests_nest_and_follow_the_mode_and_the_type():
    model, x = copy.deepcopy(network("test_efficientnet", True))
    with slimmable.at_width(model, 0.4):
        outer = model(x)
        with pytest.raises(RuntimeError, match="stop"), slimmable.at_width(model, {"blocks*": 0.3}):
            raise RuntimeError("stop")
        with slimmable.at_width(model, 0.7):
            pass
        assert slimmable.width_of(model) == 0.4
        torch.testing.assert_close(model(x), outer, rtol=0, atol=0)
        assert not norms(model)[0].module_at(-1).train(False).training
        model.train()
        assert norms(model)[0].module_at(-1).training
        model.eval().float()
        assert model(x.float()).dtype == torch.float32


def test_a_part_takes_any_width_too():
    model, x = copy.deepcopy(network("test_resnet", True))
    body = nn.Sequential(*list(model.children())[:-1])
    slimmable.set_width(body, 0.6)
    assert body(x).shape[1] == slimmable.extract(model, 0.6).fc.in_features
    with pytest.raises(WidthError, match="different widths"):
        slimmable.width_of(model)


def test_converting_a_converted_model_again_is_a_copy_only_with_the_same_arguments():
    model, _ = network("test_resnet", True)
    assert slimmable.plan(model, WIDTHS, universal=True) is slimmable.plan(
        slimmable.slimify(model, WIDTHS, universal=True), WIDTHS, universal=True
    )
    switched = slimmable.slimify(model, WIDTHS)
    with pytest.raises(WidthError):
        slimmable.set_width(switched, 0.4)
    assert [name for name, _ in switched.named_parameters() if ".narrow." in name]


def test_surgery_is_refused_at_any_width():
    model = copy.deepcopy(network("test_resnet", True)[0])
    model.fc = nn.Linear(8, 8)
    with pytest.raises(ConversionError, match="gained layers"):
        slimmable.set_width(model, 0.4)


def test_more_requests_than_are_remembered():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 64), nn.Linear(4, 64), nn.Linear(128, 2)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            assert a.shape[1] == b.shape[1]  # so they can only have the counts of the model's own widths
            return self.head(torch.cat([a, b], 1))

    model = slimmable.slimify(Siblings(), WIDTHS, example_inputs=torch.zeros(2, 4))
    for units in range(2, 12):
        for more in range(40, 50):
            slimmable.set_width(model, {"a": units / 64, "b": more / 64})
            assert model(torch.zeros(2, 4)).shape == (2, 2)


def test_guests_leave_nothing_behind():
    def names(model):
        return sum(len(module._buffers) + len(module._non_persistent_buffers_set) for module in model.modules())

    model = timm.create_model("densenet121", block_config=(2, 2, 2, 2), num_classes=0)
    slim = slimmable.slimify(model, (1.0, 0.5), universal=True, example_inputs=torch.zeros(2, 3, 64, 64))
    before = names(slim)
    for width in (0.6, 0.7, 0.8, 1.0):
        slimmable.set_width(slim, width)
    assert names(slim) == before
    assert names(slimmable.extract(slim, 0.7)) == names(model)


def test_truth_is_no_width():
    for model in (network("test_resnet", True)[0], network("test_resnet", False)[0]):
        with pytest.raises(WidthError, match="True"):
            slimmable.set_width(model, True)


@pytest.mark.parametrize("universal", [False, True])
def test_a_state_dict_loads_at_a_width_without_statistics_of_its_own(universal):
    def make(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()
        return slimmable.slimify(oracles.randomise(net), (1.0, 0.5), example_inputs=x, universal=universal)

    x = torch.randn(4, 8)
    model, other = make(0), make(1)
    for each in (model, other):
        slimmable.set_width(each, {"0": 0.75})
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))
    assert model.state_dict().keys() == other.state_dict().keys()
