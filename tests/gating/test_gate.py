"""Gates on any backbone: what they change is what zeroed, or extracted, channels change, and nothing else."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from itertools import pairwise

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import slimmable
from slimmable._convert import apply_plan
from slimmable.errors import ConversionError, UsageError
from slimmable.gating import GatedPass, LayerGates, PassNorm, dense, gate, gate_plan, gated, has_gates, ungate
from tests.convert.oracles import difference, randomise

pytestmark = pytest.mark.filterwarnings("ignore:the gates of this .* were never trained")

FAMILIES = {  # name -> number of gates, one for each inner group of a block
    "resnet18": 8,
    "resnext26ts": 18,
    "regnety_002": 36,
    "efficientnet_b0": 19,
    "mobilenetv3_small_050": 22,
    "convnext_atto": 12,
    "test_vit": 12,
    "test_mambaout": 13,  # two groups of one layer, several times
}


class Constant(nn.Module):
    """In the place of a gate: the same mask for every image."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, pooled):
        return self.mask.expand(len(pooled), -1)


def images(name, count=2):
    size = (3, 160, 160) if name == "test_vit" else (3, 64, 64)
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(name):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=5)).eval().double()


def gates_of(model):
    return {part.name: part for part in model.modules() if isinstance(part, LayerGates)}


def set_masks(model, share, index=0):
    """Let every gate open the first units; return the counts of the channel groups of the full width."""
    found = gate_plan(model)
    counts = list(found.plan.columns[index].counts)
    for candidate in found.gates:
        units = counts[candidate.group]
        kept = counts[candidate.group] = max(1, round(share * units))
        mask = torch.cat([torch.ones(1, kept), torch.zeros(1, units - kept)], 1).double()
        gates_of(model)[candidate.name].at[index] = Constant(mask)
    return tuple(counts)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_constant_masks_are_the_extracted_network(name):
    model, x = plain(name), images(name)
    gated_model = gate(model, example_inputs=x, separate_norms=False)
    assert len(gates_of(gated_model)) == FAMILIES[name]
    assert torch.equal(gated_model(x), model(x))
    assert not has_gates(model)

    set_masks(gated_model, 1.0)
    with gated(gated_model) as run:
        assert torch.equal(gated_model(x), model(x))
    assert run.macs().tolist() == [run.dense_macs()] * 2
    [row] = slimmable.profile(model, example_inputs=x[:1], repeats=0).rows
    assert run.dense_macs() == row.macs
    assert slimmable.profile(gated_model, example_inputs=x[:1], repeats=0).rows == (row,)

    counts = set_masks(gated_model, 0.4)
    with gated(gated_model) as run:
        out = gated_model(x)
    small = slimmable.extract(apply_plan(copy.deepcopy(model), gate_plan(gated_model).plan), counts)
    assert difference(out, small(x)) < 1e-12
    assert difference(out, model(x)) > 1e-3  # the masks did something
    macs = slimmable.profile(small, example_inputs=x[:1], repeats=0).rows[0].macs
    assert run.macs().tolist() == [macs, macs]
    assert torch.equal(gated_model(x), model(x))  # dense again


PLACES = {  # modules whose output is what the gate of a layer masks, channels last or not
    "resnet18": ({f"layer{i}.{j}.conv1": f"layer{i}.{j}.act1" for i in range(1, 5) for j in range(2)}, 1),
    "convnext_atto": (
        {f"stages.{i}.blocks.{j}.mlp.fc1": f"stages.{i}.blocks.{j}.mlp.act" for i in range(4) for j in range(6)},
        1,
    ),
    "test_vit": ({f"blocks.{i}.mlp.fc1": f"blocks.{i}.mlp.act" for i in range(6)}, 2),
}


@pytest.mark.parametrize("name", PLACES)
@torch.no_grad()
def test_masks_of_images_zero_channels_behind_the_activation(name):
    model, x = plain(name), images(name, 4)
    places, axis = PLACES[name]
    gated_model = gate(model, example_inputs=x[:2], separate_norms=False, skip=lambda name, _: "attn" in name)
    for gates in gates_of(gated_model).values():
        gates.at[0] = Constant(torch.randint(2, (4, gates.at[0].expand.out_features)).double())
    with gated(gated_model) as run:
        out = gated_model(x)
    masks = run.masks()
    assert masks.keys() <= places.keys()
    assert any(not torch.equal(mask[0], mask[1]) for mask in masks.values())

    def zeroing(mask):
        shape = [len(x), *[1] * axis]
        return lambda module, args, out: out * mask.reshape([*shape[:axis], -1, *[1] * (out.ndim - axis - 1)])

    for maker, mask in masks.items():
        model.get_submodule(places[maker]).register_forward_hook(zeroing(mask))
    assert difference(out, model(x)) < 1e-12


