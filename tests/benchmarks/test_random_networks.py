"""The search for wrongly converted networks goes on where it stopped, and makes what it finds small."""

import json

import pytest

pytest.importorskip("einops")

from benchmarks.random_networks import run
from tests.convert.random_networks import Layout, Network, Output, Step, drawn, smaller


def data(seed: int = 3) -> dict:
    return {
        "seed": seed, "networks": 0, "steps": 0, "hidden": 0, "thinner": 0, "vacuous": 0, "seconds": 0,
        "counterexamples": [], "operations": {},
    }  # fmt: skip


def test_a_run_goes_on_by_number():
    found, saved = data(), []
    for last in (1, 2):
        run.search(found, lambda last=last: found["networks"] >= last, lambda: saved.append(json.dumps(found)))
    assert found["networks"] == 2
    assert len(saved) == 2
    layouts = [Network(drawn(3, number)[0]).layout for number in range(2)]
    assert found["steps"] == sum(len(layout.steps) for layout in layouts)
    assert drawn(3, 1) == drawn(3, 1) != drawn(3, 0)


def test_a_counter_example_is_made_small(monkeypatch):
    def check(layout, conversion):
        assert not {"softmax", "linear"} <= Network(layout).operations, "wrong"

    monkeypatch.setattr(run, "check", check)
    names = ("mlp", "linear", "relu", "layer norm", "softmax", "mixer")
    layout = Layout(
        ("tokens", "image"), tuple(Step(name, 0, 8, 0) for name in names), (Output("scores", 0, 1),), "dict"
    )
    _, conversion = drawn(0, 0)
    kind = run.failure_of(layout, conversion)
    small, _ = run.smallest(layout, conversion, kind)
    assert "wrong" in kind
    assert [step.operation for step in small.steps] == ["linear", "softmax"]
    assert (len(small.inputs), small.outputs, small.container) == (1, (), "one")
    assert eval(repr(small)) == small
    assert not list(smaller(layout, conversion, lambda layout, conversion: False))
