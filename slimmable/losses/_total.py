"""The loss of a training step over all widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slimmable.errors import UsageError


def slim_term(
    contrastive: torch.Tensor,
    distillation: torch.Tensor | None = None,
    weight: float = 1.0,
    distill_weight: float = 0.5,
) -> torch.Tensor:
    """Return one width's part `k ((1 - a) C + a A)` of the step's loss; `k C` without distillation.

    >>> slim_term(torch.tensor(2.0), torch.tensor(4.0), weight=10.0, distill_weight=0.25)
    tensor(25.)
    """
    if distillation is None:
        return weight * contrastive
    return weight * ((1 - distill_weight) * contrastive + distill_weight * distillation)


def slim_loss(
    contrastive: Sequence[torch.Tensor],
    distillation: Sequence[torch.Tensor] = (),
    weights: Sequence[float] | None = None,
    distill_weight: float = 0.5,
) -> torch.Tensor:
    """Return the loss of SlimCLR, `k_1 C_1 + sum of k_w ((1 - a) C_w + a A_w)` (Zhao et al. 2024).

    `contrastive` holds the scalar `C_w` of each width from the widest on, `distillation` the `A_w` of each but the
    widest (or nothing: then a = 0), `weights` the `k_w` as from `width_weights` (or None: all 1). During the slow start
    it is called with the widest width's loss alone.

    The gradient is the sum of the gradients of the terms, so a training loop need not hold all widths' graphs at once;
    `SlimRecipe` calls backward term by term.

    Raises: UsageError: if the numbers of terms and weights do not fit.

    >>> c, a = [torch.tensor(3.0), torch.tensor(5.0)], [torch.tensor(7.0)]
    >>> slim_loss(c, a, weights=(1.5, 1.0))  # 1.5 * 3 + (5 + 7) / 2
    tensor(10.5000)
    """
    widths = len(contrastive)
    if not widths:
        raise UsageError("slim_loss: contrastive is empty; give at least the widest width's loss")
    if len(distillation) not in (0, widths - 1):
        raise UsageError(
            f"slim_loss: {widths} contrastive and {len(distillation)} distillation losses; "
            f"give {widths - 1}, one per width but the widest, or none"
        )
    if weights is not None and len(weights) != widths:
        raise UsageError(f"slim_loss: {widths} contrastive losses and {len(weights)} weights; give one weight for each")
    taught: list[torch.Tensor | None] = [None, *distillation] if len(distillation) else [None] * widths
    terms = zip(contrastive, taught, [1.0] * widths if weights is None else weights, strict=True)
    return torch.stack([slim_term(loss, a, weight, distill_weight) for loss, a, weight in terms]).sum()
