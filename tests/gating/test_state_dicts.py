"""State dicts of other gates are refused before anything has changed; those of dense networks load."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import slimmable
from slimmable.errors import CheckpointError
from slimmable.gating import gate_activity, ungate
from tests.gating.test_files import chain, small_model

pytestmark = pytest.mark.filterwarnings("ignore:the gates of this .* were never trained")


def changed_state(model):
    """Return a state dict of which every tensor differs from the model's."""
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


OTHERS = {
    "skip": (lambda: small_model(skip="3"), "missing: 3.channel_gate.at.0"),
    "more": (lambda: small_model((8, 16, 16, 16, 12)), "unknown: 10.gated.0.weight, 10.gated.0.bias"),
    "sizes": (
        lambda: small_model((8, 16, 20, 12)),
        r"of another shape: .*6.channel_gate.at.0.expand.weight \(20, 4\), expected \(16, 4\)",
    ),
    "widths": (
        lambda: small_model(widths=(1.0, 0.5)),
        r"unknown: 3\.channel_gate\.at\.1\..* and \d+ more",
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
    refusal = "the gates in this state dict differ from those of this Sequential; nothing was loaded"
    with pytest.raises(CheckpointError, match=refusal) as caught:
        wrapped.load_state_dict(given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    caught.match(message if not prefix else "channel_gate")
    assert "gate the model like the checkpoint's" in str(caught.value)
    rest = {name: tensor for name, tensor in given.items() if "channel_gate" not in name and ".gated." not in name}
    if other == "skip":  # what the message says to do
        missing, unexpected = wrapped.load_state_dict(rest, strict=False)
        assert not unexpected
        assert all("channel_gate" in name for name in missing)
        assert torch.equal(model[4].gated[0].bias, before["4.bias"] + 1)


def test_separate_norms_do_not_go_into_shared_ones():
    model = small_model(separate_norms=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"unknown: 4\.gated\.0\.weight"):
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
        with pytest.raises(CheckpointError, match="the gates in this state dict differ"):
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
        slimmable.gating.extract_gated(small_model(), [x], keep=0.5),
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
