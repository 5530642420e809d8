"""Means with 95 % intervals, as tables show them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.stats import t


def interval(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean, by Student's distribution; 0 for one value."""
    if len(values) < 2:
        return 0.0
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def shown(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Return the mean with its interval, which one value does not have."""
    if not values:
        return ""
    mean = f"{fmean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {interval(values):.{digits}f}"
