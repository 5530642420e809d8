"""Rules of one's own operations: what the verbs say holds, and what they do not say stays at full width."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import slimmable
from slimmable.analysis import trace
from slimmable.errors import ConversionError, RuleError, UsageError
from tests.convert import oracles

WIDTHS = (1.0, 0.5)


@torch.library.custom_op("slimmable_tests::gain", mutates_args=())
def gain(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    return x * scale if shift is None else x * scale + shift


@torch.library.custom_op("slimmable_tests::gain_into", mutates_args=("out",))
def gain_into(x: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_(x * scale)


@torch.library.custom_op("slimmable_tests::dense", mutates_args=())
def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight + bias


@torch.library.custom_op("slimmable_tests::heads", mutates_args=())
def heads(x: Tensor, number: int) -> Tensor:
    return x.reshape(len(x), number, -1).sum(2)


@torch.library.custom_op("slimmable_tests::joined", mutates_args=())
def joined(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return parts[0] + parts[1], parts[0] * parts[1]


gain.register_fake(lambda x, scale, shift=None: torch.empty_like(x))
dense.register_fake(lambda x, weight, bias: x.new_empty(len(x), weight.shape[1]))
heads.register_fake(lambda x, number: x.new_empty(len(x), number))
joined.register_fake(lambda parts: (torch.empty_like(parts[0]), torch.empty_like(parts[0])))


@pytest.fixture(autouse=True)
def _rules_of_a_test(monkeypatch):
    monkeypatch.setattr("slimmable.rules.RULES", rules := dict(trace.RULES))
    monkeypatch.setattr(trace, "RULES", rules)


class Net(nn.Module):
    def __init__(self, run, **layers: nn.Module | nn.Parameter):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self, self.first(x).relu()))


X = torch.randn(5, 4, dtype=torch.float64)


def holds(model: nn.Module) -> slimmable.analysis.plan.Plan:
    slim = slimmable.slimify(model, WIDTHS, example_inputs=X)
    plan = slimmable.plan(slim, WIDTHS)
    oracles.full_width_is_the_original(model, slim, X)
    oracles.every_width_is_its_extraction(slim, X, limit=1e-12)
    oracles.permuting_units_changes_nothing(model, plan, X, limit=1e-10)
    return plan


def pins_of(model: nn.Module) -> list[str]:
    return [str(pin) for pin in slimmable.plan(model, WIDTHS, example_inputs=X).pins]


def scaled(shifted: bool = True) -> Net:
    def run(m, y):
        return gain(y, m.scale, m.shift) if shifted else gain(y, scale=m.scale)

    return Net(run, scale=nn.Parameter(torch.randn(16)), shift=nn.Parameter(torch.randn(16)))


def scales(op):
    op.keeps("x")
    op.same("x", -1, "scale", 0)
    op.same("x", -1, "shift", 0)


@pytest.mark.parametrize(
    "op", ["slimmable_tests::gain", gain, torch.ops.slimmable_tests.gain, torch.ops.slimmable_tests.gain.default]
)
@pytest.mark.parametrize("shifted", [False, True])
def test_units_of_an_operation_with_a_rule_get_thinner(op, shifted):
    assert any("gain in the model itself: has no rule" in pin for pin in pins_of(scaled(shifted)))
    assert slimmable.register_rule(op)(scales) is scales
    plan = holds(scaled(shifted))
    assert plan.tensors["", "scale"][-1] == [8]
    assert plan.tensors["first", "weight"][-1] == [8, None]


@pytest.mark.filterwarnings("ignore:nothing in this Net gets narrower")
def test_a_rule_that_leaves_out_an_axis_counts_as_none_and_the_plan_says_so():
    slimmable.register_rule(gain, lambda op: op.keeps("x"))
    plan = holds(scaled())
    reasons = {pin.axis: pin.reason for pin in plan.pins if pin.size == 16}
    assert {("first", "weight", 0), ("", "scale", 0), ("", "shift", 0)} <= reasons.keys()
    assert set(reasons.values()) == {
        "slimmable_tests::gain in the model itself: its rule says nothing about axis 0 of 'scale'"
    }


def test_a_rule_may_make_and_contract():
    def rule(op):
        op.moves("x", 0, to=0)
        op.contracts("x", 1, "weight", 0)
        op.makes("weight", 1, to=1)
        op.same("weight", 1, "bias", 0)

    slimmable.register_rule("slimmable_tests::dense", rule)
    layer = {"weight": nn.Parameter(torch.randn(16, 16)), "bias": nn.Parameter(torch.randn(16))}
    model = Net(lambda m, y: dense(y, m.weight, m.bias).relu(), **layer)
    plan = holds(model)
    assert plan.tensors["", "weight"][-1] == [8, 8]
    twin = Net(lambda m, y: torch.addmm(m.bias, y, m.weight).relu(), **layer)
    assert [c.macs for c in plan.columns] == [c.macs for c in slimmable.plan(twin, WIDTHS, example_inputs=X).columns]
    last = nn.Sequential(Net(lambda m, y: y), nn.ReLU())
    last[0].last = nn.Identity()
    scores = Net(lambda m, y: y, **layer)
    scores.forward = lambda x: dense(scores.first(x), scores.weight, scores.bias)
    assert slimmable.plan(scores, WIDTHS, example_inputs=X).output_shapes[-1] == [(5, 16)]  # scores keep their size


def test_an_integer_argument_may_count_units():
    def rule(op):
        op.moves("x", 0, to=0)
        op.pins("x", 1, "is folded into heads")

    slimmable.register_rule("slimmable_tests::heads", rule)
    model = Net(lambda m, y: heads(y, 16))
    assert any("heads in the model itself: is folded into heads" in pin for pin in pins_of(model))

    def follows(op):
        op.keeps("x")
        op.sizes("number", "x", 1)

    slimmable.register_rule("slimmable_tests::heads", follows, replace=True)
    assert any("the size 16 is a constant" in pin for pin in pins_of(model))
    assert holds(Net(lambda m, y: heads(y, y.shape[1]))).channels.units == (16,)


def test_lists_of_tensors_and_several_outputs():
    def rule(op):
        for output in (0, 1):
            op.keeps("parts[0]", output=output)
            op.keeps("parts[1]", output=output)

    slimmable.register_rule("slimmable_tests::joined", rule)
    plan = holds(Net(lambda m, y: torch.mul(*joined([y, m.other(y)])), other=nn.Linear(16, 16)))
    assert plan.channels.units == (16,)


@pytest.mark.parametrize("ruled", [False, True])
def test_an_operation_that_writes_into_its_argument(ruled):
    def run(m, y):
        out = torch.zeros_like(y)
        gain_into(y, m.scale, out)
        return out

    if ruled:

        def rule(op):
            op.keeps("x")
            op.keeps("out")
            op.same("x", 1, "scale", 0)

        slimmable.register_rule("slimmable_tests::gain_into", rule)
    model = Net(run, scale=nn.Parameter(torch.randn(16)))
    assert holds(model).channels.units == ((16,) if ruled else ())
    assert ruled or any("gain_into in the model itself: has no rule" in pin for pin in pins_of(model))


def test_an_operation_has_one_rule_unless_it_is_replaced():
    slimmable.register_rule("slimmable_tests::gain", scales)
    with pytest.raises(UsageError, match="slimmable_tests::gain has a rule already; pass replace=True"):
        slimmable.register_rule("slimmable_tests::gain", scales)
    slimmable.register_rule("slimmable_tests::gain", scales, replace=True)
    with pytest.raises(UsageError, match="aten::grid_sampler_2d has a rule already"):
        slimmable.register_rule(torch.ops.aten.grid_sampler_2d.default, scales)


@pytest.mark.parametrize(
    ("op", "rule", "message"),
    [
        ("gain", scales, "'gain' is no operation; pass a name such as"),
        (torch.relu, scales, "is no operation"),
        (None, scales, "None is no operation"),
        ("aten::gain", scales, "torch has no operation aten::gain"),
        ("slimmable_tests::gain", "x", "must be a function of one Operation"),
    ],
)
def test_what_cannot_be_registered(op, rule, message):
    with pytest.raises(UsageError, match=message):
        slimmable.register_rule(op, rule)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda op: op.keeps("y"), "KeyError.*slimmable_tests::gain has no argument 'y'; it has x, scale, shift"),
        (lambda op: op.pins("x", 2, "why"), r"IndexError: 'x', of shape \(5, 16\), has no axis 2"),
        (lambda op: op.moves("x", 1, to=2), r"IndexError: output 0, of shape \(5, 16\), has no axis 2"),
        (lambda op: op.moves("x", 1, to=0), "ValueError: axis 1 of 'x' has 16 units, and axis 0 of output 0 5"),
        (lambda op: op.same("x", 0, "scale", 0), "ValueError: axis 0 of 'x' has 5 units, and axis 0 of 'scale' 16"),
        (lambda op: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_rule_that_fails_is_named_as_what_failed(rule, message):
    slimmable.register_rule("slimmable_tests::gain", rule)
    with pytest.raises(RuleError, match=r"tests.rules.test_register.*<lambda> of slimmable_tests::gain failed in") as e:
        slimmable.plan(scaled(), WIDTHS, example_inputs=X)
    assert isinstance(e.value, ConversionError)
    assert e.match(message)


def test_a_rule_of_ours_that_fails_pins_and_says_so(monkeypatch):
    def fails(*args):
        raise IndexError("off by one")

    monkeypatch.setitem(trace.RULES, "relu", fails)
    (reason,) = {p.reason for p in slimmable.plan(Net(lambda m, y: y), WIDTHS, example_inputs=X).pins if p.size == 16}
    assert reason == "relu in the model itself: its rule fails (IndexError: off by one); please report this"
