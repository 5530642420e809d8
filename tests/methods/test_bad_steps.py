"""A step that cannot work says why before anything changes, and one that breaks off leaves nothing behind."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimmable
from slimmable import methods
from slimmable.errors import DataError, DivergedError, UsageError
from slimmable.training import GradientDiagnostics
from tests.methods.networks import DIM, FEATURES, HIDDEN, WIDTHS, batch_of, encoder, make, predictor, recipe_of


def state_of(method):
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def of(views=None, labels=None):
    return lambda batch: methods.Batch(views(batch.views) if views else batch.views, labels)


PART = "the SlimRecipe is of another model, or a part of this"


@pytest.mark.parametrize(
    ("recipe", "batch", "more", "error", "message"),
    [
        (lambda m: slimmable.SlimRecipe(m.encoder, m.distillation()), None, {}, UsageError, PART),
        (lambda m: recipe_of(make("byol")), None, {}, UsageError, PART),
        (lambda m: None, None, {}, UsageError, "recipe must be a SlimRecipe"),
        (recipe_of, lambda batch: batch.views, {}, UsageError, "batch must be a Batch.*got list"),
        (recipe_of, of(lambda views: ["a", "b"]), {}, DataError, "view 0 must be a tensor, got str"),
        (
            recipe_of,
            of(lambda views: [views[0], views[1][:5]]),
            {},
            DataError,
            r"\(8, 3, .* and \(5, 3,",
        ),
        (recipe_of, None, {"autocast": "bfloat16"}, UsageError, "autocast must be a dtype .* got 'bfloat16'"),
        (recipe_of, None, {"progress": 1.5}, UsageError, "progress .* got 1.5"),
    ],
)
def test_a_step_that_cannot_work_changes_nothing(recipe, batch, more, error, message):
    method = make("byol")
    before, given = state_of(method), batch_of(method)
    with pytest.raises(error, match=message):
        method.step(recipe(method), batch(given) if batch else given, **{"progress": 0.9} | more)
    assert all(torch.equal(before[name], tensor) for name, tensor in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())


def test_a_recipe_may_switch_more_than_the_method():
    method, again = make("byol"), make("byol")
    whole = slimmable.SlimRecipe(again, again.distillation())  # the momentum encoder, too
    assert method.step(recipe_of(method), batch_of(method), 0.9) == again.step(whole, batch_of(again), 0.9)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5).long(), r"shape \(5,\), torch.int64 .* expected class numbers of shape \(8,\)"),
        (torch.arange(8), "labels from 0 to 7 are not class numbers from 0 to 3"),
        (torch.zeros(8), r"shape \(8,\), torch.float32 .* probabilities of shape \(8, 4\)"),
        ([0] * 8, r"labels are \[0, 0"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    method = make("supervised")
    with pytest.raises(DataError, match=message):
        method.step(recipe_of(method), methods.Batch(batch_of(method).views, labels), 0.9)


def test_labels_may_be_probabilities():
    method, again = make("supervised"), make("supervised")
    batch = batch_of(method)
    shares = methods.Batch(batch.views, F.one_hot(batch.labels, 4).double())
    expected = method.step(recipe_of(method), batch, 0.9)
    assert again.step(recipe_of(again), shares, 0.9) == pytest.approx(expected, rel=1e-12)


NETWORK = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.SimCLR(None), "SimCLR needs a torch.nn.Module, got None"),
        (lambda: methods.BYOL(NETWORK, None), "BYOL: predictor needs a torch.nn.Module"),
        (
            lambda: methods.Supervised(NETWORK, label_smoothing=2.0),
            r"label_smoothing must be .* in \[0, 1\], got 2.0",
        ),
        (lambda: methods.VICReg(NETWORK, variance=-1.0), "VICReg: variance must be a finite number .* got -1.0"),
        (lambda: methods.MoCoV3.projector(2, 2, 2, layers=0), "layers must be a 64-bit integer of at least 1, got 0"),
        (lambda: methods.SimCLR(NETWORK).backbone, "the encoder, Linear, has no module of this name"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize("when", ["before", "after"])
def test_targets_come_from_the_full_width_whatever_the_width_was(when):
    def byol(narrow):
        torch.manual_seed(0)
        network = encoder(methods.BYOL.projector(FEATURES, HIDDEN, DIM))
        head = predictor(methods.BYOL.predictor(HIDDEN, DIM))
        if narrow and when == "before":
            slimmable.set_width(network, 0.25)
        method = methods.BYOL(network, head)
        if narrow and when == "after":
            slimmable.set_width(method, 0.25)
        return method.step(recipe_of(method), batch_of(method), 0.9)

    assert byol(narrow=True) == byol(narrow=False)


class Breaks(methods.SimCLR):
    """Breaks at the narrowest width while `broken`, and keeps track of what it returned."""

    broken, returned = False, None

    def forward(self, batch):
        if self.broken and slimmable.width_of(self.encoder) == WIDTHS[-1]:
            raise RuntimeError("out of memory")
        if self.returned is not None:
            assert self.returned() is None, "the outcome of the width before is still there"
        outcome = super().forward(batch)
        self.returned = weakref.ref(outcome)
        return outcome


def breaks():
    torch.manual_seed(0)
    return Breaks(encoder(methods.SimCLR.projector(FEATURES, HIDDEN, DIM)))


def test_a_step_that_breaks_off_leaves_the_full_width_and_no_diagnostics():
    rows = []
    for first_breaks in (True, False):
        method = breaks()
        recipe, diagnostics = recipe_of(method), GradientDiagnostics(method.online, every=1)
        if first_breaks:
            method.broken, batch = True, batch_of(method, seed=1)
            with pytest.raises(RuntimeError, match="out of memory") as caught:
                method.step(recipe, batch, 0.9, diagnostics=diagnostics)
            assert slimmable.width_of(method.online) == 1.0
            assert caught.tb is not None  # which keeps the frames of the step
            method.broken = False
            method.zero_grad()
        method.step(recipe, batch_of(method), 0.9, diagnostics=diagnostics)
        diagnostics.after_step()
        rows.append(diagnostics.rows)
    assert len(rows[0]) == 1
    assert rows[0][0] == pytest.approx(rows[1][0], rel=1e-9)


def test_targets_are_gone_after_a_step():
    method = make("mocov2")
    batch = batch_of(method)
    method.step(recipe_of(method), batch, 0.9)
    assert batch.targets == ()
    assert int(method.moco.position) == 8


def test_a_distillation_that_is_not_finite_stops_the_step():
    class Broken(slimmable.OnlineDistillation):
        def forward(self, student, teachers, target=0):
            return student.sum() * torch.inf

    method = make("simclr")
    with pytest.raises(DivergedError, match=r"the loss with distillation is -?(inf|nan) at width 0.5"):
        method.step(slimmable.SlimRecipe(method.online, Broken()), batch_of(method), 0.9)
