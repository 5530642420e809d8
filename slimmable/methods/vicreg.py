"""VICReg: the invariance, variance and covariance of two views' embeddings."""

from __future__ import annotations

import math

from torch import nn

from slimmable._checks import check_not_negative
from slimmable._distributed import gather
from slimmable.losses import OnlineDistillation, vicreg_loss
from slimmable.methods.method import Batch, Method, Outcome, hidden_layer


class VICReg(Method):
    """VICReg (Bardes, Ponce, LeCun, ICLR 2022), at every width.

    VICReg has no logits. Narrow widths learn the full width's embeddings with VICReg's own invariance term.

    Args:
        encoder: a converted `Encoder`.
        invariance, variance, covariance: factors of the three terms, as in `slimmable.losses.vicreg_loss`.

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
        check_not_negative("VICReg", invariance=invariance, variance=variance, covariance=covariance)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    @staticmethod
    def projector(in_features: int, hidden_dim: int, proj_dim: int) -> nn.Sequential:
        """Return the three-layer projection head (the "expander"): (batch, in_features) -> (batch, proj_dim)."""
        return nn.Sequential(
            *hidden_layer(in_features, hidden_dim),
            *hidden_layer(hidden_dim, hidden_dim),
            nn.Linear(hidden_dim, proj_dim, bias=False),
        )

    @staticmethod
    def distillation() -> OnlineDistillation:
        """Return the squared difference of embeddings."""
        return OnlineDistillation("mse")

    def forward(self, batch: Batch) -> Outcome:
        """Return the loss over the gathered batch (eq. 6)."""
        first, second = embeddings = [gather(each) for each in self.embed(batch.views)]
        loss = vicreg_loss(first, second, self.invariance, self.variance, self.covariance)
        # The mean squared difference to the teacher then weighs as much as that between the views.
        return Outcome(loss, embeddings=[each * math.sqrt(self.invariance) for each in embeddings])
