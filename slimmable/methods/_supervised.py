"""Slimmable supervised training: labels teach the full width, and the full width the narrow ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from slimmable.losses import OnlineDistillation
from slimmable.methods._method import Batch, Method, Outcome, checked_labels


class Supervised(Method):
    """Classification at every width, with in-place distillation (Yu and Huang, *Universally Slimmable Networks*, 2019).

    With its own distillation narrow widths see no labels, only the full width's class probabilities (section 3.2
    there). For universal models give the recipe `random_widths=2`: the sandwich rule.

    Args:
        encoder: images in, class scores out; converted. An `Encoder` whose projector is the classifier.
        label_smoothing: share of the probability that is spread over all classes.

    >>> import torch, slimmable
    >>> from slimmable.methods import Batch, Encoder
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = Encoder(backbone, Supervised.projector(8, classes=3))
    >>> method = Supervised(slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2)))
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation(), weights="ones")
    >>> losses = method.step(recipe, Batch([torch.rand(6, 1, 2, 2)], torch.arange(6) % 3), progress=0.7)
    >>> list(losses)
    [1.0, 0.5]
    """

    views = 1

    def __init__(self, encoder: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__(encoder)
        self.label_smoothing = label_smoothing

    @staticmethod
    def projector(features: int, classes: int) -> nn.Linear:
        """Return the classifier: (batch, features) -> (batch, classes)."""
        return nn.Linear(features, classes)

    @staticmethod
    def distillation() -> OnlineDistillation:
        """Return in-place distillation: the full width's probabilities in the place of the labels."""
        return OnlineDistillation(teacher_temperature=1.0, student_temperature=1.0, weight=1.0)

    def forward(self, batch: Batch) -> Outcome:
        """Return the cross-entropy with the labels."""
        scores = self.encoder(batch.views[0])
        loss = F.cross_entropy(scores, checked_labels(self, batch), label_smoothing=self.label_smoothing)
        return Outcome(loss, [scores], [scores])
