"""Traced integers are integers, and their expressions compute what Python computed."""

import operator

import numpy as np
import pytest
from hypothesis import given, strategies as st

from slimmable.analysis.integers import Expression, TracedInt, express

KEY = ("module", "attribute", ())


def traced(value: int, seen: list | None = None) -> TracedInt:
    note = None if seen is None else lambda a, b: seen.append((a, b))
    return TracedInt(value, Expression("attribute", KEY), note)


BINARY = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod]


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(-50, 50), st.sampled_from(BINARY), st.booleans())
def test_arithmetic_is_that_of_integers_at_every_value(value, other, later, operation, reflected):
    def compute(number):
        return operation(other, number) if reflected else operation(number, other)

    try:
        expected, at_later = compute(value), compute(later)
    except ZeroDivisionError:
        return
    result = compute(traced(value))
    assert isinstance(result, TracedInt)
    assert result == expected
    assert result.expression.evaluate({KEY: later}, len) == at_later


@given(st.integers(-50, 50), st.integers(-50, 50))
def test_everything_else_is_that_of_integers(value, other):
    number = traced(value)
    assert (number == other, number != other, number < other) == (value == other, value != other, value < other)
    assert hash(number) == hash(value)
    assert (-number, abs(number), number / 7, number**2) == (-value, abs(value), value / 7, value**2)
    assert list(range(20))[number % 20] == value % 20
    assert (-number).expression.evaluate({KEY: other}, len) == -other
    if other:
        assert divmod(number, other) == divmod(value, other)
        assert divmod(number, other)[0].expression.kind == "floordiv"


def test_only_a_true_comparison_of_two_traced_integers_is_noted():
    seen: list = []
    a, b, c = traced(4, seen), traced(4, seen), traced(5, seen)
    assert a != c
    assert a == 4
    assert 4 == a  # noqa: SIM300
    assert not seen
    assert a == b
    assert len(seen) == 1


def test_a_size_follows_the_kept_units():
    ids = np.arange(8)
    size = TracedInt(8, Expression("size", ids))
    double = 2 * size + 1
    assert double.expression.evaluate({}, lambda found: 3 if found is ids else 0) == 7
    assert next(double.expression.leaves("size")) is ids
    assert str(double.expression) == "add(mul(2, size(8)), 1)"


def test_a_copy_is_a_plain_integer():
    import copy
    import pickle

    for twin in (copy.deepcopy(traced(3)), pickle.loads(pickle.dumps(traced(3)))):
        assert type(twin) is int


@pytest.mark.parametrize("value", [0, 3])
def test_a_plain_integer_is_a_constant(value):
    assert express(value).evaluate({}, len) == value
