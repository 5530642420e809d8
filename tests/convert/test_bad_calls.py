"""Calls that cannot mean anything: an error of the library that says what was given, and nothing is changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import slimmable
from slimmable import _convert
from slimmable.errors import CheckpointError, ConversionError, DataError, UsageError, WidthError
from slimmable.view.view import install_view

X = torch.zeros(2, 4)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def converted(**options) -> nn.Module:
    torch.manual_seed(0)
    return slimmable.slimify(network(), (1.0, 0.5), example_inputs=X, **options)


@pytest.mark.parametrize("given", [None, "resnet18", nn.Linear, X, {}])
@pytest.mark.parametrize(
    "call",
    [
        lambda model: slimmable.slimify(model, example_inputs=X),
        lambda model: slimmable.plan(model, example_inputs=X),
        lambda model: slimmable.set_width(model, 0.5),
        lambda model: slimmable.extract(model, 0.5),
        lambda model: slimmable.widths_of(model),
        lambda model: slimmable.profile(model, (4,)),
        lambda model: slimmable.calibrate_bn(model, [X]),
        lambda model: slimmable.search(model, lambda net: 0.0, 0.5),
        lambda model: slimmable.save(model, "none.safetensors"),
    ],
)
def test_what_is_no_module(call, given):
    with pytest.raises(UsageError, match=r"torch\.nn\.Module"):
        call(given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_modules_that_nothing_can_be_read_off():
    with pytest.raises(UsageError, match=r"0\.weight has no size yet; run the model once"):
        slimmable.slimify(nn.Sequential(nn.LazyLinear(4)), example_inputs=X)
    with pytest.raises(UsageError, match="from before scripting"):
        slimmable.slimify(torch.jit.trace(network().eval(), X), example_inputs=X)


def test_a_model_of_which_nothing_gets_thinner():
    with pytest.warns(UserWarning, match="nothing in this Linear gets narrower"):
        slim = slimmable.slimify(nn.Linear(4, 2), (1.0, 0.5), example_inputs=X)
    with slimmable.at_width(slim, 0.5):
        assert slim(X).shape == (2, 2)


@pytest.mark.parametrize("importance", [None, "magnitude"])
@pytest.mark.parametrize("was_converted", [False, True])
def test_a_conversion_in_place_that_fails_half_way_leaves_the_model_as_it_was(was_converted, importance, monkeypatch):
    torch.manual_seed(0)
    model = converted() if was_converted else network()
    model.eval()
    x = torch.randn(2, 4)
    names, classes, output = list(model.state_dict()), [type(m) for m in model.modules()], model(x)

    def fail(module, *args):
        if module is model[3] and args[0] == (1.0, 0.25):
            raise MemoryError
        return install_view(module, *args)

    monkeypatch.setattr(_convert, "install_view", fail)
    with pytest.raises(MemoryError):
        slimmable.slimify(model, (1.0, 0.25), example_inputs=X, importance=importance, inplace=True)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (names, classes)
    assert torch.equal(model(x), output)
    if was_converted:
        with slimmable.at_width(model, 0.5):
            assert model(x).shape == (2, 2)


@pytest.mark.parametrize("skip", [None, [5], 5, nn.Linear, lambda name: True])
def test_skips(skip):
    with pytest.raises(ConversionError, match="skip is"):
        slimmable.slimify(network(), (1.0, 0.5), example_inputs=X, skip=skip)


@pytest.mark.parametrize("setting", [{0: 0.5}, torch.tensor([8]), "half", None, True, {"0": True}, 0.3, (0,), (1, 2)])
@pytest.mark.parametrize("universal", [False, True])
def test_settings(setting, universal):
    model = converted(universal=universal)
    with pytest.raises(WidthError):
        slimmable.set_width(model, setting)
    assert slimmable.width_of(model) == 1.0


def test_numbers_of_any_kind_are_widths():
    model = converted(universal=True)
    for width in (np.float32(0.75), np.float64(0.75), 0.75, {"0": np.float32(0.75)}):
        with slimmable.at_width(model, width):
            assert model[0].weight.shape == (6, 4)


@pytest.mark.parametrize(
    ("loader", "widths", "error"),
    [
        ([X], 0.5, UsageError),
        (None, None, UsageError),
        ([X * torch.nan], [0.75], DataError),
        ([X[:0]], [0.75], DataError),
    ],
)
def test_calibrations(loader, widths, error):
    model = converted(universal=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match="calibrate_bn"):
        slimmable.calibrate_bn(model, loader, widths)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("evaluate", "options"),
    [
        (lambda net: 0.0, {"budget": "0.5"}),
        (lambda net: 0.0, {"budget": None}),
        (lambda net: 0.0, {"budget": 0.5, "step": None}),
        (lambda net: 0.0, {"budget": 0.5, "calibrate": iter([X])}),
        (lambda net: None, {"budget": 0.5}),
        (lambda net: float("nan"), {"budget": 0.5}),
    ],
)
def test_searches(evaluate, options):
    model = converted()
    with pytest.raises(UsageError, match="search"):
        slimmable.search(model, evaluate, **options)
    assert slimmable.width_of(model) == 1.0


@pytest.mark.parametrize("options", [{"input_size": "abc"}, {"input_size": 8}, {"input_size": (-1,)}, {"repeats": -1}])
def test_profiles(options):
    with pytest.raises(UsageError, match="profile"):
        slimmable.profile(converted(), **({"example_inputs": X} if "repeats" in options else {}) | options)


def test_recipes():
    for options in ({"loss_weights": 5}, {"distill": "kl"}):
        with pytest.raises(UsageError, match="SlimRecipe"):
            slimmable.SlimRecipe(converted(), **options)


def test_files(tmp_path):
    path, model = tmp_path / "model.safetensors", converted()
    with pytest.raises(CheckpointError, match="as a dict; got 5"):
        slimmable.save(model, path, arguments=5)
    with pytest.raises(CheckpointError, match="save the converted model itself"):
        slimmable.save(model[0], path)
    slimmable.save(model, path)
    with pytest.raises(UsageError, match="got 5"):
        slimmable.load(path, 5)
    with pytest.raises(CheckpointError, match="the plain network, not a converted one"):
        slimmable.load(path, model)


def test_torch_logs_nothing_of_an_error_that_is_raised(capfd):
    with pytest.raises(ConversionError, match="cannot be traced"):
        slimmable.slimify(network(), example_inputs=torch.zeros(2, 5))
    assert capfd.readouterr().err == ""
