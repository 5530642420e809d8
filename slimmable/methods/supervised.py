"""Slimmable supervised training: labels teach the full width, which teaches the narrow ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._checks import check_classes, check_fraction
from slimmable.errors import DataError, UsageError
from slimmable.losses import OnlineDistillation
from slimmable.methods.method import Batch, Method, Outcome


class Supervised(Method):
    """Classification at every width, with in-place distillation (Yu and Huang, *Universally Slimmable Networks*, 2019).

    With the method's own distillation, narrow widths see no labels, only the full width's class probabilities (section
    3.2). For universal models, give the recipe `random_widths=2`, the sandwich rule.

    Args:
        encoder: a converted `Encoder` whose projector is the classifier: images in, class scores out.
        label_smoothing: fraction of the probability that is spread over all classes.

    Raises: UsageError: if `label_smoothing` is not in [0, 1].

    >>> import torch, slimmable
    >>> from slimmable.methods import Batch, Encoder
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = Encoder(backbone, Supervised.projector(8, num_classes=3))
    >>> method = Supervised(slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2)))
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation(), loss_weights="ones")
    >>> losses = method.step(recipe, Batch([torch.rand(6, 1, 2, 2)], torch.arange(6) % 3), progress=0.7)
    >>> list(losses)
    [1.0, 0.5]
    """

    views = 1
    two_passes = False

    def __init__(self, encoder: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__(encoder)
        check_fraction("Supervised", label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    @staticmethod
    def projector(in_features: int, num_classes: int) -> nn.Linear:
        """Return the classifier: (batch, in_features) -> (batch, num_classes)."""
        return nn.Linear(in_features, num_classes)

    @staticmethod
    def distillation() -> OnlineDistillation:
        """Return in-place distillation: the full width's probabilities replace the labels."""
        return OnlineDistillation(teacher_temperature=1.0, student_temperature=1.0, weight=1.0)

    def forward(self, batch: Batch) -> Outcome:
        """Return the cross-entropy with the labels: class numbers of shape (batch,), or probabilities like the scores.

        Raises: UsageError: if the batch has no labels. DataError: if they do not match the scores.
        """
        scores = self.encoder(batch.views[0])
        loss = F.cross_entropy(scores, _checked(batch.labels, scores), label_smoothing=self.label_smoothing)
        return Outcome(loss, [scores], [scores])


def _checked(labels: Tensor | None, scores: Tensor) -> Tensor:
    if labels is None:
        raise UsageError("Supervised learns from labels; give the batch some")
    probabilities = isinstance(labels, Tensor) and labels.is_floating_point()
    if not isinstance(labels, Tensor) or labels.shape != (scores.shape if probabilities else scores.shape[:1]):
        found = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        raise DataError(
            f"Supervised: labels are {found}, expected class numbers of shape {tuple(scores.shape[:1])}, or "
            f"probabilities of shape {tuple(scores.shape)}"
        )
    if not probabilities:
        check_classes("Supervised", labels, scores.shape[1])
    return labels