@torch.no_grad()
def test_whole_heads_are_masked():
    model, x = plain("test_vit"), images("test_vit", 3)
    gated_model = gate(model, example_inputs=x, skip="*.mlp")
    with gated(gated_model) as run:
        out = gated_model(x)
    for maker, mask in run.masks().items():
        assert mask.shape == (3, 2)
        heads = mask.repeat_interleave(32, 1)[:, None]
        projection = model.get_submodule(maker.replace("qkv", "proj"))
        projection.register_forward_pre_hook(lambda module, args, heads=heads: (args[0] * heads,))
    assert difference(out, model(x)) < 1e-12


NO_HEADS = {  # name -> how to make it small, and why its heads have no gate
    "beit_base_patch16_224": ({"depth": 1}, r"it cannot shrink alone \(view in blocks.0.attn: size\(768\)\)"),
    "eva02_tiny_patch14_224": ({"depth": 1}, r"it cannot shrink alone .*size\(192\)"),
    "cait_xxs24_224": ({"depth": 1}, r"it cannot shrink alone .*size\(192\)"),
    "xcit_nano_12_p8_224": ({"depth": 1}, r"it cannot shrink alone .*size\(128\)"),
    "pvt_v2_b0": ({"depths": (1, 1, 1, 1)}, r"it cannot shrink alone .*size\(64\)"),
    "swin_tiny_patch4_window7_224": ({"depths": (1, 1)}, "not from a tensor with one row per image"),
}


@pytest.mark.parametrize("name", NO_HEADS)
def test_heads_of_attention_that_cannot_run_with_fewer_have_no_gate(name):
    settings, why = NO_HEADS[name]
    found = gate_plan(timm.create_model(name, **settings))
    assert [gate.name for gate in found.gates if gate.name.endswith("mlp.fc1")]
    assert not any(gate.name.endswith(("qkv", "attn.q", "attn.kv", "attn")) for gate in found.gates)
    assert any(re.search(why, reason) for maker, _, reason in found.refused if "attn" in maker)


@torch.no_grad()
def test_multiply_adds_of_each_image_are_those_of_its_own_sub_network():
    x = images("resnet18", 4)
    model = gate(plain("resnet18"), example_inputs=x[:1])
    with gated(model) as run:
        model(x[:3])
        model(x[3:])
    found = gate_plan(model)
    masks, layers = run.masks(), run.layer_macs()
    costs = sum(gates.at[0].macs for gates in gates_of(model).values())
    for image in range(4):
        counts = list(found.plan.channels.units)
        for candidate in found.gates:
            counts[candidate.group] = max(1, int(masks[candidate.maker][image].sum()))
        assert run.macs()[image] == found.plan.sub_network(tuple(counts)).macs + costs
    torch.testing.assert_close(torch.stack(list(layers.values())).sum(0), run.macs(), rtol=0, atol=0)
    assert (layers["layer1.0.conv1.channel_gate"] == 16 * (64 + 64)).all()


def test_other_input_sizes():
    model = gate(plain("resnet18"), example_inputs=images("resnet18"))
    x = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad(), gated(model) as run:
        model(x)
    with pytest.raises(UsageError, match=r"has read \(24, 16\) positions, but would read \(16, 16\)"):
        run.macs()
    with torch.no_grad(), gated(model, (3, 96, 64)) as run:
        model(x)
    bare = ungate(copy.deepcopy(model))
    assert run.dense_macs() == slimmable.profile(bare, (3, 96, 64), repeats=0).rows[0].macs


