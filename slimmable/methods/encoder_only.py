"""Methods that train the encoder alone: SimCLR, VICReg and supervised training."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._checks import check_classes, checked
from slimmable._distributed import gather
from slimmable.errors import DataError, UsageError
from slimmable.losses import OnlineDistillation, contrastive_cross_entropy, nt_xent_logits, vicreg_loss
from slimmable.methods.method import Batch, Method, Outcome, hidden_layer


class SimCLR(Method):
    """SimCLR (Chen et al., *A Simple Framework for Contrastive Learning*, ICML 2020), at every width.

    The embeddings of all processes are gathered with their gradients, so each image is compared with the whole batch.
    The example of `Method` shows a step.

    Args:
        encoder: a converted `Encoder`.
        temperature: temperature of the loss; 0.1 for ImageNet, 0.5 for CIFAR.
    """

    @checked
    def __init__(self, encoder: nn.Module, *, temperature: float = 0.1) -> None:
        super().__init__(encoder)
        self.temperature = temperature

    @staticmethod
    @checked
    def projector(in_features: int, hidden_dim: int, proj_dim: int) -> nn.Sequential:
        """Return the projection head of two layers with BatchNorm: (batch, in_features) -> (batch, proj_dim)."""
        last = nn.Linear(hidden_dim, proj_dim, bias=False)
        return nn.Sequential(*hidden_layer(in_features, hidden_dim), last, nn.BatchNorm1d(proj_dim))

    def forward(self, batch: Batch) -> Outcome:
        """Return NT-Xent over the gathered batch (eq. 1)."""
        embeddings = [gather(each) for each in self.embed(batch.views)]
        logits = nt_xent_logits(*embeddings)
        return Outcome(contrastive_cross_entropy(logits, self.temperature), [logits], embeddings)


class VICReg(Method):
    """VICReg (Bardes, Ponce, LeCun, ICLR 2022), at every width.

    VICReg has no logits. Narrow widths learn the full width's embeddings with VICReg's own invariance term.
    The example of `Method` shows a step.

    Args:
        encoder: a converted `Encoder`.
        invariance, variance, covariance: factors of the three terms, as in `slimmable.losses.vicreg_loss`.
    """

    @checked
    def __init__(
        self, encoder: nn.Module, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
    ) -> None:
        super().__init__(encoder)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    @staticmethod
    @checked
    def projector(in_features: int, hidden_dim: int, proj_dim: int) -> nn.Sequential:
        """Return the three-layer projection head (the "expander"): (batch, in_features) -> (batch, proj_dim)."""
        hidden = [*hidden_layer(in_features, hidden_dim), *hidden_layer(hidden_dim, hidden_dim)]
        return nn.Sequential(*hidden, nn.Linear(hidden_dim, proj_dim, bias=False))

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


class Supervised(Method):
    """Classification at every width, with in-place distillation (Yu and Huang, *Universally Slimmable Networks*, 2019).

    With the method's own distillation, narrow widths see no labels, only the full width's class probabilities (section
    3.2). For universal models, give the recipe `random_widths=2`, the sandwich rule.

    Args:
        encoder: a converted `Encoder` whose projector is the classifier: images in, class scores out.
        label_smoothing: fraction of the probability that is spread over all classes.

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

    @checked
    def __init__(self, encoder: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__(encoder)
        self.label_smoothing = label_smoothing

    @staticmethod
    @checked
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
