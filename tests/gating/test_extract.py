"""A static network from a gated one equals the gated network whose masks are constant."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import slimmable
from slimmable.gating import LayerGates, gate_activity, gate_plan
from tests.convert.oracles import difference, randomise
from tests.gating.test_gate import Constant, gates_of, images

pytestmark = pytest.mark.filterwarnings("ignore:the gates of this .* were never trained")


def gated_model(name="resnet18", **kwargs):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=5)).eval().double()
    if "widths" in kwargs:
        model = slimmable.slimify(model, kwargs.pop("widths"), example_inputs=images(name))
    return slimmable.gating.gate(model, example_inputs=images(name), **kwargs)


def set_random_masks(model):
    """Give every gate a random constant mask, not of the first units; return name -> mask."""
    generator = torch.Generator().manual_seed(2)
    masks = {}
    for candidate in gate_plan(model).gates:
        mask = torch.randint(2, (1, candidate.units), generator=generator).double()
        mask[0, -1] = 1
        masks[candidate.name] = mask
        gates_of(model)[candidate.name].at[0] = Constant(mask)
    return masks


@pytest.mark.parametrize(
    "name", ["resnet18", "regnety_002", "efficientnet_b0", "convnext_atto", "test_vit", "densenet121"]
)
@torch.no_grad()
def test_constant_masks_are_extracted(name):
    model, x = gated_model(name), images(name)
    for module in model.modules():  # norms of the two passes that differ
        if hasattr(module, "gated"):
            randomise(module.gated, seed=5)
    set_random_masks(model)
    with slimmable.gating.gated(model) as run:
        expected = model(x)
    small = slimmable.gating.extract_gated(model, [x], keep=0.5, recalibrate=False)
    assert difference(small(x), expected) < 1e-12
    assert difference(small(x), model(x)) > 1e-3
    assert not any(type(module).__module__.startswith("slimmable") for module in small.modules())
    [row] = slimmable.profile(small, example_inputs=x[:1], repeats=0).rows
    assert run.macs().tolist() == [row.macs] * 2
    assert type(small) is type(model)


@torch.no_grad()
def test_a_slimmable_model_gives_its_full_width():
    model, x = gated_model(widths=(1.0, 0.5)), images("resnet18")
    set_random_masks(model)
    with slimmable.gating.gated(model):
        expected = model(x)
    slimmable.set_width(model, 0.5)
    small = slimmable.gating.extract_gated(model, [x], keep=0.5, recalibrate=False)
    assert difference(small(x), expected) < 1e-12
    assert slimmable.width_of(model) == 0.5


def test_activity_is_the_share_of_images():
    model = gated_model().train()
    batches = [torch.randn(3, 3, 64, 64).double(), [torch.randn(1, 3, 64, 64).double(), "label"]]
    masks = [torch.randint(2, (3, 64)).double(), torch.randint(2, (1, 64)).double()]

    class InTurn(nn.Module):
        def __init__(self):
            super().__init__()
            self.number = 0

        def forward(self, pooled):
            self.number += 1
            return masks[self.number - 1]

    gates_of(model)["layer1.0.conv1"].at[0] = InTurn()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    activity = gate_activity(model, batches)
    torch.testing.assert_close(activity["layer1.0.conv1"], torch.cat(masks).mean(0))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.9])
def test_a_budget_is_used_up_by_the_most_open_units(budget):
    model, x = gated_model(), images("resnet18", 4)
    torch.manual_seed(1)
    for gates in gates_of(model).values():  # every unit with an activity of its own, nearly
        gates.at[0] = Constant((torch.rand(4, gates.at[0].expand.out_features) < torch.rand(1)).double())
    activity = gate_activity(model, [x])
    small = slimmable.gating.extract_gated(model, [x], budget=budget)
    dense = slimmable.profile(timm.create_model("resnet18", num_classes=5), (3, 64, 64), repeats=0).rows[0].macs
    macs = slimmable.profile(small, (3, 64, 64), repeats=0).rows[0].macs
    assert budget * 0.99 < macs / dense <= budget
    kept = {name: small.get_submodule(name).out_channels for name in activity}
    least = min(activity[name].sort(descending=True).values[count - 1] for name, count in kept.items() if count > 1)
    most = max(
        activity[name].sort(descending=True).values[count]
        for name, count in kept.items()
        if count < len(activity[name])
    )
    assert most <= least


def test_multiples():
    model, x = gated_model(), images("resnet18", 4)
    for gates in gates_of(model).values():
        units = gates.at[0].expand.out_features
        gates.at[0] = Constant((torch.rand(4, units) < torch.linspace(0, 1, units)).double())
    dense = slimmable.profile(timm.create_model("resnet18", num_classes=5), (3, 64, 64), repeats=0).rows[0].macs
    for settings in ({"keep": 0.6}, {"budget": 0.5}):
        small = slimmable.gating.extract_gated(model, [x], round_to=16, recalibrate=False, **settings)
        counts = [small.get_submodule(name).out_channels for name in gates_of(model)]
        assert all(count % 16 == 0 for count in counts)
        assert min(counts) < 64
        if "budget" in settings:
            assert 0.45 < slimmable.profile(small, (3, 64, 64), repeats=0).rows[0].macs / dense <= 0.5


def test_heads_have_enough_channels_for_a_multiple():
    model, x = gated_model("test_vit"), images("test_vit")
    for name, units in (("blocks.0.attn.qkv", 1), ("blocks.0.mlp.fc1", 44)):
        gates = gates_of(model)[name]
        gates.at[0] = Constant((torch.arange(gates.at[0].expand.out_features) < units).double()[None])
    small = slimmable.gating.extract_gated(model, [x], keep=0.5, round_to=16, recalibrate=False)
    assert small.blocks[0].attn.proj.in_features == 32  # one head of two
    assert small.blocks[0].mlp.fc1.out_features == 48


def test_statistics_are_those_of_the_small_network():
    model, x = gated_model(), images("resnet18", 8)
    set_random_masks(model)
    small = slimmable.gating.extract_gated(model, [x], keep=0.5)
    seen = {}
    small.layer2[0].conv1.register_forward_hook(lambda module, args, out: seen.update(out=out))
    norm = small.layer2[0].bn1
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    with torch.no_grad():
        small.train()(x)  # as calibration ran it, by the batch's own statistics
    torch.testing.assert_close(mean, seen["out"].mean((0, 2, 3)))
    torch.testing.assert_close(variance, seen["out"].transpose(0, 1).flatten(1).var(1))


def test_bad_calls():
    model, x = gated_model(), images("resnet18")
    for keyword, value, message in [
        ("keep", 0, r"must be in \(0, 1\], got 0"),
        ("keep", 1.5, r"must be in \(0, 1\]"),
        ("budget", 1, r"must be in \(0, 1\), got 1"),
        ("budget", "half", r"must be in \(0, 1\)"),
        ("budget", 0.001, "the smallest network costs 0.0"),
    ]:
        with pytest.raises(slimmable.errors.UsageError, match=message):
            slimmable.gating.extract_gated(model, [x], **{keyword: value})
    with pytest.raises(slimmable.errors.UsageError, match="round_to must be a 64-bit integer"):
        slimmable.gating.extract_gated(model, [x], keep=0.5, round_to=0)
    for both in ({}, {"keep": 0.5, "budget": 0.5}):
        with pytest.raises(slimmable.errors.UsageError, match="either keep"):
            slimmable.gating.extract_gated(model, [x], **both)
    with pytest.raises(slimmable.errors.UsageError, match="iterated over twice"):
        slimmable.gating.extract_gated(model, iter([x]), keep=0.5)
    with pytest.raises(slimmable.errors.DataError, match="loader is empty"):
        slimmable.gating.extract_gated(model, [], keep=0.5)
    with pytest.raises(slimmable.errors.DataError, match=r"gate_activity: batches must be .* got <class 'dict'>"):
        slimmable.gating.extract_gated(model, [{"image": x}], keep=0.5)
    with pytest.raises(slimmable.errors.UsageError, match="is not a model that gate returned"):
        slimmable.gating.extract_gated(nn.Sequential(model), [x], keep=0.5)
    assert any(isinstance(module, LayerGates) for module in model.modules())
