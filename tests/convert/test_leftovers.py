"""Nothing of a trace survives it, and nothing from before reaches it."""

import importlib.util
from pathlib import Path

import pytest
import torch

import slimmable
from slimmable.errors import TraceError

WIDTHS = (1.0, 0.5)
FILE = Path(__file__).with_name("kept_tables.py")


def load():
    spec = importlib.util.spec_from_file_location("kept_tables", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KEPT = load()


@pytest.fixture
def kept():
    torch.manual_seed(0)
    return load()


X = torch.randn(2, 6, 4)


@pytest.mark.parametrize("way", KEPT.WAYS)
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
