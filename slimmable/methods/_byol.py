"""BYOL: predict the momentum encoder's embedding of the other view; nothing repels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from slimmable.losses import OnlineDistillation, byol
from slimmable.losses._cosines import unit
from slimmable.methods._batch import Batch, Outcome
from slimmable.methods._follower import WithFollower


class BYOL(WithFollower):
    """BYOL (Grill et al., *Bootstrap Your Own Latent*, NeurIPS 2020), at every width.

    BYOL has no logits. Narrow widths learn the full width's predictions by the same distance that BYOL itself uses.

    Args:
        encoder: an `Encoder`, converted.
        predictor: embeddings in, embeddings of the same size out; converted.
        momentum: of the momentum encoder at the start; it rises to 1 by a cosine.

    Raises: UsageError: if `momentum` is not in [0, 1].

    >>> import torch, slimmable
    >>> from slimmable.methods import Batch, Encoder
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = Encoder(backbone, BYOL.projector(8, 16, 4))
    >>> encoder = slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    >>> predictor = slimmable.slimify(BYOL.predictor(16, 4), (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> method = BYOL(encoder, predictor)
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation())
    >>> losses = method.step(recipe, Batch([torch.rand(8, 1, 2, 2), torch.rand(8, 1, 2, 2)]), progress=0.7)
    >>> list(losses)
    [1.0, 0.5]
    """

    def __init__(self, encoder: nn.Module, predictor: nn.Module, *, momentum: float = 0.996) -> None:
        super().__init__(encoder, predictor, momentum=momentum)

    @staticmethod
    def projector(features: int, hidden: int, dim: int) -> nn.Sequential:
        """Return the head, two layers: (batch, features) -> (batch, dim)."""
        return nn.Sequential(
            nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
        )

    @staticmethod
    def predictor(hidden: int, dim: int) -> nn.Sequential:
        """Return the predictor, built like the head: (batch, dim) -> (batch, dim)."""
        return BYOL.projector(dim, hidden, dim)

    @staticmethod
    def distillation() -> OnlineDistillation:
        """Return the squared distance of unit-length predictions."""
        return OnlineDistillation("mse")

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Return for each view the momentum encoder's embeddings of the other."""
        return self.followed(batch, progress)[::-1]

    def forward(self, batch: Batch) -> Outcome:
        """Return the loss of both directions (eq. 2 and below)."""
        predictions = [self.online_predictor(each) for each in self.embed(batch.views)]
        first, second = (
            byol(prediction, target) for prediction, target in zip(predictions, batch.targets, strict=True)
        )
        # of length sqrt(dim), whose mean squared difference is the squared distance of unit vectors
        scaled = [unit(prediction) * prediction.shape[1] ** 0.5 for prediction in predictions]
        return Outcome(first + second, embeddings=scaled)
