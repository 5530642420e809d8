"""How much each width's loss counts: the published re-weightings, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slimmable._widths import check_widths
from slimmable.errors import UsageError, WidthError


def _widest_plus(widths: Sequence[float], extra: float) -> list[float]:
    return [1 + extra if width == max(widths) else 1.0 for width in widths]


def _narrower_sums(widths: Sequence[float]) -> list[float]:
    sums = [1 + sum(other for other in widths if other < width) for width in widths]
    return [len(widths) * value / sum(sums) for value in sums]


def _widest_plus_second(widths: Sequence[float]) -> list[float]:
    if len(widths) < 2:
        raise WidthError(f"mode 'widest_plus_second' needs at least two widths, got {list(widths)}")
    return _widest_plus(widths, sorted(widths)[-2])


_MODES: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "ones": lambda widths: [1.0] * len(widths),
    "share": lambda widths: [width / sum(widths) for width in widths],
    "width": lambda widths: list(widths),
    "scaled_share": lambda widths: [len(widths) * width / sum(widths) for width in widths],
    "widest_plus_rest": lambda widths: _widest_plus(widths, sum(widths) - max(widths)),
    "narrower_sums": _narrower_sums,
    "widest_plus_second": _widest_plus_second,
}


def width_weights(widths: Sequence[float], mode: str = "widest_plus_rest") -> tuple[float, ...]:
    """Return the weight `k` of each width's loss, in the order of `widths`.

    | mode | weight of width w | number in the published code |
    |---|---|---|
    | `ones` | 1 | 0 |
    | `share` | w over the sum of all widths | 1 |
    | `width` | w | 2 |
    | `scaled_share` | number of widths times `share` | 3 |
    | `widest_plus_rest` | widest: 1 + sum of the other widths; others: 1 (the paper's choice) | 5 |
    | `narrower_sums` | 1 + sum of the narrower widths, scaled to sum to the number of widths | 6 |
    | `widest_plus_second` | widest: 1 + second widest; others: 1 | 7 |

    From SlimCLR (Zhao et al. 2024, "loss re-weighting"); nothing is rounded, the published code rounds 1, 3 and 6 to
    three decimals.

    Raises: WidthError: if `widths` cannot be used, or is too short for the mode. UsageError: if the mode is unknown.

    >>> width_weights((1.0, 0.75, 0.5, 0.25))
    (2.5, 1.0, 1.0, 1.0)
    """
    check_widths(widths)
    if not isinstance(mode, str) or mode not in _MODES:
        raise UsageError(f"unknown mode {mode!r} of width weights; there are {', '.join(_MODES)}")
    return tuple(float(weight) for weight in _MODES[mode](list(widths)))
