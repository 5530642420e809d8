"""Methods whose targets come from a momentum encoder: MoCo v2, MoCo v3 and BYOL."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from slimmable._checks import check_module, checked
from slimmable._distributed import gather, rank
from slimmable._numerics import unit_vectors
from slimmable.losses import OnlineDistillation, byol_loss, contrastive_cross_entropy, moco_logits, moco_v3_logits
from slimmable.methods.method import Batch, Method, Outcome, hidden_layer
from slimmable.training import MoCo, MomentumEncoder, cosine_momentum, synchronised_batchnorm


class MoCoV2(Method):
    """MoCo v2 (He et al. 2020, Chen et al. 2020), at every width; only the full width makes keys (SlimCLR).

    Several processes give the same result as one if `bn_splits` is the same and at least their number. The example of
    `Method` shows a step; here the method also needs the size of an embedding: `MoCoV2(encoder, proj_dim=4)`.

    Args:
        encoder: a converted `Encoder`.
        proj_dim: size of an embedding.
        queue_size, momentum, bn_splits: as in `slimmable.training.MoCo`.
        temperature: temperature of the loss.
    """

    two_passes = False

    @checked
    def __init__(
        self,
        encoder: nn.Module,
        *,
        proj_dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        bn_splits: int = 1,
        temperature: float = 0.2,
    ) -> None:
        super().__init__(encoder)
        self.moco = MoCo(encoder, proj_dim, queue_size, momentum, bn_splits=bn_splits)
        self.temperature = temperature

    @staticmethod
    @checked
    def projector(in_features: int, hidden_dim: int, proj_dim: int) -> nn.Sequential:
        """Return the projection head, two layers without BatchNorm: (batch, in_features) -> (batch, proj_dim)."""
        return nn.Sequential(nn.Linear(in_features, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, proj_dim))

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Return the keys of the second view."""
        return [self.moco.keys(self.encoder, batch.views[1])]

    def forward(self, batch: Batch) -> Outcome:
        """Return InfoNCE of the first view's queries (He et al. 2020, eq. 1)."""
        query = self.encoder(batch.views[0])
        logits = moco_logits(query, batch.targets[0], self.moco.queue)
        return Outcome(contrastive_cross_entropy(logits, self.temperature), [logits], [query])

    def finish(self, batch: Batch) -> None:
        """Replace the oldest keys of the queue by those of this step."""
        self.moco.enqueue(batch.targets[0])


class _WithPredictor(Method):
    """A method with a predictor, and with a momentum encoder for both views whose momentum rises to 1."""

    @checked
    def __init__(self, encoder: nn.Module, predictor: nn.Module, *, momentum: float = 0.996) -> None:
        super().__init__(encoder)
        check_module(f"{type(self).__name__}: predictor", predictor)
        self.online_predictor = predictor
        self.momentum_encoder = MomentumEncoder(encoder)
        self.momentum = momentum

    @property
    def online(self) -> nn.ModuleList:
        """Encoder and predictor."""
        return nn.ModuleList([self.encoder, self.online_predictor])

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Update the momentum encoder; return for each view its embeddings of the other one."""
        self.momentum_encoder.update(self.encoder, cosine_momentum(progress, self.momentum))
        with synchronised_batchnorm():
            return [self.momentum_encoder(view) for view in batch.views][::-1]

    def predict(self, batch: Batch) -> list[Tensor]:
        """Return the predictor's output for each view."""
        return [self.online_predictor(each) for each in self.embed(batch.views)]