def test_norms_of_the_two_passes():
    model = gate(plain("resnet18"), example_inputs=images("resnet18")).train()
    own = [name for name, module in model.named_modules() if isinstance(module, PassNorm)]
    assert sorted(own) == sorted(f"layer{i}.{j}.bn{k}" for i in range(1, 5) for j in range(2) for k in (1, 2))
    dense, gated_norm = model.layer1[0].bn1.full, model.layer1[0].bn1.gated[0]
    before = dense.running_mean.clone()
    with gated(model):
        model(images("resnet18", 4))
    assert torch.equal(dense.running_mean, before)
    assert not torch.equal(gated_norm.running_mean, before)
    after = gated_norm.running_mean.clone()
    model(images("resnet18", 4))
    assert torch.equal(gated_norm.running_mean, after)
    assert not torch.equal(dense.running_mean, before)
    model.layer1[0].bn1.momentum = 0.5
    assert (dense.momentum, gated_norm.momentum) == (0.5, 0.5)


@pytest.mark.parametrize("universal", [False, True])
@torch.no_grad()
def test_a_slimmable_model_has_gates_for_each_width(universal):
    x = images("resnet18")
    slim = slimmable.slimify(plain("resnet18"), (1.0, 0.5), example_inputs=x, universal=universal)
    model = gate(slim, example_inputs=x)
    rows = {row.width: row for row in slimmable.profile(slim, example_inputs=x[:1], repeats=0).rows}
    for index, width in enumerate((1.0, 0.5)):
        with slimmable.at_width(model, width), slimmable.at_width(slim, width):
            assert torch.equal(model(x), slim(x))
            with gated(model) as run:
                model(x)
            assert {mask.shape[1] for mask in run.masks().values()} == {int(n * width) for n in (64, 128, 256, 512)}
            assert run.dense_macs() == rows[width].macs
            counts = set_masks(model, 0.4, index)
            with gated(model) as run:
                out = model(x)
            assert run.macs()[0] == gate_plan(model).plan.sub_network(counts).macs / 2
        if width == 1.0 and not universal:  # its norms are those of the full width
            with slimmable.at_width(slim, counts):
                assert difference(out, slim(x)) < 1e-12
    if universal:
        with slimmable.at_width(model, 0.7), slimmable.at_width(slim, 0.7):
            assert torch.equal(model(x), slim(x))
            with (
                pytest.raises(UsageError, match=r"not for the active 0\.7"),
                gated(model),
            ):
                model(x)
    small = slimmable.extract(model, 0.5)
    with slimmable.at_width(model, 0.5):
        assert torch.equal(small(x), model(x))
    assert small.state_dict().keys() == slimmable.extract(slim, 0.5).state_dict().keys()


@torch.no_grad()
def test_a_norm_alone_tells_that_a_width_has_no_gates():
    x = images("resnet18")
    slim = slimmable.slimify(plain("resnet18"), (1.0, 0.5), example_inputs=x, universal=True)
    slimmable.calibrate_bn(slim, [x], [0.7])
    model = gate(slim, example_inputs=x)
    for width in (0.7, 0.6):  # one with statistics of its own, and one without
        with slimmable.at_width(model, width):
            features = torch.zeros(2, round(64 * width), 8, 8, dtype=torch.float64)
            assert model.layer1[0].bn1(features).shape == features.shape
            with pytest.raises(UsageError, match=f"not for the active {width}"), gated(model):
                model.layer1[0].bn1(features)


@torch.no_grad()
def test_gates_know_registered_widths_and_the_active_one():
    x = images("resnet18")
    slim = slimmable.slimify(plain("resnet18"), (1.0, 0.5), example_inputs=x, universal=True)
    slimmable.calibrate_bn(slim, [x], [0.7])
    for width in (0.7, 0.5, 0.6):
        slimmable.set_width(slim, width)
        model = gate(slim, example_inputs=x)
        assert (slimmable.width_of(model), slimmable.widths_of(model)) == (width, (1.0, 0.7, 0.5))
        assert torch.equal(model(x), slim(x))
        with gated(model):
            if width == 0.5:
                assert not torch.equal(model(x), slim(x))
                continue
            with pytest.raises(UsageError, match=f"not for the active {width}"):
                model(x)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_gates_of_their_own(clone):
    x = images("resnet18")
    model = gate(plain("resnet18"), example_inputs=x)
    with gated(model) as run:
        model(x)
        twin = clone(model)  # while masks with a history are about
    with torch.no_grad():
        with gated(twin) as own:
            twin(x)
        assert not torch.equal(model(x), twin(x))  # the copy is in its gated pass, the model is not
        for name, mask in run.masks().items():
            assert torch.equal(mask, own.masks()[name])
        gates_of(twin)["layer1.0.conv1"].at[0].expand.weight.zero_()
        with gated(model) as again:
            model(x)
    assert torch.equal(again.masks()["layer1.0.conv1"], run.masks()["layer1.0.conv1"])


