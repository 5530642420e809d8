"""The drawn characters that benchmarks train on."""

import torch
from hypothesis import given, settings, strategies as st

from benchmarks.glyphs import CHARACTERS, glyphs


@given(st.integers(1, 70), st.integers(1, 20), st.integers(16, 40), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_glyphs_are_the_same_for_the_same_seed(train, test, size, seed):
    images, again = (glyphs(train, test, size, seed) for _ in range(2))
    assert images.train.shape == (train, 1, size, size)
    assert images.test.shape == (test, 1, size, size)
    assert torch.equal(images.train, again.train)
    assert torch.equal(images.test_labels, again.test_labels)
    assert not torch.equal(images.train, glyphs(train, test, size, seed + 1).train)


def test_glyphs_show_every_class_equally_often():
    labels = glyphs(train=620, test=62).train_labels
    assert labels.bincount().tolist() == [10] * len(CHARACTERS)
