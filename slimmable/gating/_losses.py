"""The losses that keep a gated network to its budget."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimmable._checks import check_floats, check_not_negative, checked
from slimmable._distributed import gather
from slimmable.errors import DataError, UsageError
from slimmable.gating._passes import GatedPass


@checked
def annealed(
    epoch: float, *, start: float = 1.0, end: float = 0.0, alpha: float = 0.02, first_epoch: float = 0
) -> float:
    """Return `end + (start - end) exp(-alpha (epoch - first_epoch))`, and `start` before `first_epoch`.

    With the defaults it is `p` of the bound loss (Krishna et al. 2023).

    >>> annealed(0), round(annealed(50), 4), round(annealed(50, first_epoch=10), 4)
    (1.0, 0.3679, 0.4493)
    """
    return end + (start - end) * math.exp(-alpha * max(0.0, epoch - first_epoch))


@checked
def budget_loss(share: Tensor, budget: float, weight: float = 5.0) -> Tensor:
    """Return `weight * (mean share - budget)^2`, with a budget in (0, 1) and weight lambda of Krishna et al. 2023.

    `share` has the multiply-adds of images as shares of the dense network's.

    >>> budget_loss(torch.tensor([0.4, 0.6]), budget=0.3)
    tensor(0.2000)
    """
    check_not_negative("budget_loss", weight=weight)
    check_floats("budget_loss", share=share)
    return weight * (share.mean() - budget) ** 2


@checked
def bound_loss(open_fractions: Tensor, budget: float, p: float, weight: float = 1.0) -> Tensor:
    """Return the penalty on gates that open less than `p s` or more than `1 - p + p s` of their units.

    `s` is the square root of the budget, as a layer's cost is proportional to its open inputs times its open outputs.
    As `p` goes from 1 to 0 (see `annealed`), the bounds widen, so no gate closes or opens for good early on.
    `open_fractions` has shape (gates,), as from the function. Source: Krishna et al. 2023; `weight` is their gamma.

    >>> bound_loss(torch.tensor([0.1, 0.5, 1.0]), budget=0.25, p=1.0)
    tensor(0.1367)
    """
    check_not_negative("bound_loss", weight=weight)
    check_floats("bound_loss", open_fractions=open_fractions)
    if open_fractions.ndim != 1:
        raise DataError(f"bound_loss: expected one number per gate, shape (gates,), got {tuple(open_fractions.shape)}")
    least = p * math.sqrt(budget)
    below, above = torch.relu(least - open_fractions), torch.relu(open_fractions - (1 - p + least))
    return weight * (below.square().mean() + above.square().mean())


@checked
def open_fractions(masks: Iterable[Tensor], *, closed_gradient: bool = True) -> Tensor:
    """Return the fraction of units that each gate opens, averaged over the images: shape (gates,).

    `masks` holds one of shape (images, units) per gate; DataError if there is none. Without `closed_gradient` this is
    the L1 norm of the masks, as published, whose gradient opens no closed units.

    >>> open_fractions([torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.zeros(2, 4)])
    tensor([0.7500, 0.0000])
    """
    masks = list(masks)
    if not masks:
        raise DataError("open_fractions: there is no mask; run the model in a gated pass first")
    check_floats("open_fractions", **{f"masks[{at}]": mask for at, mask in enumerate(masks)})
    return torch.stack([mask.mean() if closed_gradient else mask.abs().mean() for mask in masks])


class GateBudget(nn.Module):
    """Sum of `budget_loss` and `bound_loss` of a gated pass, whose bounds widen by epoch as `annealed` says.

    With several processes the losses are those of the joined batch; average the gradients. `reached` is the mean share
    of multiply-adds of the last batch, without gradient, None at first, and `reached_at` maps each width to its last.
    The budget is a share of the dense network's, in (0, 1), including the gates. Source: Krishna et al. 2023.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> criterion = GateBudget(0.5)
    >>> with slimmable.gating.gated(model) as run:
    ...     scores = model(torch.randn(8, 4))
    >>> criterion(run, epoch=3).shape
    torch.Size([])
    """

    @checked
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
        self.budget, self.budget_weight, self.bound_weight = budget, budget_weight, bound_weight
        self.alpha, self.first_epoch, self.closed_gradient = alpha, first_epoch, closed_gradient
        self.reached: Tensor | None = None
        self.reached_at: dict[float, Tensor] = {}

    def forward(self, run: GatedPass, epoch: float) -> Tensor:
        """Return the sum of both losses, a scalar; raise UsageError if `run` is no gated pass or `epoch` no number."""
        if not isinstance(run, GatedPass):
            raise UsageError(f"GateBudget: expected the run of `with gated(model) as run`, got {type(run).__name__}")
        p = annealed(epoch, alpha=self.alpha, first_epoch=self.first_epoch)
        own = open_fractions(run.masks().values(), closed_gradient=self.closed_gradient)
        share = gather(run.share())
        width = next(iter(run._records)).widths[run._width_index()]
        self.reached = self.reached_at[width] = share.detach().mean()
        bound = bound_loss(gather(own[None]).mean(0), self.budget, p, self.bound_weight)
        return budget_loss(share, self.budget, self.budget_weight) + bound
