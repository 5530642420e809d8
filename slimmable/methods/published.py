"""The published methods, and supervised training."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable import losses
from slimmable._checks import check_classes, check_matrices, check_module, check_tensors, checked, shown
from slimmable._distributed import gather, rank
from slimmable._modules import in_eval_mode
from slimmable._numerics import at_least_float32, matmul_without_autocast, standardised, unit_vectors
from slimmable.errors import DataError, UsageError
from slimmable.losses import OnlineDistillation
from slimmable.methods.method import Batch, Method, Outcome
from slimmable.training import MoCo, MomentumEncoder, cosine_momentum, synchronised_batchnorm

TeacherKind = Literal["scores", "mse", "cosine"]


def _mlp(
    size: int, hidden: int, outputs: int, layers: int = 2, bias: bool = False, last_bias: bool = False, norm: Any = None
) -> nn.Sequential:
    """Return linear layers, with BatchNorm and ReLU between them; `norm`: whether a last BatchNorm, if any, learns."""
    *inputs, last_input = size, *[hidden] * (layers - 1)
    parts: list[nn.Module] = []
    for each in inputs:
        parts += [nn.Linear(each, hidden, bias=bias), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    last = [] if norm is None else [nn.BatchNorm1d(outputs, affine=norm)]
    return nn.Sequential(*parts, nn.Linear(last_input, outputs, bias=last_bias), *last)


class _WithHead(Method):
    _head: Callable[..., nn.Sequential] = staticmethod(_mlp)  # the projection head, as published

    @classmethod
    @checked
    def projector(cls, in_features: int, hidden_dim: int, proj_dim: int) -> nn.Sequential:
        """Return the projection head, of the published layers: (batch, in_features) -> (batch, proj_dim)."""
        return cls._head(in_features, hidden_dim, proj_dim)


class SimCLR(_WithHead):
    """SimCLR (Chen et al., *A Simple Framework for Contrastive Learning*, ICML 2020), at every width.

    The processes' embeddings are gathered, with their gradients. The `temperature` is that of the loss; 0.1 for
    ImageNet, 0.5 for CIFAR. The example of `Method` shows a step.
    """

    _head = staticmethod(partial(_mlp, bias=True, norm=True))

    @checked
    def __init__(self, encoder: nn.Module, *, temperature: float = 0.1) -> None:
        super().__init__(encoder)
        self.temperature = temperature

    def forward(self, batch: Batch) -> Outcome:
        """Return NT-Xent over the gathered batch (eq. 1)."""
        embeddings = [gather(each) for each in self.embed(batch.views)]
        logits = losses.nt_xent_logits(*embeddings)
        return Outcome(losses.contrastive_cross_entropy(logits, self.temperature), [logits], embeddings)


class VICReg(_WithHead):
    """VICReg (Bardes, Ponce, LeCun, ICLR 2022), at every width.

    Narrow widths learn the full width's embeddings with the invariance term. The factors of the three terms are as in
    `slimmable.losses.vicreg_loss`. The example of `Method` shows a step.
    """

    _head = staticmethod(partial(_mlp, layers=3, bias=True))
    distillation = staticmethod(lambda: OnlineDistillation("mse"))

    @checked
    def __init__(
        self, encoder: nn.Module, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
    ) -> None:
        super().__init__(encoder)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def forward(self, batch: Batch) -> Outcome:
        """Return the loss over the gathered batch (eq. 6)."""
        first, second = embeddings = [gather(each) for each in self.embed(batch.views)]
        loss = losses.vicreg_loss(first, second, self.invariance, self.variance, self.covariance)
        # The mean squared difference to the teacher then weighs as much as that between the views.
        return Outcome(loss, embeddings=[each * math.sqrt(self.invariance) for each in embeddings])


class BarlowTwins(_WithHead):
    """Barlow Twins (Zbontar et al., *Self-Supervised Learning via Redundancy Reduction*, ICML 2021), at every width.

    Narrow widths learn the full width's embeddings, standardised as in the loss. The factor of the redundancy term,
    `redundancy`, is the paper's lambda. The example of `Method` shows a step.
    """

    _head = staticmethod(partial(_mlp, layers=3))
    distillation = staticmethod(lambda: OnlineDistillation("mse"))

    @checked
    def __init__(self, encoder: nn.Module, *, redundancy: float = 5e-3) -> None:
        super().__init__(encoder)
        self.redundancy = redundancy

    def forward(self, batch: Batch) -> Outcome:
        """Return the loss over the gathered batch (eq. 1)."""
        first, second = embeddings = [gather(each) for each in self.embed(batch.views)]
        loss = losses.barlow_twins_loss(first, second, self.redundancy)
        # Their mean squared difference is then 1 - correlation, summed over features, as in the loss's first term.
        return Outcome(loss, embeddings=[standardised(each) * math.sqrt(each.shape[1] / 2) for each in embeddings])


class Supervised(Method):
    """Classification at every width, with in-place distillation (Yu and Huang, *Universally Slimmable Networks*, 2019).

    With the method's own distillation, narrow widths learn from labels and from the full width's class probabilities;
    section 3.2 leaves them no labels (`weight=1.0`). For universal models, give the recipe `random_widths=2`.

    Args:
        encoder: a converted `Encoder` whose projector is the classifier: images in, class scores out.
        label_smoothing: fraction of the probability that is spread over all classes.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = slimmable.methods.Encoder(backbone, Supervised.projector(8, num_classes=3))
    >>> method = Supervised(slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2)))
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation(), loss_weights="ones")
    >>> list(method.step(recipe, slimmable.methods.Batch([torch.rand(6, 1, 2, 2)], torch.arange(6) % 3), progress=0.7))
    [1.0, 0.5]
    """

    views = 1
    two_passes = False
    distillation = staticmethod(lambda: OnlineDistillation("kl", 1.0, 1.0))

    @checked
    def __init__(self, encoder: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__(encoder)
        self.label_smoothing = label_smoothing

    @staticmethod
    @checked
    def projector(in_features: int, num_classes: int) -> nn.Linear:
        """Return the classifier: (batch, in_features) -> (batch, num_classes)."""
        return nn.Linear(in_features, num_classes)

    def forward(self, batch: Batch) -> Outcome:
        """Return the cross-entropy with the labels: class numbers of shape (batch,), or probabilities like the scores.

        Raises: DataError: if the batch has no labels, or they do not match the scores.
        """
        scores, labels = self.encoder(batch.views[0]), batch.labels
        probabilities = isinstance(labels, Tensor) and labels.is_floating_point()
        if not isinstance(labels, Tensor) or labels.shape != (scores.shape if probabilities else scores.shape[:1]):
            wanted = f"class numbers of shape {(len(scores),)}, or probabilities of shape {tuple(scores.shape)}"
            raise DataError(f"Supervised: labels are {shown(labels)}, expected {wanted}")
        if not probabilities:
            check_classes("Supervised", labels, scores.shape[1])
        return Outcome(F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing), [scores], [scores])


class Distillation(Method):
    """A frozen teacher that teaches every width at once (Hinton et al., *Distilling the Knowledge*, 2015).

    The teacher runs once per step, in evaluation mode and without gradients, and is left as it is. It is no submodule,
    so neither `parameters` nor the state dict has it; `to` moves it along. The full width does not teach the others,
    unless the recipe has an `OnlineDistillation` too. The example of `Method` shows a step; here the batch has one
    view, and the method also needs a teacher: `Distillation(encoder, timm.create_model(..., pretrained=True))`.

    Args:
        encoder: a converted `Encoder` whose embeddings are as large as the teacher's output, as with `projector`.
        teacher: images in, a tensor (batch, size) out, as in timm; in transformers, "scores" are `logits`, and features
            `pooler_output` or else the mean of `last_hidden_state` over tokens. It runs at its active width, if any.
        kind: "scores": Kullback-Leibler divergence of the classes' probabilities at `temperature`, times its square;
            "mse": mean squared difference of features; "cosine": 1 minus the cosine of features.
        temperature: of both sides' scores.

    Raises: UsageError: if the teacher shares parameters with the encoder.
    """

    views = 1
    two_passes = False
    distillation = staticmethod(lambda: None)
    teacher: nn.Module

    @checked
    def __init__(
        self, encoder: nn.Module, teacher: nn.Module, *, kind: TeacherKind = "scores", temperature: float = 4.0
    ) -> None:
        super().__init__(encoder)
        check_module("Distillation: teacher", teacher)
        if not set(encoder.parameters()).isdisjoint(teacher.parameters()):
            raise UsageError("Distillation: the teacher shares parameters with the encoder; give a copy, which stays")
        self.kind, self.on_scores = kind, OnlineDistillation("kl", temperature, temperature)
        vars(self)["teacher"] = teacher  # no submodule

    @staticmethod
    @checked
    def projector(in_features: int, proj_dim: int) -> nn.Linear:
        """Return the linear map to the size of the teacher's output: (batch, in_features) -> (batch, proj_dim)."""
        return nn.Linear(in_features, proj_dim)

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Return the teacher's scores or features; raise DataError if its output has none."""
        with in_eval_mode(self.teacher):
            output: Any = self.teacher(batch.views[0])
        names = ("logits",) if self.kind == "scores" else ("pooler_output", "last_hidden_state")  # of transformers
        found = [each for name in names if isinstance(each := getattr(output, name, None), Tensor)]
        output = found[0].mean(1) if found and found[0].ndim == 3 else (found or [output])[0]
        check_tensors("Distillation", **{f"the teacher's output, or its {' or '.join(names)},": output})
        output = output.flatten(1) if output.shape[2:] == (1, 1) else output
        check_matrices("Distillation", **{"the teacher's output": output})
        return [output.detach()]

    def forward(self, batch: Batch) -> Outcome:
        """Return the loss of the embeddings; raise DataError if the teacher's output has another shape."""
        student, (target,) = self.encoder(batch.views[0]), batch.targets
        if student.shape != target.shape:
            sizes = f"embeddings of shape {tuple(student.shape)} from a teacher's output of {tuple(target.shape)}"
            raise DataError(f"Distillation: cannot learn {sizes}; end the encoder with Distillation.projector(...)")
        if self.kind == "scores":
            loss = self.on_scores(student, target) - self.on_scores.floor(target)
        elif self.kind == "mse":
            loss = losses.squared_error(student, target)
        else:
            loss = 1 + losses.simsiam_loss(student, target)
        return Outcome(loss, [student], [student])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # of `to`, `cuda`, `double` and the like
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class MoCoV2(_WithHead):
    """MoCo v2 (He et al. 2020, Chen et al. 2020), at every width; only the full width makes keys (SlimCLR).

    Several processes give the same result as one if `bn_splits` is the same and at least their number. The example of
    `Method` shows a step; here the method also needs the size of an embedding: `MoCoV2(encoder, proj_dim=4)`.

    Args:
        proj_dim, queue_size, momentum, bn_splits: as in `slimmable.training.MoCo`.
        temperature: temperature of the loss.
    """

    _head = staticmethod(lambda ins, hid, out: nn.Sequential(nn.Linear(ins, hid), nn.ReLU(True), nn.Linear(hid, out)))
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

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Return the keys of the second view."""
        return [self.moco.keys(self.encoder, batch.views[1])]

    def forward(self, batch: Batch) -> Outcome:
        """Return InfoNCE of the first view's queries (He et al. 2020, eq. 1)."""
        query = self.encoder(batch.views[0])
        logits = losses.moco_logits(query, batch.targets[0], self.moco.queue)
        return Outcome(losses.contrastive_cross_entropy(logits, self.temperature), [logits], _of_length([query]))

    def finish(self, batch: Batch) -> None:
        """Replace the oldest keys of the queue by those of this step."""
        self.moco.enqueue(batch.targets[0])


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

    >>> backbone = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> encoder = slimmable.methods.Encoder(backbone, DINO.projector(8, 16, 32))
    >>> method = DINO(slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 8, 8)), proj_dim=32)
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation())
    >>> views = [torch.rand(6, 1, size, size) for size in [8] * 2 + [4] * 8]
    >>> list(method.step(recipe, slimmable.methods.Batch(views), progress=0.7))
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
            layers += [nn.Linear(inputs, hidden_dim), *[nn.BatchNorm1d(hidden_dim)] * batch_norm, nn.GELU()]
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
        temperature = self.teacher_temperature + left * (0.04 - self.teacher_temperature)
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


