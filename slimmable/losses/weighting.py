"""The total loss over all widths, as in SlimCLR, and the published loss weights by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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

    From SlimCLR (Zhao et al. 2024, "loss re-weighting"). Nothing is rounded here; the published code rounds modes 1, 3
    and 6 to three decimals.

    Raises: WidthError: if `widths` is invalid, or too short for the mode. UsageError: if the mode is unknown.

    >>> width_weights((1.0, 0.75, 0.5, 0.25))
    (2.5, 1.0, 1.0, 1.0)
    """
    check_widths(widths)
    if not isinstance(mode, str) or mode not in _MODES:
        raise UsageError(f"unknown mode {mode!r} of width weights; choose one of {', '.join(_MODES)}")
    return tuple(float(weight) for weight in _MODES[mode](list(widths)))


def slim_term(
    loss: Tensor, distillation: Tensor | None = None, weight: float = 1.0, distill_weight: float = 0.5
) -> Tensor:
    """Return one width's part of the step's loss, `k ((1 - a) C + a A)`, or `k C` without distillation.

    `C` is `loss`, `A` is `distillation`, `k` is `weight` and `a` is `distill_weight`.

    >>> slim_term(torch.tensor(2.0), torch.tensor(4.0), weight=10.0, distill_weight=0.25)
    tensor(25.)
    """
    if distillation is None:
        return weight * loss
    return weight * ((1 - distill_weight) * loss + distill_weight * distillation)


def slim_loss(
    losses: Sequence[Tensor],
    distillations: Sequence[Tensor] = (),
    weights: Sequence[float] | None = None,
    distill_weight: float = 0.5,
) -> Tensor:
    """Return the loss of SlimCLR, `k_1 C_1 + sum of k_w ((1 - a) C_w + a A_w)` (Zhao et al. 2024).

    The gradient is the sum of the terms' gradients, so a training loop need not hold all widths' graphs at once:
    `SlimRecipe` calls `backward` term by term.

    Args:
        losses: the scalar `C_w` of each width, from the widest down; during the slow start only the widest's.
        distillations: the scalar `A_w` of each width except the widest, or none, which sets a = 0.
        weights: the `k_w`, as from `width_weights`, or None for 1 everywhere.
        distill_weight: `a`, in [0, 1].

    Raises: UsageError: if the numbers of losses and weights do not match.

    >>> c, a = [torch.tensor(3.0), torch.tensor(5.0)], [torch.tensor(7.0)]
    >>> slim_loss(c, a, weights=(1.5, 1.0))  # 1.5 * 3 + (5 + 7) / 2
    tensor(10.5000)
    """
    widths = len(losses)
    if not widths:
        raise UsageError("slim_loss: losses is empty; give at least the loss of the widest width")
    if len(distillations) not in (0, widths - 1):
        raise UsageError(
            f"slim_loss: {widths} losses and {len(distillations)} distillation losses; "
            f"give {widths - 1}, one per width except the widest, or none"
        )
    if weights is not None and len(weights) != widths:
        raise UsageError(f"slim_loss: {widths} losses and {len(weights)} weights; give one weight for each")
    taught: list[Tensor | None] = [None, *distillations] if len(distillations) else [None] * widths
    terms = zip(losses, taught, [1.0] * widths if weights is None else weights, strict=True)
    return torch.stack([slim_term(loss, a, weight, distill_weight) for loss, a, weight in terms]).sum()
