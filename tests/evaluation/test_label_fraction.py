"""A part of the labels: as many of each class as asked for, the same ones for the same seed, small parts in large."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from slimmable.errors import DataError, UsageError
from slimmable.evaluation import label_fraction

SETS = st.lists(st.integers(0, 6), min_size=1, max_size=200).map(torch.tensor)
FRACTIONS = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(SETS, FRACTIONS, st.integers(0, 2**31))
def test_each_class_keeps_its_share(labels, fraction, seed):
    kept = label_fraction(labels, fraction, seed=seed)
    assert kept.tolist() == sorted(set(kept.tolist()))
    each = max(1, round(fraction * len(labels) / len(labels.unique())))
    for number in labels.unique().tolist():
        assert int((labels[kept] == number).sum()) == min(each, int((labels == number).sum()))


@settings(max_examples=60, deadline=None)
@given(SETS, FRACTIONS, FRACTIONS, st.integers(0, 2**31))
def test_a_small_part_is_in_a_large_one(labels, one, other, seed):
    small, large = (set(label_fraction(labels, each, seed=seed).tolist()) for each in sorted((one, other)))
    assert small <= large
    balanced = torch.arange(12) % 4
    assert label_fraction(balanced, 1.0, seed=seed).tolist() == list(range(12))


def test_the_seed_decides_and_every_image_is_drawn_equally_often():
    labels = torch.arange(60) % 3
    drawn = torch.zeros(60)
    before = torch.get_rng_state()
    for seed in range(400):
        part = label_fraction(labels, 0.1, seed=seed)
        assert torch.equal(part, label_fraction(labels.to(torch.uint8), 0.1, seed=seed))
        drawn[part] += 1
    assert torch.equal(before, torch.get_rng_state())
    assert drawn.sum() == 400 * 6
    assert 15 < drawn.min() <= drawn.max() < 70  # of 40 on average, with a deviation of 6


@pytest.mark.parametrize("fraction", [-0.1, 1.01, float("nan"), "a", None, True])
def test_what_is_no_fraction_is_refused(fraction):
    with pytest.raises(UsageError, match=r"label_fraction: fraction must be a number in \[0, 1\], got"):
        label_fraction(torch.tensor([0, 1]), fraction)


@pytest.mark.parametrize(
    "labels", [torch.zeros(0, dtype=torch.long), torch.tensor([0.5]), torch.tensor([-1]), [0, 1], torch.tensor(3)]
)
def test_what_is_no_set_of_labels_is_refused(labels):
    with pytest.raises(DataError, match="label_fraction"):
        label_fraction(labels, 0.5)
