"""MoCo v2: queries against the keys of a momentum encoder and a queue of older keys."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from slimmable.losses import OnlineDistillation, contrast, moco_logits
from slimmable.losses._checks import check_temperature
from slimmable.methods._batch import Batch, Outcome
from slimmable.methods._method import Method
from slimmable.training.moco import MoCo


class MoCoV2(Method):
    """MoCo v2 (He et al. 2020, Chen et al. 2020), at every width; keys come from the full width only (SlimCLR).

    Several processes find what one finds if `parts` is the same, and at least their number.

    Args:
        encoder: an `Encoder`, converted.
        dim: size of an embedding.
        queue_size, momentum, parts: as in `slimmable.training.MoCo`.
        temperature: of the loss.

    Raises: UsageError: if a number is out of its range.

    >>> import torch, slimmable
    >>> from slimmable.methods import Batch, Encoder
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = Encoder(backbone, MoCoV2.projector(8, 16, 4))
    >>> encoder = slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    >>> method = MoCoV2(encoder, dim=4, queue_size=32)
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation(), slow_start=0.5)
    >>> losses = method.step(recipe, Batch([torch.rand(8, 1, 2, 2), torch.rand(8, 1, 2, 2)]), progress=0.2)
    >>> list(losses), int(method.moco.position)
    ([1.0], 8)
    """

    two_passes = False

    def __init__(
        self,
        encoder: nn.Module,
        *,
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        parts: int = 1,
        temperature: float = 0.2,
    ) -> None:
        super().__init__(encoder)
        check_temperature("MoCoV2", "temperature", temperature)
        self.moco = MoCo(encoder, dim, queue_size, momentum, parts=parts)
        self.temperature = temperature

    @staticmethod
    def projector(features: int, hidden: int, dim: int) -> nn.Sequential:
        """Return the head, two layers without BatchNorm: (batch, features) -> (batch, dim)."""
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))

    @staticmethod
    def distillation() -> OnlineDistillation:
        """Return the distillation of SlimCLR: cosines at temperature 5."""
        return OnlineDistillation()

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Return the keys of the second view."""
        return [self.moco.keys(self.encoder, batch.views[1])]

    def forward(self, batch: Batch) -> Outcome:
        """Return InfoNCE of the first view's queries (He et al. 2020, eq. 1)."""
        query = self.encoder(batch.views[0])
        logits = moco_logits(query, batch.targets[0], self.moco.queue)
        return Outcome(contrast(logits, self.temperature), [logits], [query])

    def finish(self, batch: Batch) -> None:
        """Let the keys take the place of the oldest in the queue."""
        self.moco.enqueue(batch.targets[0])
