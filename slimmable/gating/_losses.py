"""Losses that hold a gated network at its budget: on what it costs, and on how many units each gate opens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from slimmable._checks import check_not_negative, number_or_nan
from slimmable._distributed import gather
from slimmable.errors import DataError, UsageError
from slimmable.gating._gate import annealed


@runtime_checkable
class Pass(Protocol):
    """What `GateBudget` needs of a gated pass; `gated(model)` gives one."""

    def share(self) -> Tensor:
        """Return the multiply-adds of each image over those of the dense network."""

    def masks(self) -> dict[str, Tensor]:
        """Return the mask of each gate, by name."""


def budget_loss(share: Tensor, target: float, weight: float = 5.0) -> Tensor:
    """Return `weight * (mean share - target)^2` (Krishna et al. 2023, computational budget).

    Args:
        share: of any shape, multiply-adds of the gated network over those of the dense one, of each image.
        target: the wanted mean, in (0, 1).
        weight: lambda of the paper.

    Raises: UsageError: if the target is outside (0, 1).

    >>> budget_loss(torch.tensor([0.4, 0.6]), target=0.3)
    tensor(0.2000)
    """
    check_target("budget_loss", target)
    return weight * (share.mean() - target) ** 2


def bound_loss(open_share: Tensor, target: float, p: float, weight: float = 1.0) -> Tensor:
    """Return the penalty on gates that open fewer than `p s` or more than `1 - p + p s` of their units.

    `s` is the square root of the target: units closed in both layers around them save twice. With `p` going from 1 to 0
    the bounds are tight at first, so no gate closes or opens for good early on (Krishna et al. 2023, bound loss).

    Args:
        open_share: of shape (gates,), the share of units that each gate opens; see `open_shares`.
        target: the share of multiply-adds, in (0, 1).
        p: tightness of the bounds in [0, 1]; see `annealed`.
        weight: gamma of the paper.

    Raises: UsageError: if target or p are outside their ranges. DataError: if there is no gate.

    >>> bound_loss(torch.tensor([0.1, 0.5, 1.0]), target=0.25, p=1.0)
    tensor(0.1367)
    """
    check_target("bound_loss", target)
    if not 0 <= number_or_nan(p) <= 1:
        raise UsageError(f"bound_loss: p is how tight the bounds are and must be in [0, 1], got {p!r}")
    if open_share.ndim != 1 or not len(open_share):
        raise DataError(f"bound_loss: expected one share per gate, shape (gates,), got {tuple(open_share.shape)}")
    root = math.sqrt(target)
    below = torch.relu(p * root - open_share)
    above = torch.relu(open_share - (1 - p + p * root))
    return weight * (below.square().mean() + above.square().mean())


def open_shares(masks: Iterable[Tensor], *, closed_gradient: bool = True) -> Tensor:
    """Return the share of units that each gate opens, averaged over the batch, of shape (gates,).

    Args:
        masks: one of shape (batch, units) per gate, of zeros and ones.
        closed_gradient: False takes the L1 norm of the masks, as published, whose gradient at closed units is zero, so
            that a loss on it closes units and cannot open them.

    Raises: DataError: if there is no mask.

    >>> open_shares([torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.zeros(2, 4)])
    tensor([0.7500, 0.0000])
    """
    found = [mask.mean() if closed_gradient else mask.abs().mean() for mask in masks]
    if not found:
        raise DataError("open_shares: there is no mask; run the model in a gated pass first")
    return torch.stack(found)


class GateBudget(nn.Module):
    """Budget loss and bound loss of a gated pass, `p` of the latter annealed over the epochs.

    With several processes both are those of the joined batch, as every process sees it; average the gradients, as
    DistributedDataParallel and `slimmable.training.average_gradients` do.

    `reached` is the mean share of multiply-adds of the last batch, without gradient; None before.

    Source: Krishna et al. 2023; the defaults are theirs.

    Args:
        target: wanted multiply-adds of the gated network, the gates' own included, over the dense one's; in (0, 1).
        budget_weight: weight of the budget loss, lambda of the paper.
        bound_weight: weight of the bound loss, gamma of the paper.
        alpha: how fast the bounds widen, see `annealed`.
        first_epoch: from which on they do.
        closed_gradient: as in `open_shares`.

    Raises: UsageError: if the target is outside (0, 1), or another number is below 0.

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
        target: float,
        *,
        budget_weight: float = 5.0,
        bound_weight: float = 1.0,
        alpha: float = 0.02,
        first_epoch: float = 0,
        closed_gradient: bool = True,
    ) -> None:
        super().__init__()
        check_target("GateBudget", target)
        weights = {"budget_weight": budget_weight, "bound_weight": bound_weight}
        check_not_negative("GateBudget", **weights, alpha=alpha, first_epoch=first_epoch)
        self.target, self.budget_weight, self.bound_weight = target, budget_weight, bound_weight
        self.alpha, self.first_epoch, self.closed_gradient = alpha, first_epoch, closed_gradient
        self.reached: Tensor | None = None

    def forward(self, run: Pass, epoch: float) -> Tensor:
        """Return the sum of both losses for the images of a gated pass, a scalar.

        Raises: UsageError: if `run` is no gated pass, or `epoch` no number.
        """
        if not isinstance(run, Pass):
            raise UsageError(f"GateBudget: give it what `with gated(model) as run` gives, got {type(run).__name__}")
        p = annealed(epoch, alpha=self.alpha, first_epoch=self.first_epoch)
        opened = gather(open_shares(run.masks().values(), closed_gradient=self.closed_gradient)[None]).mean(0)
        share = gather(run.share())
        self.reached = share.detach().mean()
        budget = budget_loss(share, self.target, self.budget_weight)
        return budget + bound_loss(opened, self.target, p, self.bound_weight)

    def extra_repr(self) -> str:
        """Return the settings, as in the constructor."""
        weights = f"budget_weight={self.budget_weight}, bound_weight={self.bound_weight}"
        return f"target={self.target}, {weights}, alpha={self.alpha}"


def check_target(where: str, target: float, name: str = "target") -> None:
    """Refuse a share of multiply-adds outside (0, 1).

    Raises: UsageError.
    """
    if not 0 < number_or_nan(target) < 1:
        raise UsageError(
            f"{where}: {name} is the share of the dense network's multiply-adds and must be in (0, 1), got {target!r}"
        )
