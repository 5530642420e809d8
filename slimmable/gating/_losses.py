"""Losses that keep a gated network to its budget: on its multiply-adds, and on how many units each gate opens."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimmable._checks import check_not_negative, number_or_nan
from slimmable._distributed import gather
from slimmable.errors import DataError, UsageError
from slimmable.gating._passes import GatedPass


def annealed(
    epoch: float, *, start: float = 1.0, end: float = 0.0, alpha: float = 0.02, first_epoch: float = 0
) -> float:
    """Return `end + (start - end) exp(-alpha (epoch - first_epoch))`, which decays from `start` towards `end`.

    Before `first_epoch` it is `start`. With the defaults it is `p` of the bound loss (Krishna et al. 2023).

    Raises: UsageError: if the epoch is not a number.

    >>> annealed(0), round(annealed(50), 4), round(annealed(50, first_epoch=10), 4)
    (1.0, 0.3679, 0.4493)
    """
    if math.isnan(number_or_nan(epoch)):
        raise UsageError(f"annealed: epoch must be a number, got {epoch!r}")
    return end + (start - end) * math.exp(-alpha * max(0.0, epoch - first_epoch))


def budget_loss(share: Tensor, budget: float, weight: float = 5.0) -> Tensor:
    """Return `weight * (mean share - budget)^2` (Krishna et al. 2023, computational budget).

    Args:
        share: multiply-adds of each image, as a share of the dense network's; any shape.
        budget: the target mean, in (0, 1).
        weight: the paper's lambda.

    Raises: UsageError: if the budget is outside (0, 1).

    >>> budget_loss(torch.tensor([0.4, 0.6]), budget=0.3)
    tensor(0.2000)
    """
    check_budget("budget_loss", budget)
    return weight * (share.mean() - budget) ** 2


def bound_loss(open_fractions: Tensor, budget: float, p: float, weight: float = 1.0) -> Tensor:
    """Return the penalty on gates that open less than `p s` or more than `1 - p + p s` of their units.

    `s` is the square root of the budget, since the cost of a layer is proportional to the product of its open inputs
    and outputs. As `p` goes from 1 to 0 the bounds widen, so no gate closes or opens for good early on (Krishna et al.
    2023, bound loss).

    Args:
        open_fractions: of shape (gates,), from the function `open_fractions`.
        budget: the target share of the dense network's multiply-adds, in (0, 1).
        p: tightness of the bounds, in [0, 1]; see `annealed`.
        weight: the paper's gamma.

    Raises: UsageError: if `budget` or `p` is out of range. DataError: if there is no gate.

    >>> bound_loss(torch.tensor([0.1, 0.5, 1.0]), budget=0.25, p=1.0)
    tensor(0.1367)
    """
    check_budget("bound_loss", budget)
    if not 0 <= number_or_nan(p) <= 1:
        raise UsageError(f"bound_loss: p, the tightness of the bounds, must be in [0, 1], got {p!r}")
    if open_fractions.ndim != 1 or not len(open_fractions):
        raise DataError(f"bound_loss: expected one number per gate, shape (gates,), got {tuple(open_fractions.shape)}")
    root = math.sqrt(budget)
    below = torch.relu(p * root - open_fractions)
    above = torch.relu(open_fractions - (1 - p + p * root))
    return weight * (below.square().mean() + above.square().mean())


def open_fractions(masks: Iterable[Tensor], *, closed_gradient: bool = True) -> Tensor:
    """Return the fraction of units that each gate opens, averaged over the images: shape (gates,).

    Args:
        masks: one of shape (images, units) per gate, zeros and ones.
        closed_gradient: if False, use the L1 norm of the masks, as published. Its gradient is zero at closed units, so
            a loss on it can close units but not open them.

    Raises: DataError: if there is no mask.

    >>> open_fractions([torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.zeros(2, 4)])
    tensor([0.7500, 0.0000])
    """
    found = [mask.mean() if closed_gradient else mask.abs().mean() for mask in masks]
    if not found:
        raise DataError("open_fractions: there is no mask; run the model in a gated pass first")
    return torch.stack(found)


class GateBudget(nn.Module):
    """Sum of the budget loss and the bound loss of a gated pass; the bounds widen over the epochs.

    With several processes both losses are those of the joined batch, in every process; average the gradients, as
    DistributedDataParallel and `slimmable.training.average_gradients` do.

    `reached` is the mean share of multiply-adds of the last batch, without gradient; None at first.

    Source: Krishna et al. 2023; the defaults are theirs.

    Args:
        budget: target multiply-adds of the gated network, including the gates, as a share of the dense network's; in
            (0, 1).
        budget_weight: weight of the budget loss, the paper's lambda.
        bound_weight: weight of the bound loss, the paper's gamma.
        alpha: how fast the bounds widen, see `annealed`.
        first_epoch: when they begin to widen.
        closed_gradient: as in `open_fractions`.

    Raises: UsageError: if the budget is outside (0, 1), or another number is negative.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> criterion = GateBudget(0.5)
    >>> with slimmable.gating.gated(model) as run:
    ...     scores = model(torch.randn(8, 4))
    >>> criterion(run, epoch=3).shape
    torch.Size([])
    """

    def __init__(
        self,
        budget: float,
        *,
        budget_weight: float = 5.0,
        bound_weight: float = 1.0,
        alpha: float = 0.02,
        first_epoch: float = 0,
        closed_gradient: bool = True,
    ) -> None:
        super().__init__()
        check_budget("GateBudget", budget)
        weights = {"budget_weight": budget_weight, "bound_weight": bound_weight}
        check_not_negative("GateBudget", **weights, alpha=alpha, first_epoch=first_epoch)
        self.budget, self.budget_weight, self.bound_weight = budget, budget_weight, bound_weight
        self.alpha, self.first_epoch, self.closed_gradient = alpha, first_epoch, closed_gradient
        self.reached: Tensor | None = None

    def forward(self, run: GatedPass, epoch: float) -> Tensor:
        """Return the sum of both losses for a gated pass, a scalar.

        Raises: UsageError: if `run` is not a gated pass, or `epoch` is not a number.
        """
        if not isinstance(run, GatedPass):
            raise UsageError(f"GateBudget: expected the run of `with gated(model) as run`, got {type(run).__name__}")
        p = annealed(epoch, alpha=self.alpha, first_epoch=self.first_epoch)
        own = open_fractions(run.masks().values(), closed_gradient=self.closed_gradient)
        share = gather(run.share())
        self.reached = share.detach().mean()
        bound = bound_loss(gather(own[None]).mean(0), self.budget, p, self.bound_weight)
        return budget_loss(share, self.budget, self.budget_weight) + bound

    def extra_repr(self) -> str:
        """Return the settings, as in the constructor."""
        weights = f"budget_weight={self.budget_weight}, bound_weight={self.bound_weight}"
        return f"budget={self.budget}, {weights}, alpha={self.alpha}"


def check_budget(where: str, budget: object) -> None:
    """Raise `UsageError` for a budget outside (0, 1)."""
    if not 0 < number_or_nan(budget) < 1:
        raise UsageError(
            f"{where}: budget is a share of the dense network's multiply-adds and must be in (0, 1), got {budget!r}"
        )
