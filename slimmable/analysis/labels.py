"""Channel labels: an id for each unit of each axis; merged ids are a *class*, a unit of the network on several axes."""

from functools import partialmethod

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Axes = tuple["Ids | None", ...]  # of one tensor: an id per unit, or None for an axis that never changes
Mask = NDArray[np.bool_]

_PINNED, _PRODUCED, _ORDERED = 1, 2, 4  # marks of a class, as bits


class Labels:
    """A vectorized union-find over ids; the smallest id of a class is its root.

    A class can be *pinned* (it stays), *produced* (by weights; only these are slimmed) and *ordered* (not permuted).
    """

    def __init__(self) -> None:
        self._count = 0  # the arrays below are longer, so they rarely have to grow
        self._parent = np.arange(1024)
        self._marks = np.zeros(1024, np.uint8)
        self.roles: list[Ids] = []  # ids that play one role together: a parameter axis, a piece of a split
        self.reasons: list[tuple[Ids, str]] = []

    def __len__(self) -> int:
        return self._count

    def fresh(self, units: int) -> Ids:
        """Return `units` new ids."""
        start, self._count = self._count, self._count + units
        while self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, len(self._parent) + np.arange(len(self._parent))])
            self._marks = np.concatenate([self._marks, np.zeros_like(self._marks)])
        return np.arange(start, self._count)

    def find(self, ids: Ids) -> Ids:
        """Return the root of each id."""
        roots = self._parent[ids]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[ids] = roots
        return roots

    def merge(self, first: Ids, second: Ids) -> None:
        """Put `first[i]` and `second[i]` into one class, for every i."""
        while True:
            a, b = self.find(first.ravel()), self.find(second.ravel())
            differ = a != b
            if not differ.any():
                return
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.bitwise_or.at(self._marks, low, self._marks[high])
            self._parent[high] = low

    def merge_rows(self, block: Ids) -> None:
        """Merge each row of a block into one class."""
        self.merge(block, np.broadcast_to(block[:, :1], block.shape))

    def pin(self, ids: Ids, reason: str) -> None:
        """Keep the classes of `ids` at full width."""
        if not self.pinned(ids).all():
            self._mark(ids, _PINNED)
            self.reasons.append((ids.ravel(), reason))

    def _mark(self, ids: Ids, mark: int) -> None:
        self._marks[self.find(ids)] |= mark

    def _marked(self, ids: Ids, mark: int) -> Mask:
        found: Mask = self._marks[self.find(ids)] & mark != 0
        return found

    produce = partialmethod(_mark, mark=_PRODUCED)
    order = partialmethod(_mark, mark=_ORDERED)
    pinned = partialmethod(_marked, mark=_PINNED)  # for each id; so are those below
    produced = partialmethod(_marked, mark=_PRODUCED)
    ordered = partialmethod(_marked, mark=_ORDERED)

    def untouched(self) -> Mask:
        """Tell of each id whether nothing has merged or marked it."""
        roots = self.find(np.arange(len(self)))
        found: Mask = (np.bincount(roots, minlength=len(roots))[roots] == 1) & (self._marks[roots] == 0)
        return found

    def roots(self, *axes: Ids) -> set[int]:
        """Return the classes of the units on these axes."""
        return {root for ids in axes for root in self.find(ids).tolist()}

    def reason(self, ids: Ids) -> str:
        """Return why some of `ids` are pinned."""
        roots = self.roots(ids)
        reasons = (reason for pinned, reason in self.reasons if roots & self.roots(pinned))
        return next(reasons, "merged with an axis that stays full")

    def groups(self) -> list[Ids]:
        """Return the roots of each channel group: classes that have the same roles, by sums of a random number each."""
        signature = np.zeros(len(self), np.uint64)
        draw = np.random.default_rng(0).integers(0, 2**64, len(self.roles), np.uint64)
        for role, ids in zip(draw, self.roles, strict=True):
            np.add.at(signature, self.find(ids), role)
        roots = np.unique(self.find(np.arange(len(self))))
        slim = roots[self.produced(roots) & ~self.pinned(roots)]
        _, first, group = np.unique(signature[slim], return_index=True, return_inverse=True)
        return [slim[group == number] for number in np.argsort(first)]


def spread(ids: Ids, before: int, after: int) -> Ids:
    """Return the labels of a flattened (before, len(ids), after) block in which only the middle axis is labelled."""
    return np.tile(np.repeat(ids, after), before)
