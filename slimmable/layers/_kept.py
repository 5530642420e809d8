"""The units of an axis that each width keeps: the first ones, those within groups, or disjoint ranges."""

from __future__ import annotations

from collections.abc import Sequence

from slimmable._widths import Kept, kept_units
from slimmable.errors import WidthError


def disjoint_units(units: int, widths: Sequence[float]) -> list[range]:
    """Return disjoint ranges for the narrower widths, the first one for the narrowest.

    Raises: WidthError: if the narrower widths together need more units than there are.

    >>> disjoint_units(16, (1.0, 0.75, 0.25))
    [range(0, 16), range(4, 16), range(0, 4)]
    """
    counts = [kept_units(units, width) for width in widths]
    if sum(widths[1:]) > 1 + 1e-9 or sum(counts[1:]) > units:
        raise WidthError(
            f"overlap=False needs disjoint units for the narrower widths, but those of {tuple(widths)} keep "
            f"{counts[1:]} of {units} units; choose narrower widths with a sum of at most 1"
        )
    ends = [sum(counts[index:]) for index in range(1, len(counts))]
    return [range(units), *(range(end - count, end) for end, count in zip(ends, counts[1:], strict=True))]


def kept_at(
    widths: Sequence[float], size: int, groups: int = 1, *, slim: bool = True, overlap: bool = True
) -> list[Kept]:
    """Return what each width keeps of an axis of groups of `size` units, the same of each: everything unless `slim`.

    >>> kept_at((1.0, 0.67), 3, groups=2)
    [None, (0, 1, 3, 4)]
    """
    if not slim:
        return [None] * len(widths)
    ranges = [range(kept_units(size, width)) for width in widths] if overlap else disjoint_units(size, widths)
    return [
        None if len(kept) == size else tuple(group * size + unit for group in range(groups) for unit in kept)
        for kept in ranges
    ]
