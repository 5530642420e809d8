"""Channel labels: which units of which tensor axes must be kept or dropped together.

Every axis of every parameter starts with one fresh id a unit; running the model merges ids in a union-find.
A set of merged ids is a *class*: one unit of the network that all its axes share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Axes = tuple["Ids | None", ...]  # the labels of one tensor: an id a unit, or None for an axis that no width changes


class Labels:
    """A union-find over ids, vectorised; the smallest id of a class is its root.

    A class can be *pinned* (kept at full width, with the first reason given), *produced*
    (it is the output axis of a convolution, linear layer or embedding; only such classes are slimmed) and *ordered*
    (it has neighbours on its axis: it may be slimmed, not permuted).
    """

    def __init__(self) -> None:
        self._count = 0  # the arrays below hold spare room behind it
        self._parent = np.arange(1024)
        self._pinned = np.zeros(1024, bool)
        self._produced = np.zeros(1024, bool)
        self._ordered = np.zeros(1024, bool)
        self.roles: list[Ids] = []  # ids that play one part together: a parameter axis, a piece of a split
        self.reasons: list[tuple[Ids, str]] = []

    def __len__(self) -> int:
        return self._count

    def fresh(self, units: int) -> Ids:
        """Return `units` new ids."""
        start, self._count = self._count, self._count + units
        room = len(self._parent)
        if self._count > room:
            more = max(room, self._count - room)
            self._parent = np.concatenate([self._parent, np.arange(room, room + more)])
            self._pinned = np.concatenate([self._pinned, np.zeros(more, bool)])
            self._produced = np.concatenate([self._produced, np.zeros(more, bool)])
            self._ordered = np.concatenate([self._ordered, np.zeros(more, bool)])
        return np.arange(start, self._count)

    def find(self, ids: Ids) -> Ids:
        """Return the root of each id."""
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                self._parent[ids] = roots
                return roots
            roots = above

    def merge(self, first: Ids, second: Ids) -> None:
        """Make `first[i]` and `second[i]` one class for every i."""
        while True:
            a, b = self.find(first.ravel()), self.find(second.ravel())
            differ = a != b
            if not differ.any():
                return
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.logical_or.at(self._pinned, low, self._pinned[high])
            np.logical_or.at(self._produced, low, self._produced[high])
            np.logical_or.at(self._ordered, low, self._ordered[high])
            self._parent[high] = low

    def pin(self, ids: Ids, reason: str) -> None:
        """Keep the classes of `ids` at full width."""
        roots = self.find(ids.ravel())
        if not self._pinned[roots].all():
            self._pinned[roots] = True
            self.reasons.append((ids.ravel(), reason))

    def produce(self, ids: Ids) -> None:
        """Note that a convolution, linear layer or embedding makes these units."""
        self._produced[self.find(ids.ravel())] = True

    def order(self, ids: Ids) -> None:
        """Note that the order of these units matters."""
        self._ordered[self.find(ids.ravel())] = True

    def pinned(self, ids: Ids) -> NDArray[np.bool_]:
        """Say of each id whether its class is pinned."""
        result: NDArray[np.bool_] = self._pinned[self.find(ids)]
        return result

    def produced(self, ids: Ids) -> NDArray[np.bool_]:
        """Say of each id whether its class is the output of a layer with weights."""
        result: NDArray[np.bool_] = self._produced[self.find(ids)]
        return result

    def ordered(self, ids: Ids) -> NDArray[np.bool_]:
        """Say of each id whether the order of its class among others matters."""
        result: NDArray[np.bool_] = self._ordered[self.find(ids)]
        return result

    def same(self, first: Ids, second: Ids) -> bool:
        """Say whether `first[i]` and `second[i]` are of one class for every i."""
        return np.array_equal(self.find(first.ravel()), self.find(second.ravel()))

    def snapshot(self) -> tuple[Any, ...]:
        """Return what `restore` needs to undo later merges and pins."""
        arrays = (self._parent, self._pinned, self._produced, self._ordered)
        return (*(array.copy() for array in arrays), list(self.reasons))

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Go back to a snapshot."""
        *arrays, reasons = snapshot
        self._parent, self._pinned, self._produced, self._ordered = (array.copy() for array in arrays)
        self.reasons = list(reasons)

    def groups(self) -> list[Ids]:
        """Return the channel groups: roots of the classes to be slimmed, ordered, one array a group.

        Two classes are of one group if they play the same roles equally often. A class's signature is the
        multiset of its roles; it is compared through a sum of one random number a role.
        """
        signature = np.zeros(len(self), np.uint64)
        draw = np.random.default_rng(0).integers(0, 2**64, len(self.roles), np.uint64)
        for role, ids in zip(draw, self.roles, strict=True):
            np.add.at(signature, self.find(ids), role)
        everything = np.arange(len(self))
        roots = everything[self.find(everything) == everything]
        slim = roots[self._produced[roots] & ~self._pinned[roots]]
        order = np.argsort(signature[slim], kind="stable")
        cuts = np.flatnonzero(np.diff(signature[slim][order])) + 1
        found = [np.sort(group) for group in np.split(slim[order], cuts) if len(group)]
        return sorted(found, key=lambda group: int(group[0]))


def spread(ids: Ids, before: int, after: int) -> Ids:
    """Return the labels of a flattened (before, len(ids), after) block in which only the middle axis is labelled."""
    block: Ids = np.broadcast_to(ids[None, :, None], (before, len(ids), after)).reshape(-1)
    return block


def pattern(shape: Sequence[int], axis: int, ids: Ids) -> NDArray[Any]:
    """Return `ids` laid along `axis` of a block of `shape`."""
    view = ids.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return np.broadcast_to(view, tuple(shape))
