"""DINO, whose momentum teacher sees two views of an image, and its student several smaller ones too."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from slimmable import losses
from slimmable._checks import checked
from slimmable._distributed import gather
from slimmable._numerics import at_least_float32, matmul_without_autocast, unit_vectors
from slimmable.losses import OnlineDistillation
from slimmable.methods.method import Batch, Method, Outcome
from slimmable.training import MomentumEncoder, cosine_momentum, synchronised_batchnorm

_FIRST_TEMPERATURE = 0.04  # of the teacher


class DINO(Method):
    """DINO (Caron et al., *Emerging Properties in Self-Supervised Vision Transformers*, ICCV 2021), at every width.

    The full width's momentum encoder, the teacher, sees the first two views; the student sees the local crops too. They
    may be of any size that the backbone takes: convolutional networks do, timm's vision transformers with
    `dynamic_img_size=True`. Views of one size run together. Narrow widths learn the full width's class probabilities.

    Args:
        encoder: a converted `Encoder` that ends with the head of `projector`.
        proj_dim: number of classes, the outputs of the head.
        local_crops: how many views follow the first two.
        momentum: initial momentum of the momentum encoder; it rises to 1 along a cosine.
        temperature: that of the student.
        teacher_temperature, warm_up: that of the teacher, after a fraction of the training in which it comes from 0.04.
        center_momentum: fraction of itself that the centre of the teacher's outputs keeps in a step.
        freeze: fraction of the training in which the encoder's last layer is not trained; as published, one epoch.

    >>> import slimmable
    >>> from slimmable.methods import Batch, Encoder
    >>> backbone = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> encoder = Encoder(backbone, DINO.projector(8, 16, 32))
    >>> method = DINO(slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 8, 8)), proj_dim=32)
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation())
    >>> views = [torch.rand(6, 1, size, size) for size in [8] * 2 + [4] * 8]
    >>> list(method.step(recipe, Batch(views), progress=0.7))
    [1.0, 0.5]
    """

    two_passes = False
    distillation = staticmethod(lambda: OnlineDistillation("kl", 1.0, 1.0))
    center: Tensor

    @checked
    def __init__(
        self,
        encoder: nn.Module,
        *,
        proj_dim: int = 65536,
        local_crops: int = 8,
        momentum: float = 0.996,
        temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warm_up: float = 0.1,
        center_momentum: float = 0.9,
        freeze: float = 0.01,
    ) -> None:
        super().__init__(encoder)
        self.views = 2 + local_crops
        self.momentum, self.momentum_encoder = momentum, MomentumEncoder(encoder)
        self.temperature, self.teacher_temperature, self.warm_up = temperature, teacher_temperature, warm_up
        self.center_momentum, self.freeze = center_momentum, freeze
        self.register_buffer("center", torch.zeros(proj_dim, device=next(encoder.parameters()).device))

    @staticmethod
    @checked
    def projector(
        in_features: int, hidden_dim: int, proj_dim: int, *, bottleneck_dim: int = 256, batch_norm: bool = False
    ) -> nn.Sequential:
        """Return the head, (batch, in_features) -> (batch, proj_dim); use `batch_norm` for convolutional networks."""
        layers: list[nn.Module] = []
        for inputs in (in_features, hidden_dim):
            norm = [nn.BatchNorm1d(hidden_dim)] if batch_norm else []
            layers += [nn.Linear(inputs, hidden_dim), *norm, nn.GELU()]
        layers.append(nn.Linear(hidden_dim, bottleneck_dim))
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers, _Cosines(bottleneck_dim, proj_dim, bias=False))

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Update the momentum encoder; return its outputs, centred and divided by its temperature, and their mean."""
        self.momentum_encoder.update(self.encoder, cosine_momentum(progress, self.momentum))
        *_, last = self.encoder.modules()
        last.requires_grad_(progress >= self.freeze)
        with synchronised_batchnorm(self.bn_groups):
            outputs = [at_least_float32(each) for each in _outputs(self.momentum_encoder, batch.views[:2])]
        left = max(0.0, 1 - progress / self.warm_up) if self.warm_up else 0.0
        temperature = self.teacher_temperature + left * (_FIRST_TEMPERATURE - self.teacher_temperature)
        mean = gather(torch.stack(outputs).mean((0, 1))[None]).mean(0)
        return [*((each - self.center) / temperature for each in outputs), mean]

    def forward(self, batch: Batch) -> Outcome:
        """Return the cross-entropy of each view with the teacher's probabilities of the others (eq. 3)."""
        outputs = _outputs(self.encoder, batch.views)
        loss = losses.dino_loss(outputs, batch.targets[:2], None, 1.0, self.temperature)
        every = torch.cat(outputs)
        return Outcome(loss, [every / self.temperature], [every])

    def finish(self, batch: Batch) -> None:
        """Move the centre towards the mean of the teacher's outputs in this step."""
        self.center.lerp_(batch.targets[2].to(self.center), 1 - self.center_momentum)


class _Cosines(nn.Linear):
    """The cosines of the input and each row of the weight: a weight-normalised layer whose gains stay 1."""

    def forward(self, input: Tensor) -> Tensor:
        return matmul_without_autocast(unit_vectors(input), unit_vectors(self.weight).T)


def _outputs(network: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Return the network's outputs of each view; those of one size run through it together, image by image."""
    found: list[Tensor] = []
    for _, group in groupby(views, key=lambda view: view.shape):
        together = torch.stack(list(group), 1)
        found += network(together.flatten(0, 1)).unflatten(0, together.shape[:2]).unbind(1)
    return found
