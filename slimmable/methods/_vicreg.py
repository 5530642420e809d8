"""VICReg: invariance, variance and covariance of two views' embeddings."""

from __future__ import annotations

import math

from torch import nn

from slimmable.losses import OnlineDistillation, vicreg
from slimmable.losses._vicreg import check_factors
from slimmable.methods._batch import Batch, Outcome
from slimmable.methods._method import Method
from slimmable.training.distributed import gather


class VICReg(Method):
    """VICReg (Bardes, Ponce, LeCun, ICLR 2022), at every width.

    VICReg has no logits. Narrow widths learn the full width's embeddings by VICReg's own invariance term.

    Args:
        encoder: an `Encoder`, converted.
        invariance, variance, covariance: factors of the three terms, as in `slimmable.losses.vicreg`.

    Raises: UsageError: if a factor is negative.

    >>> import torch, slimmable
    >>> from slimmable.methods import Batch, Encoder
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = Encoder(backbone, VICReg.projector(8, 16, 16))
    >>> method = VICReg(slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2)))
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation())
    >>> losses = method.step(recipe, Batch([torch.rand(8, 1, 2, 2), torch.rand(8, 1, 2, 2)]), progress=0.7)
    >>> list(losses)
    [1.0, 0.5]
    """

    def __init__(
        self, encoder: nn.Module, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
    ) -> None:
        super().__init__(encoder)
        check_factors("VICReg", invariance, variance, covariance)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    @staticmethod
    def projector(features: int, hidden: int, dim: int) -> nn.Sequential:
        """Return the expander, three layers: (batch, features) -> (batch, dim)."""
        return nn.Sequential(
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, dim, bias=False),
        )

    @staticmethod
    def distillation() -> OnlineDistillation:
        """Return the squared difference of embeddings."""
        return OnlineDistillation("mse")

    def forward(self, batch: Batch) -> Outcome:
        """Return the loss over the gathered batch (eq. 6)."""
        first, second = embeddings = [gather(each) for each in self.embed(batch.views)]
        loss = vicreg(first, second, self.invariance, self.variance, self.covariance)
        # so the mean squared difference to the teacher weighs as much as that between the views
        return Outcome(loss, embeddings=[each * math.sqrt(self.invariance) for each in embeddings])
