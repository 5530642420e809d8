"""What one classifier for all widths loses is what the theory says."""

import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.one_probe.__main__ import plot, theory, trained


@settings(max_examples=15)
@given(st.floats(-0.95, 0.95))
def test_training_ends_where_theory_says(r):
    found = trained(r)
    assert found.keys() == theory(r).keys()
    for name, lost in theory(r).items():
        assert found[name] == pytest.approx(lost, abs=1e-9)


def test_only_orthogonal_features_share_a_classifier():
    assert theory(0.0)["one, trained at both"] == (0.0, 0.0)
    assert all(min(theory(r)["one, trained at both"]) > 0 for r in (-0.9, -0.1, 0.1, 0.9))


def test_the_picture_is_drawn(tmp_path):
    plot(tmp_path / "one-probe.png")
    assert (tmp_path / "one-probe.png").stat().st_size > 10_000
