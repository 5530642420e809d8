"""Widths: check a list of them, find one in it, count the units that one keeps."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from numbers import Real
from typing import Any, TypeAlias

from slimmable.errors import WidthError

ROUNDINGS = ("nearest", "floor")
Kept: TypeAlias = "int | tuple[int, ...] | None"  # units of an axis at a width: the first k, these (ascending), or all


def check_widths(widths: Iterable[float]) -> tuple[float, ...]:
    """Return `widths`, distinct numbers in (0, 1] with 1.0 among them, as floats from the widest to the narrowest."""
    if isinstance(widths, (str, bytes)) or not isinstance(widths, Iterable):
        raise WidthError(f"widths must be a sequence of numbers such as (1.0, 0.5, 0.25), got {widths!r}")
    given: list[Any] = list(widths)
    for width in given:
        if isinstance(width, bool) or not isinstance(width, Real) or not 0 < width <= 1:  # type: ignore[operator]
            raise WidthError(f"width {width!r} in {given} is not in (0, 1]; a width is a share of the full network")
    found = sorted(map(float, given), reverse=True)
    if len(set(found)) < len(found):
        raise WidthError(f"a width appears twice in {given}")
    if 1.0 not in found:
        raise WidthError(f"the full width 1.0 is missing from {given}; add it, as in {(1.0, *given)}")
    return tuple(found)


def width_index(width: float, widths: Sequence[float]) -> int:
    """Return the position of `width` in `widths`; if it is not among them, the `WidthError` names the nearest."""
    asked: Any = width
    if isinstance(asked, bool) or not isinstance(asked, Real) or math.isnan(asked):
        raise WidthError(f"width {width!r} is not a number; this model's widths are {tuple(widths)}")
    if width in widths:
        return widths.index(width)
    nearest = min(widths, key=lambda known: abs(known - width))
    what = f"width {width} is not one of this model's widths {tuple(widths)}. Nearest is {nearest}"
    raise WidthError(f"{what}. For others, build or convert the model with widths=")


def kept_of(size: int, kept: Kept) -> int:
    """Return how many units of an axis of this size are kept."""
    return size if kept is None else kept if isinstance(kept, int) else len(kept)


def kept_units(units: int, width: float, round_to: int = 1, rounding: str = "nearest") -> int:
    """Return how many of `units` are kept at `width`: a multiple of `round_to`, the nearest or the floor; not none."""
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
