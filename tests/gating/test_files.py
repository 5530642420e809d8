"""Gated models come back from files, with both passes and their costs; what is no such file is refused."""

from __future__ import annotations

import copy
import json
from functools import cache
from itertools import pairwise

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import slimmable
from slimmable._atomic import write_tensors
from slimmable.errors import CheckpointError
from slimmable.gating import ChannelGate, LayerGates, PassNorm, gate_plan, ungate
from slimmable.gating._plan import decode, encode
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
    assert str(gate_plan(first)) == str(gate_plan(second))
    settings = [
        [(m.temperature, m.open_at_zero) for m in model.modules() if isinstance(m, ChannelGate)]
        for model in (first, second)
    ]
    assert settings[0] == settings[1]
    with torch.no_grad():
        for width in slimmable.widths_of(first):
            with slimmable.at_width(first, width), slimmable.at_width(second, width):
                assert torch.equal(first(x), second(x))
                if width not in gate_plan(first).plan.widths:
                    continue
                with slimmable.gating.gated(first) as run, slimmable.gating.gated(second) as own:
                    assert torch.equal(first(x), second(x))
                assert torch.equal(run.share(), own.share())
                assert run.masks().keys() == own.masks().keys()
                assert run.layer_macs().keys() == own.layer_macs().keys()


def said(path):
    """Return what a file says of its model."""
    with safe_open(path, framework="pt") as file:
        return json.loads(json.loads(file.metadata()["slimmable"])["model"])


NETWORKS = {"test_resnet": 64, "test_efficientnet": 64, "test_vit": 160, "test_mambaout": 64}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("widths", [None, (1.0, 0.5)])
def test_timm_models_come_back(name, widths, tmp_path):
    x = torch.randn(2, 3, NETWORKS[name], NETWORKS[name])
    net = timm.create_model(name, num_classes=5).eval()
    if widths:
        net = slimmable.slimify(net, widths, example_inputs=x)
    model = trained(slimmable.gating.gate(net, example_inputs=x[:1], temperature=0.4, open_at_zero=True, bias=False))
    slimmable.save(model, tmp_path / "model.safetensors")
    again = slimmable.load(tmp_path / "model.safetensors")
    same(again, model, x)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    small = [slimmable.gating.extract_gated(each, [x], keep=0.5, recalibrate=False) for each in (again, model)]
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
    model = slimmable.gating.gate(net, example_inputs=x, separate_norms=separate, skip=skip, temperature=temperature)
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
    model = trained(slimmable.gating.gate(Reader(), example_inputs=example).double())
    slimmable.save(model, tmp_path / "model")
    again = slimmable.load(tmp_path / "model", Reader())
    with torch.no_grad(), slimmable.gating.gated(model) as run, slimmable.gating.gated(again) as own:
        inputs = {"ids": torch.randint(9, (3, 5))}, {"mask": torch.zeros(3, 5), "scale": torch.ones(1).double()}
        assert torch.equal(model(inputs[0], options=inputs[1]), again(inputs[0], options=inputs[1]))
    assert torch.equal(run.share(), own.share())

    with_object = slimmable.Inputs({"ids": ids}, options={**options, "names": Box(name="a")})
    model = slimmable.gating.gate(Reader(), example_inputs=with_object)
    with pytest.raises(CheckpointError, match="an object of class 'Box', which no file can hold"):
        slimmable.save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def small_model(sizes=(8, 16, 16, 12), widths=None, **arguments):
    torch.manual_seed(0)
    net, x = chain(sizes), torch.randn(2, 3, 6, 6)
    if widths:
        net = slimmable.slimify(net, widths, example_inputs=x)
    return slimmable.gating.gate(net, example_inputs=x, **arguments)


def test_what_cannot_come_back_is_not_saved(tmp_path):
    model = small_model()
    for part in (model[:6], nn.Sequential(model)):
        with pytest.raises(CheckpointError, match=r"it is not the model that slimmable\.gating\.gate returned"):
            slimmable.save(part, tmp_path / "model")
    model[3].channel_gate.at[0].__class__ = type("Own", (slimmable.gating.ChannelGate,), {})
    with pytest.raises(CheckpointError, match="the gate of 3 is a Own"):
        slimmable.save(model, tmp_path / "model")
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
        with pytest.raises(CheckpointError, match="was changed after it was gated; remove the gates"):
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
    write_tensors(tmp_path / "file", tensors, {"format": "slimmable 2", "model": json.dumps(data)})
    try:
        model = slimmable.load(tmp_path / "file", chain((8, 16, 16, 12)))
    except CheckpointError:
        return
    expected = small_model(widths=(1.0, 0.5))
    assert [type(module) for module in model.modules()] == [type(module) for module in expected.modules()]
    x = torch.randn(2, 3, 6, 6)
    with slimmable.gating.gated(model):
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
        {"example": ["tuple", ["tuple", ["tensor", "float32", [2, 3, 6, 6], None]], ["tuple"]]},
        {"example": ["tuple", ["tuple"], ["dict", [["plain", 2], ["plain", 1]]]]},
        {"example": ["list", ["plain", 1]]},
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
        write_tensors(tmp_path / "file", tensors, {"format": "slimmable 2", "model": json.dumps(changed)})
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            slimmable.load(tmp_path / "file", plain)


def test_an_example_comes_back_from_its_data():
    like = torch.zeros(1, dtype=torch.float64)
    args, kwargs = (torch.zeros(2, 3), [1, None, (True, 0.5)]), {"mask": torch.tensor([4, 5]), "name": "a"}
    data = json.loads(json.dumps(encode((args, kwargs))))
    (images, rest), named = decode(data, like)
    assert (images.shape, images.dtype, rest) == ((2, 3), torch.float64, args[1])
    assert (named["mask"].tolist(), named["mask"].dtype, named["name"]) == ([4, 5], torch.int64, "a")
