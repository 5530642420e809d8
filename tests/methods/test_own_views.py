"""Views of its own for each width: a step is the loop over widths in which each sees its own views."""

import copy

import pytest
import torch
from torch import nn

import slimmable
from slimmable import methods
from slimmable.errors import DataError, UsageError
from tests.methods.networks import MAKE, WIDTHS, batch_of, gradients_of, make, own_views, recipe_of


@pytest.mark.parametrize("name", MAKE)
def test_each_width_learns_from_its_own_views(name):
    method = make(name)
    batch = own_views(method)
    by_hand = copy.deepcopy(method)
    torch.manual_seed(1)
    losses = method.step(recipe_of(method), batch, 0.9)
    recipe, expected = recipe_of(by_hand), {}
    torch.manual_seed(1)
    for width in recipe.widths(0.9):
        if recipe.first:
            with torch.no_grad():
                targets = by_hand.prepare(batch, 0.9)
        views = batch.views if width == 1.0 else batch.narrow[width]
        outcome = by_hand(methods.Batch(views, batch.labels, targets))
        kind = None if recipe.distill is None else recipe.distill.kind
        compared = {None: None, "mse": outcome.embeddings}.get(kind, outcome.logits)
        expected[width] = outcome.loss.item()
        recipe.loss(outcome.loss, compared).backward()
    assert losses == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradients_of(method), gradients_of(by_hand), rtol=1e-10, atol=1e-12)
    assert list(batch.targets) == []


def test_published_moco_queries_of_each_width_meet_the_same_keys():
    """SlimCLR's code has a query image for each width (its `sweet_x`), and one key image."""
    method = make("mocov2")
    batch, queue = own_views(method), nn.functional.normalize(method.moco.queue, dim=0)
    method.moco.queue.copy_(queue)
    plain = copy.deepcopy(method)
    torch.manual_seed(1)
    losses = method.step(recipe_of(method), batch, 0.9)
    torch.manual_seed(1)
    keys = plain.moco.keys(plain.encoder, batch.views[1])
    for width in WIDTHS:
        with slimmable.at_width(plain.encoder, width):
            query = nn.functional.normalize(plain.encoder(batch.narrow.get(width, batch.views)[0]), dim=1)
        logits = torch.cat([(query * keys).sum(1, keepdim=True), query @ queue], 1) / 0.2
        expected = nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
        assert losses[width] == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(method.moco.queue[:, :8], keys.T)


def test_a_width_without_views_of_its_own_sees_those_of_all():
    method = make("simclr")
    batch = own_views(method)
    shared = methods.Batch(batch.views, narrow={0.25: batch.narrow[0.25]})
    plain = copy.deepcopy(method)
    found = method.step(recipe_of(method), shared, 0.9)
    assert found[0.5] == pytest.approx(plain.step(recipe_of(plain), methods.Batch(batch.views), 0.9)[0.5])


VIEW = torch.zeros(8, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize(
    ("narrow", "error", "message"),
    [
        ({0.3: [VIEW, VIEW]}, UsageError, "batch.narrow must hold views for narrower widths"),
        ({1.0: [VIEW, VIEW]}, UsageError, "batch.narrow must hold views for narrower widths"),
        ([VIEW, VIEW], UsageError, "batch.narrow must hold views for narrower widths"),
        (None, UsageError, "batch.narrow must hold views for narrower widths"),
        ({0.5: [VIEW]}, UsageError, "takes 2 views of each image, got 1"),
        ({0.5: [VIEW, VIEW[:4]]}, DataError, "row i of each must belong to the same image"),
        ({0.5: [VIEW, "image"]}, DataError, "view 3 must be a tensor, got str"),
    ],
)
def test_views_that_do_not_fit_are_refused_before_anything_runs(narrow, error, message):
    method = make("simclr")
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(error, match=message):
        method.step(recipe_of(method), methods.Batch(batch_of(method).views, narrow=narrow), 0.9)
    torch.testing.assert_close(method.state_dict(), before)
    assert all(parameter.grad is None for parameter in method.parameters())