class MoCoV3(_WithPredictor):
    """MoCo v3 (Chen, Xie, He, *An Empirical Study of Training Self-Supervised Vision Transformers*, 2021).

    A step is as in the example of `BYOL`.

    Args:
        encoder: a converted `Encoder`.
        predictor: a converted module, embeddings in, embeddings of the same size out.
        momentum: initial momentum of the momentum encoder; it rises to 1 along a cosine.
        temperature: temperature of the loss; 1.0 for ResNets, 0.2 for vision transformers.
    """

    @checked
    def __init__(
        self, encoder: nn.Module, predictor: nn.Module, *, momentum: float = 0.99, temperature: float = 1.0
    ) -> None:
        super().__init__(encoder, predictor, momentum=momentum)
        self.temperature = temperature

    @staticmethod
    @checked
    def projector(in_features: int, hidden_dim: int, proj_dim: int, *, layers: int = 2) -> nn.Sequential:
        """Return the projection head: (batch, in_features) -> (batch, proj_dim).

        Use 2 `layers` for ResNets, 3 for vision transformers.
        """
        return _mlp([in_features, *[hidden_dim] * (layers - 1), proj_dim], last_norm=True)

    @staticmethod
    @checked
    def predictor(hidden_dim: int, proj_dim: int, *, last_norm: bool = False) -> nn.Sequential:
        """Return the predictor: (batch, proj_dim) -> (batch, proj_dim). Use `last_norm` for vision transformers."""
        return _mlp([proj_dim, hidden_dim, proj_dim], last_norm)

    @staticmethod
    def distillation() -> OnlineDistillation:
        """Return the distillation of SlimCLR with MoCo v3: on the logits of its loss, at temperature 1."""
        return OnlineDistillation(teacher_temperature=1.0, student_temperature=1.0)

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Return for each view the keys of the other, from all processes."""
        return [gather(keys) for keys in super().prepare(batch, progress)]

    def forward(self, batch: Batch) -> Outcome:
        """Return the symmetric loss (algorithm 1)."""
        queries = self.predict(batch)
        offset = rank() * len(queries[0])
        logits = [
            moco_v3_logits(query, keys, self.temperature, offset)
            for query, keys in zip(queries, batch.targets, strict=True)
        ]
        first, second = (contrastive_cross_entropy(each, 1.0) for each in logits)
        return Outcome(2 * self.temperature * (first + second), logits, queries)


class BYOL(_WithPredictor):
    """BYOL (Grill et al., *Bootstrap Your Own Latent*, NeurIPS 2020), at every width.

    BYOL has no logits. Narrow widths learn the full width's predictions with the distance of BYOL's own loss.

    Args:
        encoder: a converted `Encoder`.
        predictor: a converted module, embeddings in, embeddings of the same size out.
        momentum: initial momentum of the momentum encoder; it rises to 1 along a cosine.

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

    @staticmethod
    @checked
    def projector(in_features: int, hidden_dim: int, proj_dim: int) -> nn.Sequential:
        """Return the two-layer projection head: (batch, in_features) -> (batch, proj_dim)."""
        return nn.Sequential(*hidden_layer(in_features, hidden_dim), nn.Linear(hidden_dim, proj_dim))

    @staticmethod
    @checked
    def predictor(hidden_dim: int, proj_dim: int) -> nn.Sequential:
        """Return the predictor, built like the projection head: (batch, proj_dim) -> (batch, proj_dim)."""
        return BYOL.projector(proj_dim, hidden_dim, proj_dim)

    @staticmethod
    def distillation() -> OnlineDistillation:
        """Return the squared distance of unit-length predictions."""
        return OnlineDistillation("mse")

    def forward(self, batch: Batch) -> Outcome:
        """Return the loss of both directions (eq. 2 and below)."""
        predictions = self.predict(batch)
        first, second = map(byol_loss, predictions, batch.targets)
        # At length sqrt(dim), their mean squared difference is the squared distance of unit vectors.
        scaled = [unit_vectors(prediction) * prediction.shape[1] ** 0.5 for prediction in predictions]
        return Outcome(first + second, embeddings=scaled)


def _mlp(sizes: Sequence[int], last_norm: bool) -> nn.Sequential:
    """Return MoCo v3's head or predictor: linear layers without bias; the last BatchNorm has no gain or bias."""
    hidden = [layer for inputs, outputs in pairwise(sizes[:-1]) for layer in hidden_layer(inputs, outputs, bias=False)]
    norm = [nn.BatchNorm1d(sizes[-1], affine=False)] if last_norm else []
    return nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1], bias=False), *norm)
