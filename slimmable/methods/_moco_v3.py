"""MoCo v3: a predictor, a momentum encoder, both directions, and no queue."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from slimmable.losses import OnlineDistillation, contrast, moco_v3_logits
from slimmable.losses._checks import check_count, check_temperature
from slimmable.methods._batch import Batch, Outcome
from slimmable.methods._follower import WithFollower
from slimmable.training._processes import rank
from slimmable.training.distributed import gather


class MoCoV3(WithFollower):
    """MoCo v3 (Chen, Xie, He, *An Empirical Study of Training Self-Supervised Vision Transformers*, 2021).

    Args:
        encoder: an `Encoder`, converted.
        predictor: embeddings in, embeddings of the same size out; converted.
        momentum: of the momentum encoder at the start; it rises to 1 by a cosine.
        temperature: of the loss; 1.0 for ResNets, 0.2 for vision transformers.

    Raises: UsageError: if a number is out of its range.

    >>> import torch, slimmable
    >>> from slimmable.methods import Batch, Encoder
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = Encoder(backbone, MoCoV3.projector(8, 16, 4))
    >>> encoder = slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    >>> predictor = slimmable.slimify(MoCoV3.predictor(16, 4), (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> method = MoCoV3(encoder, predictor)
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation())
    >>> losses = method.step(recipe, Batch([torch.rand(8, 1, 2, 2), torch.rand(8, 1, 2, 2)]), progress=0.7)
    >>> list(losses)
    [1.0, 0.5]
    """

    def __init__(
        self, encoder: nn.Module, predictor: nn.Module, *, momentum: float = 0.99, temperature: float = 1.0
    ) -> None:
        super().__init__(encoder, predictor, momentum=momentum)
        check_temperature("MoCoV3", "temperature", temperature)
        self.temperature = temperature

    @staticmethod
    def projector(features: int, hidden: int, dim: int, *, layers: int = 2) -> nn.Sequential:
        """Return the head: (batch, features) -> (batch, dim); 2 layers for ResNets, 3 for vision transformers.

        Raises: UsageError: if `layers` is no integer from 1 on.
        """
        check_count("MoCoV3.projector", "layers", layers)
        return _head([features, *[hidden] * (layers - 1), dim], last_norm=True)

    @staticmethod
    def predictor(hidden: int, dim: int, *, last_norm: bool = False) -> nn.Sequential:
        """Return the predictor: (batch, dim) -> (batch, dim); with `last_norm` for vision transformers."""
        return _head([dim, hidden, dim], last_norm)

    @staticmethod
    def distillation() -> OnlineDistillation:
        """Return the distillation of SlimCLR with MoCo v3: the logits that its loss sees, at temperature 1."""
        return OnlineDistillation(teacher_temperature=1.0, student_temperature=1.0)

    def forward(self, batch: Batch) -> Outcome:
        """Return the symmetric loss (algorithm 1)."""
        queries = [self.online_predictor(each) for each in self.embed(batch.views)]
        offset = rank() * len(queries[0])
        logits = [
            moco_v3_logits(query, keys, self.temperature, offset)
            for query, keys in zip(queries, batch.targets, strict=True)
        ]
        loss = sum((contrast(each, 1.0) for each in logits[1:]), contrast(logits[0], 1.0))
        return Outcome(2 * self.temperature * loss, logits, queries)

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Return for each view the keys of the other, of all processes."""
        return [gather(keys) for keys in reversed(self.followed(batch, progress))]


def _head(sizes: Sequence[int], last_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=False))
    if last_norm:
        layers.append(nn.BatchNorm1d(sizes[-1], affine=False))
    return nn.Sequential(*layers)
