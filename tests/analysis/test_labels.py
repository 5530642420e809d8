"""The union-find of channel labels against a slow one, and the groups that follow from it."""

import copy

import numpy as np
from hypothesis import given, strategies as st

from slimmable.analysis.labels import Labels, spread


def slow_classes(count: int, pairs: list[tuple[int, int]]) -> list[set[int]]:
    classes = [{i} for i in range(count)]
    for a, b in pairs:
        first, second = (next(c for c in classes if i in c) for i in (a, b))
        if first is not second:
            classes.remove(second)
            first |= second
    return classes


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_merging_vectors_is_merging_pairs(case):
    count, pairs = case
    labels = Labels()
    labels.fresh(count // 2)
    labels.fresh(count - count // 2)
    labels.merge(np.array([a for a, _ in pairs], int), np.array([b for _, b in pairs], int))
    roots = labels.find(np.arange(count)).tolist()
    for members in slow_classes(count, pairs):
        assert {roots[i] for i in members} == {min(members)}


@given(
    st.integers(2, 20).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)),
            st.sets(st.integers(0, n - 1)),
            st.sets(st.integers(0, n - 1)),
        )
    )
)
def test_pins_and_production_hold_for_whole_classes_and_not_in_copies(case):
    count, pairs, pinned, produced = case
    labels = Labels()
    ids = labels.fresh(count)
    for i in produced:
        labels.produce(ids[[i]])
    for i in pinned:
        labels.pin(ids[[i]], "because")
    start = copy.deepcopy(labels)
    for a, b in pairs:
        labels.merge(ids[[a]], ids[[b]])
    for members in slow_classes(count, pairs):
        for i in members:
            assert bool(labels.pinned(ids[[i]])[0]) == bool(members & pinned)
            assert bool(labels.produced(ids[[i]])[0]) == bool(members & produced)
    assert start.find(ids).tolist() == list(range(count))
    assert set(np.flatnonzero(start.pinned(ids))) == pinned


def test_classes_with_the_same_roles_form_a_group():
    labels = Labels()
    a, b, c = labels.fresh(4), labels.fresh(6), labels.fresh(2)
    labels.roles += [a, b, c]
    labels.produce(a)
    labels.produce(b)
    labels.merge(a, b[:4])  # a sits in the front of b
    assert [group.tolist() for group in labels.groups()] == [[0, 1, 2, 3], [8, 9]]
    labels.pin(b[4:], "because")
    assert [group.tolist() for group in labels.groups()] == [[0, 1, 2, 3]]


def test_a_role_played_twice_is_another_signature():
    labels = Labels()
    a = labels.fresh(4)
    b = labels.fresh(6)
    labels.roles += [a, b]
    labels.produce(a)
    labels.merge(a[[0, 1, 2, 3]], b[:4])
    labels.merge(a[:2], b[4:])  # the first two units take part in b twice
    assert [group.tolist() for group in labels.groups()] == [[0, 1], [2, 3]]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
def test_spreading_is_flattening_a_block(before, units, after):
    ids = np.arange(units)
    block = spread(ids, before, after).reshape(before, units, after)
    assert all((block[i, :, j] == ids).all() for i in range(before) for j in range(after))


def test_marks_and_classes_of_blocks_of_ids():
    labels = Labels()
    block = labels.fresh(6).reshape(2, 3)
    assert len(np.unique(labels.find(block))) == 6
    labels.merge(block[0], block[1])
    assert (labels.find(block[0]) == labels.find(block[1])).all()
    labels.order(block[:, :2])
    labels.produce(block[:, 1:])
    assert labels.ordered(block).tolist() == [[True, True, False]] * 2
    assert labels.produced(block).tolist() == [[False, True, True]] * 2
