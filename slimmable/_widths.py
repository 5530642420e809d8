"""Widths: check a list of them, find one in it, count the units that one keeps."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from numbers import Real
from typing import Any, TypeAlias

from slimmable.errors import WidthError

WIDTHS = (1.0, 0.75, 0.5, 0.25)  # by default
ROUNDINGS = ("nearest", "floor")
Kept: TypeAlias = "int | tuple[int, ...] | None"  # units of an axis at a width: the first k, these (ascending), or all


def number_or_nan(value: object) -> float:
    """Return `value` as a float, or NaN, which is in no range, if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf  # or minus infinity, which is in no range either


def check_widths(widths: Iterable[float]) -> tuple[float, ...]:
    """Return `widths`, distinct numbers in (0, 1] with 1.0 among them, as floats from the widest to the narrowest."""
    if isinstance(widths, (str, bytes)) or not isinstance(widths, Iterable):
        raise WidthError(f"widths must be a sequence of numbers such as (1.0, 0.5, 0.25), got {widths!r}")
    given: list[Any] = list(widths)
    for width in given:
        if not 0 < number_or_nan(width) <= 1:
            what = f"width {width!r:.80} in {given!r:.200} is not in (0, 1]"
            raise WidthError(f"{what}; a width is a share of the full network")
    found = sorted(map(float, given), reverse=True)
    if len(set(found)) < len(found):
        raise WidthError(f"a width appears twice in {given}")
    if 1.0 not in found:
        raise WidthError(f"the full width 1.0 is missing from {given}; add it, as in {(1.0, *given)}")
    return tuple(found)


def width_index(width: float, widths: Sequence[float]) -> int:
    """Return the position of `width` in `widths`; if it is not among them, the `WidthError` names the nearest."""
    if math.isnan(number_or_nan(width)):
        raise WidthError(f"width {width!r} is not a number; this model's widths are {tuple(widths)}")
    if width in widths:
        return widths.index(width)
    nearest = min(widths, key=lambda known: abs(known - width))
    way = f"A width is a share: {width / 100:g}?" if width > 1 else "For others, build or convert with widths="
    raise WidthError(f"width {width} is not one of this model's widths {tuple(widths)}. Nearest is {nearest}. {way}")


def kept_of(size: int, kept: Kept) -> int:
    """Return how many units of an axis of this size are kept."""
    return size if kept is None else kept if isinstance(kept, int) else len(kept)


def kept_units(units: int, width: float, round_to: int = 1, rounding: str = "nearest") -> int:
    """Return how many of `units` are kept at `width`: a multiple of `round_to`, the nearest or the floor, never 0."""
    if width == 1:
        return units
    share = units * width / round_to
    return min(units, max(round_to, (int(share) if rounding == "floor" else round(share)) * round_to))


def disjoint_starts(widths: Sequence[float], counts: Sequence[int], where: str = "") -> list[int]:
    """Return the first unit of each width, where narrower ones keep disjoint units, the narrowest the first ones."""
    *starts, total = accumulate(reversed(counts[1:]), initial=0)
    if total > counts[0] or sum(widths[1:]) > 1 + 1e-9:
        what = f"those of {tuple(widths)} below 1 keep {list(counts[1:])} of {counts[0]} units{where}"
        raise WidthError(f"overlap=False needs disjoint units, but {what}; choose narrower ones, of a sum of at most 1")
    return [0, *reversed(starts)]
