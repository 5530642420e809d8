"""Gated models come back from files; state dicts of other gates are refused before anything has changed."""

from __future__ import annotations

import copy
import json
import pickle
from functools import cache
from itertools import pairwise

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import slimmable
from slimmable import CheckpointError
from slimmable.gating import ChannelGate, gate_activity, ungate
from slimmable.layers._gated import PLAN, LayerGates, PassNorm
from tests.convert.oracles import randomise
from tests.convert.test_save_load import JUNK, leaves

pytestmark = pytest.mark.filterwarnings("ignore:the gates of this .* were never trained")
RELAXED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def chain(sizes, norm=True):
    """A network without a recipe, of convolutions with a BatchNorm or without."""
    layers = [nn.Conv2d(3, sizes[0], 3, padding=1)]
    for before, after in pairwise(sizes):
        layers += [nn.BatchNorm2d(before), nn.ReLU()] if norm else [nn.ReLU()]
        layers += [nn.Conv2d(before, after, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(sizes[-1] * 36, 3))


def trained(model):
    """Give everything that a training changes other numbers."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ChannelGate):
                module.threshold.fill_(torch.randn(()))
                module.norm.num_batches_tracked.fill_(7)
            elif isinstance(module, PassNorm):
                randomise(module.gated, seed=5)
    return randomise(model).eval()


def same(first, second, x):
    """Assert that two gated models are the same in both passes, at all widths."""
    assert slimmable.widths_of(first) == slimmable.widths_of(second)
    assert [type(module).__name__ for module in first.modules()] == [type(m).__name__ for m in second.modules()]
    assert str(first.__dict__[PLAN]) == str(second.__dict__[PLAN])
    settings = [
        [(m.temperature, m.open_at_zero) for m in model.modules() if isinstance(m, ChannelGate)]
        for model in (first, second)
    ]
    assert settings[0] == settings[1]
    with torch.no_grad():
        for width in slimmable.widths_of(first):
            with slimmable.at_width(first, width), slimmable.at_width(second, width):
                assert torch.equal(first(x), second(x))
                if width not in first.__dict__[PLAN].plan.widths:
                    continue
                with slimmable.gated(first) as run, slimmable.gated(second) as own:
                    assert torch.equal(first(x), second(x))
                assert torch.equal(run.share(), own.share())
                assert run.masks().keys() == own.masks().keys()
                assert run.layer_macs().keys() == own.layer_macs().keys()


def said(path):
    """Return what a file says of its model."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["model"])


NETWORKS = {"test_resnet": 64, "test_efficientnet": 64, "test_vit": 160, "test_mambaout": 64}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("widths", [None, (1.0, 0.5)])
def test_timm_models_come_back(name, widths, tmp_path):
    x = torch.randn(2, 3, NETWORKS[name], NETWORKS[name])
    net = timm.create_model(name, num_classes=5).eval()
    if widths:
        net = slimmable.slimify(net, widths, example_inputs=x)
    model = trained(slimmable.gate(net, example_inputs=x[:1], temperature=0.4, open_at_zero=True))
    slimmable.save(model, tmp_path / "model.safetensors")
    again = slimmable.load(tmp_path / "model.safetensors")
    same(again, model, x)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    small = [slimmable.extract_gated(each, [x], keep=0.5, recalibrate=False) for each in (again, model)]
    assert torch.equal(small[0](x), small[1](x))
    slimmable.save(again, tmp_path / "again.safetensors")
    assert said(tmp_path / "again.safetensors") == said(tmp_path / "model.safetensors")


@settings(max_examples=15, **RELAXED)
@given(
    sizes=st.lists(st.integers(12, 30), min_size=3, max_size=5),
    widths=st.sampled_from([None, (1.0, 0.5), (1.0, 0.75, 0.25)]),
    separate=st.booleans(),
    norm=st.booleans(),
    skipped=st.booleans(),
    universal=st.booleans(),
    temperature=st.floats(0.1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_random_chains_come_back(sizes, widths, separate, norm, skipped, universal, temperature, dtype, tmp_path):
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    plain = chain(sizes, norm)
    net = copy.deepcopy(plain).to(dtype)
    if widths:
        net = slimmable.slimify(net, widths, example_inputs=x, universal=universal)
        if universal:
            slimmable.calibrate_bn(net, [x], [0.8])
    second = str(3 if norm else 2)
    skip = (lambda name, module: name == second) if skipped and len(sizes) > 3 else ()
    model = slimmable.gate(net, example_inputs=x, separate_norms=separate, skip=skip, temperature=temperature)
    assert (second in {part.name for part in model.modules() if isinstance(part, LayerGates)}) == (skip == ())
    slimmable.save(trained(model), tmp_path / "model")
    with pytest.raises(CheckpointError, match="model="):
        slimmable.load(tmp_path / "model")
    again = slimmable.load(tmp_path / "model", plain)
    same(again, model, x)
    assert any(isinstance(module, PassNorm) for module in again.modules()) == (separate and norm)
    assert not any(isinstance(module, LayerGates) for module in plain.modules())


class Reader(nn.Module):
    """Token numbers, and a mask that the forward branches on, which a run on shapes alone could not."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(9, 8), nn.Linear(8, 32), nn.Linear(32, 2)

    def forward(self, tokens, *, options):
        y = self.embed(tokens["ids"])
        if options["mask"].all():
            return self.second(y.mean(1))
        return self.second(self.first(y * options["mask"][..., None] * options["scale"]).relu()).mean(1)


class Box:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def test_examples_of_any_kind(tmp_path):
    ids, options = torch.randint(9, (2, 5)), {"mask": torch.rand(2, 5) < 0.5, "scale": torch.ones(1), "names": ("a", 1)}
    options["mask"][0, 0] = False
    example = slimmable.Inputs({"ids": ids}, options=options)
    model = trained(slimmable.gate(Reader(), example_inputs=example).double())
    slimmable.save(model, tmp_path / "model")
    again = slimmable.load(tmp_path / "model", Reader())
    with torch.no_grad(), slimmable.gated(model) as run, slimmable.gated(again) as own:
        inputs = {"ids": torch.randint(9, (3, 5))}, {"mask": torch.zeros(3, 5), "scale": torch.ones(1).double()}
        assert torch.equal(model(inputs[0], options=inputs[1]), again(inputs[0], options=inputs[1]))
    assert torch.equal(run.share(), own.share())

    with_object = slimmable.Inputs({"ids": ids}, options={**options, "names": Box(name="a")})
    model = slimmable.gate(Reader(), example_inputs=with_object)
    with pytest.raises(CheckpointError, match="an object of class 'Box', which no file can hold"):
        slimmable.save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def small_model(sizes=(8, 16, 16, 12), widths=None, **arguments):
    torch.manual_seed(0)
    net, x = chain(sizes), torch.randn(2, 3, 6, 6)
    if widths:
        net = slimmable.slimify(net, widths, example_inputs=x)
    return slimmable.gate(net, example_inputs=x, **arguments)


def test_what_cannot_come_back_is_not_saved(tmp_path):
    model = small_model()
    for part in (model[:6], nn.Sequential(model)):
        with pytest.raises(CheckpointError, match=r"is not what slimmable\.gate returned"):
            slimmable.save(part, tmp_path / "model")
    model[3].channel_gate.at[0] = nn.Sequential(model[3].channel_gate.at[0])
    with pytest.raises(CheckpointError, match="the gate of 3 is a Sequential"):
        slimmable.save(model, tmp_path / "model")
    for change in (
        lambda model: delattr(model[3], "channel_gate"),
        lambda model: model.append(nn.Linear(4, 4)),
        lambda model: model.append(nn.Unflatten(1, (3, 1))).append(nn.Conv1d(3, 24, 1)).append(nn.Conv1d(24, 3, 1)),
    ):
        model = small_model()
        change(model)
        with pytest.raises(CheckpointError, match="was changed after it was gated; take the gates off"):
            slimmable.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    slimmable.save(ungate(model), tmp_path / "model")


def test_a_file_loads_into_the_plain_network_only(tmp_path):
    slimmable.save(small_model(), tmp_path / "model")
    for other in (small_model(), chain((8, 16, 12)), chain((8, 16, 14, 12)), chain((8, 16, 16, 12), norm=False)):
        with pytest.raises(CheckpointError):
            slimmable.load(tmp_path / "model", other)


# -- files that are something else
@cache
def contents():
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        slimmable.save(trained(small_model(widths=(1.0, 0.5))), f"{folder}/file")
        return load_file(f"{folder}/file"), said(f"{folder}/file")


@settings(max_examples=60, **RELAXED)
@given(draw=st.data(), junk=st.sampled_from([*JUNK, float("nan"), -0.5, [10**6] * 4]))
def test_gates_with_anything_in_the_place_of_anything_load_as_they_are_or_are_refused(draw, junk, tmp_path):
    tensors, data = contents()
    data = json.loads(json.dumps(data))
    path = draw.draw(st.sampled_from([("gating",), *(("gating", *below) for below in leaves(data["gating"]))]))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = junk
    save_file(tensors, tmp_path / "file", {"format": "slimmable 1", "model": json.dumps(data)})
    try:
        model = slimmable.load(tmp_path / "file", chain((8, 16, 16, 12)))
    except CheckpointError:
        return
    expected = small_model(widths=(1.0, 0.5))
    assert [type(module) for module in model.modules()] == [type(module) for module in expected.modules()]
    x = torch.randn(2, 3, 6, 6)
    with slimmable.gated(model):
        assert model(x).shape == (2, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"skipped": ["3"]},
        {"separate_norms": False},
        {"settings": [[0.0, False]] * 4},
        {"settings": [[0.5, False]] * 3},
        {"example": ["tuple", ["tuple"], ["dict"]]},
        {"example": ["tuple", ["tuple", ["tensor", "float32", [2, 4, 6, 6], None]], ["dict"]]},
        {"example": ["tuple", ["tuple", ["tensor", "load", [2, 3, 6, 6], None]], ["dict"]]},
        {"example": ["tuple", ["tuple", ["tensor", "float32", [10**12] * 4, None]], ["dict"]]},
    ],
)
def test_hostile_gates(change, tmp_path):
    tensors, data = contents()
    plain = chain((8, 16, 16, 12))
    for gating in ({**data["gating"], **change}, None):
        changed = {key: value for key, value in data.items() if key != "gating"}
        changed |= {} if gating is None else {"gating": gating}
        save_file(tensors, tmp_path / "file", {"format": "slimmable 1", "model": json.dumps(changed)})
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            slimmable.load(tmp_path / "file", plain)


# -- state dicts
def changed_state(model):
    """Return a state dict of which every tensor differs from the model's."""
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


OTHERS = {
    "skip": (lambda: small_model(skip="3"), "missing: 3.channel_gate.at.0"),
    "more": (lambda: small_model((8, 16, 16, 16, 12)), "not in the model: 10.gated.0, 12.channel_gate.at.0"),
    "sizes": (
        lambda: small_model((8, 16, 20, 12)),
        r"of other sizes: 6.channel_gate.at.0.expand.weight \(20, 4\), in the model \(16, 4\)",
    ),
    "widths": (
        lambda: small_model(widths=(1.0, 0.5)),
        "not in the model: 3.channel_gate.at.1, 4.gated.1, 6.channel_gate.at.1, 7.gated.1 and 1 more",
    ),
    "norms": (lambda: small_model(separate_norms=False), None),
}
WRAPPERS = {
    "": (lambda model: model, ""),
    "DataParallel": (nn.DataParallel, "module."),
    "compile": (lambda model: torch.compile(model, backend="eager"), "_orig_mod."),
    "Sequential": (nn.Sequential, "0."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("other", OTHERS)
def test_other_gates_are_refused_before_anything_changes(other, wrapper):
    make, message = OTHERS[other]
    wrap, prefix = WRAPPERS[wrapper]
    model = small_model()
    wrapped = wrap(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {prefix + name: tensor for name, tensor in changed_state(make()).items()}
    if message is None:  # one set of norms fills both passes'
        wrapped.load_state_dict(given)
        assert torch.equal(model[4].gated[0].bias, before["4.bias"] + 1)
        return
    with pytest.raises(CheckpointError, match="other gates than this Sequential has; none was loaded") as caught:
        wrapped.load_state_dict(given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    caught.match(message if not prefix else "channel_gate")
    assert "gate the model as that of the checkpoint was" in str(caught.value)
    rest = {name: tensor for name, tensor in given.items() if "channel_gate" not in name and ".gated." not in name}
    if other == "skip":  # what the message says to do
        missing, unexpected = wrapped.load_state_dict(rest, strict=False)
        assert not unexpected
        assert all("channel_gate" in name for name in missing)
        assert torch.equal(model[4].gated[0].bias, before["4.bias"] + 1)


def test_separate_norms_do_not_go_into_shared_ones():
    model = small_model(separate_norms=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"not in the model: 4\.gated\.0, 7\.gated\.0"):
        model.load_state_dict(changed_state(small_model()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("widths", [None, (1.0, 0.5)])
def test_dense_checkpoints_load_and_the_gates_stay(wrapper, widths):
    wrap, prefix = WRAPPERS[wrapper]
    model = small_model(widths=widths)
    gates = {name: tensor.clone() for name, tensor in model.state_dict().items() if "channel_gate" in name}
    dense = changed_state(chain((8, 16, 16, 12)))
    given = {prefix + name: tensor for name, tensor in dense.items()}
    missing, unexpected = wrap(model).load_state_dict(given, strict=False)
    assert not unexpected
    absent = gates.keys() - {name.removeprefix(prefix) for name in missing}
    assert all("num_batches" in name for name in absent)  # which torch does not report
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in (gates | dense).items())
    for index in range(len(widths or (1,))):
        kept = len(after[f"4.gated.{index}.weight"])
        assert torch.equal(after[f"4.gated.{index}.weight"], dense["4.weight"][:kept])
    with pytest.raises(RuntimeError, match=r"Missing key.*channel_gate"):
        wrap(model).load_state_dict(given)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_refuse_for_themselves(clone):
    model = small_model()
    twin = clone(model)
    del model
    for _ in range(2):
        with pytest.raises(CheckpointError, match="other gates"):
            twin.load_state_dict(changed_state(small_model(skip="3")))
        twin = clone(twin)
    other = changed_state(small_model())
    twin.load_state_dict(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in twin.state_dict().items())


def test_networks_without_gates_do_not_check():
    x = torch.randn(2, 3, 6, 6)
    slim = small_model(widths=(1.0, 0.5))
    without = [
        slimmable.extract(slim, 0.5),
        slimmable.extract(small_model(), 1.0),
        slimmable.extract_gated(small_model(), [x], keep=0.5),
        ungate(small_model()),
        ungate(copy.deepcopy(slim)),
    ]
    for network in without:
        assert not network._load_state_dict_pre_hooks
        missing, unexpected = network.load_state_dict(
            network.state_dict() | {"9.channel_gate.at.0.x": torch.zeros(1)}, strict=False
        )
        assert (missing, unexpected) == ([], ["9.channel_gate.at.0.x"])
    assert slim._load_state_dict_pre_hooks
    assert gate_activity(slim.eval(), [x]).keys() == {"3", "6", "9"}
