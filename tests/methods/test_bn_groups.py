"""BatchNorm in groups, as on several GPUs without synchronisation, in one process and in two."""

import copy

import pytest
import torch
from torch import nn

from slimmable.errors import DataError
from slimmable.training import synchronised_batchnorm
from tests.methods.networks import batch_of, make, recipe_of

GROUPS = 4


def on_each_gpu(norm, x):
    """Return what copies of `norm` give that each see one part of the batch, and the copies."""
    copies = [copy.deepcopy(norm) for _ in range(GROUPS)]
    return torch.cat([own(part) for own, part in zip(copies, x.chunk(GROUPS), strict=True)]), copies


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d(3), (8, 3)), (nn.BatchNorm2d(3), (8, 3, 5, 4))])
def test_each_group_is_a_batch_of_its_own(norm, shape):
    torch.manual_seed(0)
    norm = norm.double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    ours = copy.deepcopy(norm)
    x = torch.randn(shape, dtype=torch.float64)
    expected_in, got_in = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(3):  # with running statistics
        expected, copies = on_each_gpu(norm, expected_in)
        with synchronised_batchnorm(GROUPS):
            got = ours(got_in)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(each, name) for each in copies]).mean(0)
            torch.testing.assert_close(getattr(ours, name), mean, rtol=1e-12, atol=1e-12)
            getattr(norm, name).copy_(mean)
    assert int(ours.num_batches_tracked) == 3
    expected.pow(3).sum().backward()
    got.pow(3).sum().backward()
    torch.testing.assert_close(got_in.grad, expected_in.grad, rtol=1e-10, atol=1e-10)
    gradient = sum(each.weight.grad for each in copies)
    torch.testing.assert_close(ours.weight.grad, gradient, rtol=1e-10, atol=1e-10)


def test_a_block_inside_another_rules_until_it_ends_and_no_block_leaves_a_trace():
    norm, x = nn.BatchNorm1d(2).double(), torch.randn(8, 2, dtype=torch.float64)
    plain = nn.functional.batch_norm, torch.batch_norm
    whole, (split, _) = norm(x), on_each_gpu(norm, x)
    with synchronised_batchnorm(GROUPS):
        torch.testing.assert_close(norm(x), split)
        with synchronised_batchnorm():
            torch.testing.assert_close(norm(x), whole)
        torch.testing.assert_close(norm(x), split)
        norm.eval()
        assert torch.equal(
            norm(x), nn.functional.batch_norm(x, norm.running_mean, norm.running_var, *norm.parameters())
        )
    assert (nn.functional.batch_norm, torch.batch_norm) == plain


def test_norms_without_running_statistics_or_gain_are_grouped_too():
    norm = nn.BatchNorm1d(2, affine=False, track_running_stats=False).double()
    x = torch.randn(8, 2, dtype=torch.float64)
    expected, _ = on_each_gpu(norm, x)
    with synchronised_batchnorm(GROUPS):
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(("rows", "groups"), [(6, 4), (4, 4), (8, 16)])
def test_groups_that_do_not_fit_the_batch_are_refused(rows, groups):
    norm = nn.BatchNorm1d(2)
    before = norm.running_mean.clone(), norm.running_var.clone()
    with pytest.raises(DataError, match=rf"{groups} groups .* \({rows}, 2\)"), synchronised_batchnorm(groups):
        norm(torch.randn(rows, 2))
    torch.testing.assert_close((norm.running_mean, norm.running_var), before)


def test_queries_of_moco_see_the_batch_of_their_gpu():
    """As published: each GPU normalises its own queries, and a shuffled part of the keys."""
    method = make("mocov2")
    method.bn_groups = GROUPS
    batch = batch_of(method)
    queue = nn.functional.normalize(method.moco.queue, dim=0)  # in float64
    method.moco.queue.copy_(queue)
    oracle = make("mocov2")
    oracle.load_state_dict(method.state_dict())
    torch.manual_seed(1)
    found = method.step(recipe_of(method), batch, 0.0)[1.0]
    torch.manual_seed(1)
    keys = oracle.moco.keys(oracle.encoder, batch.views[1])
    query = torch.cat([copy.deepcopy(oracle.encoder)(part) for part in batch.views[0].chunk(GROUPS)])
    query = nn.functional.normalize(query, dim=1)
    logits = torch.cat([(query * keys).sum(1, keepdim=True), query @ queue], 1) / 0.2
    expected = nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
    assert found == pytest.approx(expected.item(), rel=1e-10)
