"""Re-weighting by name, and the total loss as a sum of terms."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from slimmable import losses
from slimmable.errors import UsageError, WidthError

MODES = ("ones", "share", "width", "scaled_share", "widest_plus_rest", "narrower_sums", "widest_plus_second")
width_lists = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5, unique=True).map(lambda rest: [1.0, *rest])
numbers = st.floats(-10, 10)
quick = settings(max_examples=50, deadline=None)


@quick
@given(width_lists, st.sampled_from(MODES), st.randoms())
def test_weights_follow_the_widths_in_any_order(widths, mode, random):
    weights = dict(zip(widths, losses.width_weights(widths, mode), strict=True))
    shuffled = random.sample(widths, len(widths))
    assert losses.width_weights(shuffled, mode) == pytest.approx([weights[width] for width in shuffled])


@quick
@given(width_lists)
def test_weights_equal_their_definitions(widths):
    rest, count = sum(widths) - 1, len(widths)
    weights = {mode: losses.width_weights(widths, mode) for mode in MODES}
    assert set(weights["ones"]) == {1.0}
    assert sum(weights["share"]) == pytest.approx(1)
    assert sum(weights["scaled_share"]) == pytest.approx(count) == sum(weights["narrower_sums"])
    assert weights["width"] == tuple(widths)
    assert weights["widest_plus_rest"][0] == pytest.approx(1 + rest)
    assert weights["widest_plus_second"][0] == pytest.approx(1 + max(widths[1:]))
    for mode in ("widest_plus_rest", "widest_plus_second"):
        assert set(weights[mode][1:]) == {1.0}
    for mode in ("share", "scaled_share", "width", "narrower_sums"):  # wider counts more
        order = sorted(range(count), key=widths.__getitem__)
        assert sorted(weights[mode]) == [weights[mode][i] for i in order]


def test_nothing_is_rounded():
    assert losses.width_weights((1.0, 0.5), "share") == (2 / 3, 1 / 3)


def test_bad_weights():
    with pytest.raises(UsageError, match=r"'rest'.*ones, share"):
        losses.width_weights((1.0, 0.5), "rest")
    with pytest.raises(UsageError, match=r"unknown mode \[1\]"):
        losses.width_weights((1.0, 0.5), [1])
    with pytest.raises(WidthError, match="full width"):
        losses.width_weights((0.5,), "ones")


@quick
@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=5), st.floats(0, 1))
def test_total_equals_the_formula(rows, share):
    contrastive, distillation, weights = zip(*rows, strict=True)
    total = losses.slim_loss(
        [torch.tensor(c) for c in contrastive], [torch.tensor(a) for a in distillation[1:]], weights, share
    )
    expected = weights[0] * contrastive[0]
    for c, a, k in rows[1:]:
        expected += k * ((1 - share) * c + share * a)
    assert total.item() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_without_distillation_the_contrastive_loss_counts_in_full():
    terms = [torch.tensor(2.0), torch.tensor(3.0)]
    assert losses.slim_loss(terms) == 5
    assert losses.slim_loss(terms, weights=(2.0, 1.0)) == 7
    assert losses.slim_loss(terms[:1]) == 2  # the slow start


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "slim_loss: 0 losses"),
        (([torch.ones(())] * 3, [torch.ones(())] * 3), "3 losses, 3 distillation losses and 3 weights; give one"),
        (([torch.ones(())] * 3, (), [1.0]), "3 losses, 0 distillation losses and 1 weights"),
    ],
)
def test_total_says_what_does_not_fit(arguments, words):
    with pytest.raises(UsageError, match=words):
        losses.slim_loss(*arguments)
    assert math.isfinite(losses.slim_loss([torch.ones(())]))


def test_total_takes_terms_and_weights_as_tensors():
    own, taught, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 6.0]), torch.tensor([2.0, 1.0, 1.0])
    assert losses.slim_loss(own, taught, weights) == 2 * 1 + (2 + 4) / 2 + (3 + 6) / 2
    assert losses.slim_loss(own, weights=weights.numpy()) == 2 * 1 + 2 + 3
