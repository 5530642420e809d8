"""Gated models in code that does more than the usual loop: wrong numbers, lost modules and raw errors of the past."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import slimmable
from slimmable.errors import UsageError
from slimmable.gating import GateBudget, PassNorm, annealed, calibrate_gates, gate_activity, ungate

pytestmark = pytest.mark.filterwarnings("ignore:the gates of this .* were never trained")

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def gated_model(widths=None):
    net = plain() if widths is None else slimmable.slimify(plain(), widths, example_inputs=IMAGES)
    return slimmable.gating.gate(net, example_inputs=IMAGES)


def test_costs_are_those_of_the_width_that_has_run():
    model = gated_model((1.0, 0.5))
    with slimmable.at_width(model, 0.5):
        with slimmable.gating.gated(model) as run:
            model(IMAGES)
        inside = run.share(), run.dense_macs()
        expected = slimmable.profile(slimmable.extract(model, 0.5), (3, 16, 16), repeats=0).rows[0].macs
    assert inside[1] == expected
    assert run.dense_macs() == expected
    assert torch.equal(run.share(), inside[0])
    with slimmable.gating.gated(model) as run:
        model(IMAGES)
        slimmable.set_width(model, 0.5)
        model(IMAGES)
    with pytest.raises(UsageError, match="several widths"):
        run.share()


def test_several_gated_models_are_not_one():
    both = nn.ModuleDict({"student": gated_model(), "teacher": gated_model()})
    with (
        pytest.raises(UsageError, match=r"2 gated models, student, teacher"),
        slimmable.gating.gated(both),
    ):
        pass
    with slimmable.gating.gated(both["student"]) as first, slimmable.gating.gated(both["teacher"]) as second:
        both["student"](IMAGES)
        both["teacher"](IMAGES[:2])
    assert [len(first.share()), len(second.share())] == [4, 2]


def test_a_forward_that_was_broken_off():
    net = nn.Sequential(nn.Linear(4, 8), *(part for _ in range(3) for part in (nn.ReLU(), nn.Linear(8, 8))))
    model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))

    def fail(*_):
        raise MemoryError

    broken = model[2].register_forward_hook(fail)
    with slimmable.gating.gated(model) as run:
        with pytest.raises(MemoryError):
            model(torch.ones(3, 4))
        broken.remove()
        model(torch.ones(3, 4))
    with pytest.raises(UsageError, match=r"different numbers of images \(2 6, 4 3\)"):
        run.masks()


@pytest.mark.parametrize("inside", [False, True])
def test_checkpoints_between_a_gate_and_what_it_masks(inside):
    model = gated_model().eval()

    def gradient(run_part):
        model.zero_grad()
        with slimmable.gating.gated(model) as run:
            scores = [run_part(model[5:], model[:5](x)) for x in (IMAGES, 1 - 2 * IMAGES)]
            if inside:
                scores[0].sum().backward()
        assert not torch.equal(*run.masks()["2"].chunk(2))
        if not inside:
            scores[0].sum().backward()
        return model[5].weight.grad.clone()

    torch.nn.init.normal_(model[2].channel_gate.at[0].expand.bias)
    expected = gradient(lambda part, x: part(x))
    found = gradient(lambda part, x: checkpoint(part, x, use_reentrant=False))
    torch.testing.assert_close(found, expected)


class Attending(nn.Module):
    """A network with a module of its own under the name that gates have."""

    def __init__(self):
        super().__init__()
        self.body, self.channel_gate, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        return self.out(x * self.channel_gate(x).sigmoid())


def test_other_modules_may_have_the_name_of_gates():
    slim = slimmable.slimify(Attending(), (1.0, 0.5), example_inputs=IMAGES)
    small = slimmable.extract(slim, 0.5)
    with slimmable.at_width(slim, 0.5):
        torch.testing.assert_close(small(IMAGES), slim(IMAGES))
    net = Attending()
    assert list(ungate(net).state_dict()) == list(Attending().state_dict())


class Aliased(nn.Module):
    """Runs a BatchNorm under its second name."""

    def __init__(self):
        super().__init__()
        self.layers = plain()
        self.norm = self.layers[3]

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = (self.norm if number == 3 else layer)(x)
        return x


def test_norms_with_two_names():
    model = slimmable.gating.gate(Aliased(), example_inputs=IMAGES)
    assert isinstance(model.norm, PassNorm)
    assert model.norm is model.layers[3]
    with slimmable.gating.gated(model):
        model(IMAGES)
    counts = [int(norm.num_batches_tracked) for norm in (model.norm.full, model.norm.gated[0])]
    assert counts == [0, 1]
    ungate(model)
    assert type(model.norm) is nn.BatchNorm2d
    assert model.norm is model.layers[3]


def test_on_the_meta_device():
    model = gated_model().eval().to(device="meta")
    with slimmable.gating.gated(model) as run:
        assert model(IMAGES.to("meta")).shape == (4, 4)
    assert run.masks()["2"].shape == (4, 32)


@pytest.mark.parametrize("call", [gate_activity, lambda *given: calibrate_gates(*given, 0.7)])
def test_what_is_no_loader_and_no_gated_model(call):
    model = gated_model()
    for loader in (None, 3, IMAGES):
        with pytest.raises(UsageError, match=f"loader must hold batches.*{type(loader).__name__}"):
            call(model, loader)
    for other, message in ((None, "needs a torch.nn.Module"), (nn.ReLU(), "no gates"), (plain(), "no gates")):
        with pytest.raises(UsageError, match=message):
            call(other, [IMAGES])


def test_bad_arguments():
    model = gated_model()
    with slimmable.gating.gated(model):
        scores = model(IMAGES)
    for given in (None, scores, model, {}):
        with pytest.raises(UsageError, match=f"with gated.*got {type(given).__name__}"):
            GateBudget(0.3)(given, 0)
    for epoch in (None, "1", float("nan")):
        with pytest.raises(UsageError, match="epoch must be a finite number"):
            annealed(epoch)
    for setting in ({"budget_weight": -1}, {"bound_weight": "x"}, {"alpha": float("nan")}, {"first_epoch": "a"}):
        with pytest.raises(UsageError, match=next(iter(setting))):
            GateBudget(0.3, **setting)
    for size in (24, "24"):
        with pytest.raises(UsageError, match="input_size must be the size of one image"):
            slimmable.gating.gated(model, size).__enter__()
    with pytest.raises(slimmable.errors.ConversionError, match="one row per image"):
        slimmable.gating.gate(plain(), example_inputs=IMAGES[:0])