def _of_length(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """Return embeddings at length sqrt(dim), whose mean squared difference is the squared distance of unit vectors."""
    return [unit_vectors(each) * each.shape[1] ** 0.5 for each in embeddings]


class _WithPredictor(_WithHead):
    _tail: Callable[..., nn.Sequential] = staticmethod(partial(_mlp, last_bias=True))  # the predictor, as published
    distillation = staticmethod(lambda: OnlineDistillation("mse"))  # of unit-length predictions

    @checked
    def __init__(self, encoder: nn.Module, predictor: nn.Module) -> None:
        super().__init__(encoder)
        check_module(f"{type(self).__name__}: predictor", predictor)
        self.online_predictor = predictor

    @property
    def online(self) -> nn.ModuleList:
        """Encoder and predictor."""
        return nn.ModuleList([self.encoder, self.online_predictor])

    @classmethod
    @checked
    def predictor(cls, hidden_dim: int, proj_dim: int) -> nn.Sequential:
        """Return the predictor, of the published layers: (batch, proj_dim) -> (batch, proj_dim)."""
        return cls._tail(proj_dim, hidden_dim, proj_dim)


class SimSiam(_WithPredictor):
    """SimSiam (Chen and He, *Exploring Simple Siamese Representation Learning*, CVPR 2021), at every width.

    Narrow widths also learn the full width's predictions, with the loss's distance. The predictor is as in `BYOL`,
    whose example shows a step; as published, its `hidden_dim` is a quarter of `proj_dim`.
    """

    _head = staticmethod(partial(_mlp, layers=3, norm=False))

    def forward(self, batch: Batch) -> Outcome:
        """Return the symmetric loss (eq. 4)."""
        embeddings = self.embed(batch.views)
        predictions = [self.online_predictor(each) for each in embeddings]
        first, second = map(losses.simsiam_loss, predictions, embeddings[::-1])
        return Outcome((first + second) / 2, embeddings=[each / 2 for each in _of_length(predictions)])  # 1/4 of BYOL's


class _WithMomentum(_WithPredictor):
    """One whose targets are made by a momentum encoder, the momentum of which rises to 1."""

    @checked
    def __init__(self, encoder: nn.Module, predictor: nn.Module, *, momentum: float = 0.996) -> None:
        super().__init__(encoder, predictor)
        self.momentum, self.momentum_encoder = momentum, MomentumEncoder(encoder)

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Update the momentum encoder; return for each view its embeddings of the other one."""
        self.momentum_encoder.update(self.encoder, cosine_momentum(progress, self.momentum))
        with synchronised_batchnorm(self.bn_groups):
            return [self.momentum_encoder(view) for view in batch.views][::-1]

    def predict(self, batch: Batch) -> list[Tensor]:
        """Return the predictor's output for each view."""
        return [self.online_predictor(each) for each in self.embed(batch.views)]


class MoCoV3(_WithMomentum):
    """MoCo v3 (Chen, Xie, He, *An Empirical Study of Training Self-Supervised Vision Transformers*, 2021).

    Args:
        predictor, momentum: as for `BYOL`, whose example shows a step.
        temperature: temperature of the loss; 1.0 for ResNets, 0.2 for vision transformers.
    """

    distillation = staticmethod(lambda: OnlineDistillation("kl", 1.0, 1.0))  # SlimCLR's, on the logits of its loss

    @checked
    def __init__(
        self, encoder: nn.Module, predictor: nn.Module, *, momentum: float = 0.99, temperature: float = 1.0
    ) -> None:
        super().__init__(encoder, predictor, momentum=momentum)
        self.temperature = temperature

    @staticmethod
    @checked
    def projector(in_features: int, hidden_dim: int, proj_dim: int, *, layers: int = 2) -> nn.Sequential:
        """Return the head, of 2 layers for ResNets, 3 for transformers: (batch, in_features) -> (batch, proj_dim)."""
        return _mlp(in_features, hidden_dim, proj_dim, layers, norm=False)

    @staticmethod
    @checked
    def predictor(hidden_dim: int, proj_dim: int, *, last_norm: bool = False) -> nn.Sequential:
        """Return the predictor: (batch, proj_dim) -> (batch, proj_dim). Use `last_norm` for vision transformers."""
        return _mlp(proj_dim, hidden_dim, proj_dim, norm=False if last_norm else None)

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Return for each view the keys of the other, from all processes."""
        return [gather(keys) for keys in super().prepare(batch, progress)]

    def forward(self, batch: Batch) -> Outcome:
        """Return the symmetric loss (algorithm 1)."""
        queries = self.predict(batch)
        offset = rank() * len(queries[0])
        pairs = zip(queries, batch.targets, strict=True)
        logits = [losses.moco_v3_logits(query, keys, self.temperature, offset) for query, keys in pairs]
        first, second = (losses.contrastive_cross_entropy(each, 1.0) for each in logits)
        return Outcome(2 * self.temperature * (first + second), logits, _of_length(queries))


class BYOL(_WithMomentum):
    """BYOL (Grill et al., *Bootstrap Your Own Latent*, NeurIPS 2020), at every width.

    BYOL has no logits. Narrow widths learn the full width's predictions with the distance of BYOL's own loss.

    Args:
        predictor: a converted module, embeddings in, embeddings of the same size out, as `predictor` makes one.
        momentum: initial momentum of the momentum encoder; it rises to 1 along a cosine.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = slimmable.methods.Encoder(backbone, BYOL.projector(8, 16, 4))
    >>> encoder = slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    >>> predictor = slimmable.slimify(BYOL.predictor(16, 4), (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> method = BYOL(encoder, predictor)
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation())
    >>> list(method.step(recipe, slimmable.methods.Batch([torch.rand(8, 1, 2, 2)] * 2), progress=0.7))
    [1.0, 0.5]
    """

    _head = _tail = staticmethod(partial(_mlp, bias=True, last_bias=True))

    def forward(self, batch: Batch) -> Outcome:
        """Return the loss of both directions (eq. 2 and below)."""
        predictions = self.predict(batch)
        first, second = map(losses.byol_loss, predictions, batch.targets)
        return Outcome(first + second, embeddings=_of_length(predictions))
