"""The units of an axis that each width keeps: the first ones, those within groups, or disjoint ranges."""

from __future__ import annotations

from collections.abc import Sequence

from slimmable._widths import Kept, kept_units
from slimmable.errors import WidthError

Ranges = list[range]
"""The units kept at each width, the widest first."""


def first_units(units: int, widths: Sequence[float]) -> Ranges:
    """Return the first units for each width.

    >>> first_units(8, (1.0, 0.5))
    [range(0, 8), range(0, 4)]
    """
    return [range(kept_units(units, width)) for width in widths]


def disjoint_units(units: int, widths: Sequence[float]) -> Ranges:
    """Return disjoint ranges for the narrower widths, the first one for the narrowest.

    Raises: WidthError: if the narrower widths together need more units than there are.

    >>> disjoint_units(16, (1.0, 0.75, 0.25))
    [range(0, 16), range(4, 16), range(0, 4)]
    """
    counts = [len(kept) for kept in first_units(units, widths)]
    if sum(widths[1:]) > 1 + 1e-9 or sum(counts[1:]) > units:
        raise WidthError(
            f"overlap=False needs disjoint units for the narrower widths, but those of {tuple(widths)} keep "
            f"{counts[1:]} of {units} units; choose narrower widths with a sum of at most 1"
        )
    ends = [sum(counts[index:]) for index in range(1, len(counts))]
    return [range(units), *(range(end - count, end) for end, count in zip(ends, counts[1:], strict=True))]


def ranges_of(units: int, widths: Sequence[float], *, slim: bool, overlap: bool) -> Ranges:
    """Return what each width keeps of an axis or of one group on it: everything unless `slim`."""
    if not slim:
        return [range(units)] * len(widths)
    return first_units(units, widths) if overlap else disjoint_units(units, widths)


def in_groups(ranges: Ranges, size: int, groups: int) -> list[Kept]:
    """Repeat what is kept of one group of `size` units in each of `groups` groups.

    >>> in_groups([range(0, 3), range(0, 2)], 3, 2)
    [None, (0, 1, 3, 4)]
    """
    return [
        None if len(kept) == size else tuple(group * size + unit for group in range(groups) for unit in kept)
        for kept in ranges
    ]