def test_state_dicts():
    x = images("resnet18")
    model, other = (gate(plain("resnet18"), example_inputs=x) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    other.load_state_dict(model.state_dict())
    with torch.no_grad(), gated(model), gated(other):
        assert torch.equal(model(x), other(x))
    source = plain("resnet18")
    nn.init.normal_(source.layer1[0].bn1.weight)
    missing, unexpected = other.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected
    assert all("channel_gate" in name for name in missing)
    assert torch.equal(other(x), source(x))
    assert torch.equal(other.layer1[0].bn1.gated[0].weight, source.layer1[0].bn1.weight)
    assert set(dict(source.named_parameters())) <= set(dict(other.named_parameters()))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(slimmable.errors.CheckpointError, match=r"layer1\.0\.conv1\.channel_gate"):  # of another network
        other.load_state_dict({**before, "layer1.0.conv1.channel_gate.at.0.expand.weight": torch.zeros(3, 16)})


def test_ungate_gives_the_model_back():
    model = plain("resnet18")
    names = [type(module) for module in model.modules()]
    state = model.state_dict()
    gated_model = gate(model, example_inputs=images("resnet18"), inplace=True)
    assert gated_model is model
    assert ungate(model) is model
    assert [type(module) for module in model.modules()] == names
    assert model.state_dict().keys() == state.keys()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_every_parameter_learns_and_the_budget_is_reached():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4, 4),
    )  # fmt: skip
    model = gate(net, example_inputs=torch.zeros(2, 3, 8, 8))
    criterion = slimmable.gating.GateBudget(0.4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(60):
        optimizer.zero_grad()
        with gated(model) as run:
            output = model(torch.randn(32, 3, 8, 8))
        loss = criterion(run, epoch=step) + 0.01 * (output - model(torch.randn(32, 3, 8, 8))).square().mean()
        loss.backward()
        if step == 0:
            assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert run.share().mean().item() == pytest.approx(0.4, abs=0.05)


def test_the_loss_of_a_budget_is_the_sum_of_its_two():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    model = gate(net, example_inputs=torch.zeros(2, 4))
    with gated(model) as run:
        model(torch.randn(16, 4))
    own, bounds = slimmable.gating.open_fractions(run.masks().values()), slimmable.gating.annealed(1, alpha=0.02)
    expected = slimmable.gating.budget_loss(run.share(), 0.2, 2.0) + slimmable.gating.bound_loss(own, 0.2, bounds, 3.0)
    criterion = slimmable.gating.GateBudget(0.2, budget_weight=2.0, bound_weight=3.0, alpha=0.02)
    assert slimmable.gating.bound_loss(own, 0.2, bounds, 3.0) > 0
    assert criterion(run, epoch=1) == expected
    assert criterion.reached == run.share().mean()


def test_mixed_precision_and_checkpointing():
    x = images("resnet18", 4).float()
    model = gate(plain("resnet18").float(), example_inputs=x[:2])
    with torch.autocast("cpu", torch.bfloat16), gated(model.train()) as run:
        out = model(x)
    assert {mask.dtype for mask in run.masks().values()} == {torch.float32}
    assert set(torch.cat([mask.flatten() for mask in run.masks().values()]).tolist()) == {0.0, 1.0}
    out.float().sum().backward()

    model = gate(plain("resnet18"), example_inputs=x[:2].double()).train()
    gradients = []
    for checkpointed in (False, True):
        twin = copy.deepcopy(model)
        twin.set_grad_checkpointing(checkpointed)
        torch.manual_seed(3)
        with gated(twin) as run:
            out = twin(x.double())
        (out.square().sum() + run.share().mean()).backward()  # runs blocks again, in the gated pass
        gradients.append([parameter.grad for parameter in twin.parameters() if parameter.grad is not None])
        assert all(len(mask) == 4 for mask in run.masks().values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-11)


def test_compiled():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    model = gate(net, example_inputs=torch.zeros(2, 4)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 4)
    for _ in range(2):
        assert torch.equal(compiled(x), model(x))
        with gated(model) as run:
            expected = model(x)
        with gated(compiled) as own:
            torch.testing.assert_close(compiled(x), expected)
        assert not torch.equal(expected, model(x))
        assert torch.equal(own.masks()["3"], run.masks()["3"])
        assert torch.equal(own.macs(), run.macs())


@settings(max_examples=25)
@given(st.lists(st.integers(2, 24), min_size=3, max_size=5), st.integers(1, 3), st.randoms(use_true_random=False))
def test_random_chains(sizes, groups, random):
    """In a chain of layers every group but the first and last can be gated; closed channels are as good as zero."""
    sizes = [size * groups for size in sizes]
    layers = [nn.Conv2d(3, sizes[0], 3, padding=1)]
    for before, after in pairwise(sizes):
        layers += [nn.ReLU(), nn.Conv2d(before, after, 3, padding=1, groups=random.choice([1, groups]))]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(sizes[-1], 3, 1)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    found = gate_plan(net, example_inputs=x)
    assert len(found.gates) + len(found.refused) == len(found.plan.channels.units)
    if not found.gates:
        return
    model = gate(net, example_inputs=x)
    with torch.no_grad(), gated(model) as run:
        out = model(x)
        y, masks = x, run.masks()
        for number, layer in enumerate(net):
            y = layer(y)
            if str(number) in masks:
                mask = masks[str(number)]
                y = y * mask.repeat(1, y.shape[1] // mask.shape[1])[:, :, None, None]
        expected = run.dense_macs()
    assert difference(out, y) < 1e-12
    assert expected == slimmable.profile(net, example_inputs=x[:1], repeats=0).rows[0].macs


# -- bad input
class Between(nn.Module):
    """Linear layers with a function between them, on whose units' independence a gate depends."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 16)
        self.function, self.third = function, nn.Linear(16, 3)

    def forward(self, x):
        return self.third(self.function(self.second(self.first(x).relu()).relu()))


def test_bad_calls():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.zeros(2, 4)
    with pytest.raises(UsageError, match=r"has no gates; make some with slimmable\.gating\.gate"):
        gated(net).__enter__()
    with pytest.raises(UsageError, match="has no gates"):
        dense(net).__enter__()
    for call in (gate, gate_plan):
        with pytest.raises(UsageError, match=rf"{call.__name__}.* needs a torch\.nn\.Module"):
            call("resnet18")
    with pytest.raises(ConversionError, match="can be gated\n  0 \\(8\\): its layer reads the model's input"):
        gate(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), example_inputs=x)
    with pytest.raises(UsageError, match="temperature"):
        gate(net, example_inputs=x, temperature=0.0, inplace=True)
    with pytest.raises(ConversionError, match="matches no module"):
        gate(net, example_inputs=x, skip="body", inplace=True)
    assert not any(module._forward_pre_hooks for module in net.modules())

    model = gate(net, example_inputs=x)
    with pytest.raises(UsageError, match="already has gates"):
        gate(model, example_inputs=x)
    with pytest.raises(ConversionError, match=r"has gates.*ungate"):
        slimmable.slimify(model, example_inputs=x)
    with gated(model) as run:
        pass
    with pytest.raises(UsageError, match="the gate of 2 has decided nothing"):
        run.macs()
    with pytest.raises(UsageError, match="its gate has not decided"), gated(model):
        model[4](torch.zeros(2, 32))
    with pytest.warns(UserWarning, match="never trained"), gated(model.eval()):
        model(x)
    slim = slimmable.slimify(nn.Sequential(net, nn.Linear(2, 2)), (1.0, 0.5), example_inputs=x)
    with pytest.raises(ConversionError, match="a part of this"):
        gate(slim[0], example_inputs=x)


def test_gates_that_were_trained_give_no_warning():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    model, x = gate(net, example_inputs=torch.zeros(2, 4)), torch.randn(8, 4)
    with gated(model.train()):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gated(model.eval()):
            model(x)


class Twice(Between):
    """Reads the units of its second layer by a layer that runs again on its own output."""

    def forward(self, x):
        return self.third(self.function(self.function(self.second(self.first(x).relu()).relu())))


def test_a_reader_that_runs_twice_is_named():
    found = gate_plan(Twice(nn.Linear(16, 16)), example_inputs=torch.zeros(2, 4))
    reasons = {each.maker: each.reason for each in found.refused}
    assert reasons["second"] == "function reads it and runs 2 times in one forward"


@pytest.mark.parametrize("target", [0, 1, -0.1, 1.5, float("nan"), "0.3", True])
def test_targets_outside_their_range(target):
    for call in (
        lambda: slimmable.gating.GateBudget(target),
        lambda: slimmable.gating.budget_loss(torch.ones(2), target),
        lambda: slimmable.gating.bound_loss(torch.ones(2), target, 0.5),
    ):
        with pytest.raises(UsageError, match=r"must be in \(0, 1\)"):
            call()
    with pytest.raises(UsageError, match=r"must be a number in \[0, 1\]"):
        slimmable.gating.bound_loss(torch.ones(2), 0.5, 1.1)
    with pytest.raises(slimmable.errors.DataError, match="one number per gate"):
        slimmable.gating.bound_loss(torch.ones(2, 2), 0.5, 0.5)
    with pytest.raises(slimmable.errors.DataError, match="no mask"):
        slimmable.gating.open_fractions([])


def test_the_pass_ends_with_the_block():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    model = gate(net, example_inputs=torch.zeros(2, 4))
    x = torch.randn(64, 4)
    with gated(model) as run:
        with dense(model):
            assert torch.equal(model(x), net(x))
        assert not torch.equal(model(x), net(x))
    assert isinstance(run, GatedPass)
    assert torch.equal(model(x), net(x))
    with pytest.raises(ZeroDivisionError), gated(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), net(x))


@pytest.mark.parametrize("norm", [nn.GroupNorm(3, 9), nn.InstanceNorm1d(9)])
def test_units_along_which_a_norm_takes_statistics_have_no_gate(norm):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 8), norm, nn.Linear(8, 4)

        def forward(self, x):
            return self.last(self.norm(self.first(x)).relu())

    found = gate_plan(Tokens(), example_inputs=torch.zeros(2, 9, 6))
    assert not found.gates
    assert [(maker, "norm in norm" in reason) for maker, _, reason in found.refused] == [("first", True)]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def along_the_units(x):
    return x * nn.functional.conv1d(x[:, None], torch.ones(1, 1, 3, dtype=x.dtype), padding=1)[:, 0].sigmoid()


def batch_statistics_of_each_row(x):
    return nn.functional.batch_norm(x[None], None, None, training=True)[0]


MEETINGS = {
    "native_layer_norm": nn.LayerNorm(16),
    "native_group_norm": nn.GroupNorm(2, 16),
    "_softmax": Function(lambda x: x.softmax(1)),
    "_log_softmax": Function(lambda x: x.log_softmax(-1)),
    "mean": Function(lambda x: x - x.mean(1, keepdim=True)),
    "amax": Function(lambda x: x / x.amax(1, keepdim=True)),
    "linalg_vector_norm": Function(lambda x: nn.functional.normalize(x, dim=1)),
    "convolution": Function(along_the_units),
    "native_batch_norm": Function(batch_statistics_of_each_row),
}


@pytest.mark.parametrize("operation", [None, "sum of each row's own", *MEETINGS])
def test_units_that_meet_get_no_gate(operation):
    function = MEETINGS.get(operation, nn.Tanh())
    if operation == "sum of each row's own":  # over the images, which are not units
        function = Function(lambda x: x - x.sum(0, keepdim=True))
    found = gate_plan(Between(function).double(), example_inputs=torch.zeros(2, 4, dtype=torch.float64))
    reasons = {each.maker: each.reason for each in found.refused}
    if operation in MEETINGS:
        assert re.fullmatch(rf"its units meet in {operation}\w* in function", reasons["second"])
    else:
        assert [gate.maker for gate in found.gates] == ["second"]


def test_the_dense_pass_has_no_parameters_of_gates():
    plain_model = plain("resnet18")
    expected = sum(each.numel() for each in plain_model.parameters())
    model = gate(slimmable.slimify(plain_model, (1.0, 0.5)))
    assert slimmable.profile(model, (3, 64, 64), repeats=0).rows[0].parameters == expected
    with gated(model):
        assert slimmable.profile(model, (3, 64, 64), repeats=0).rows[0].parameters > expected
