"""Distillation from a frozen teacher, any module that turns images into features or class scores."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from slimmable import losses
from slimmable._checks import check_fraction, check_module, checked
from slimmable._modules import in_eval_mode
from slimmable.errors import DataError, UsageError
from slimmable.methods.method import Batch, Method, Outcome
from slimmable.methods.published import class_loss

TeacherKind = Literal["scores", "mse", "cosine"]


class Distillation(Method):
    """A frozen teacher that teaches every width at once (Hinton et al., *Distilling the Knowledge*, 2015).

    The teacher runs once per step, in evaluation mode and without gradients, and is left as it is: it is no submodule,
    so neither `parameters`, `online` nor the state dict has it; `to` moves it along. The full width does not teach the
    others, unless the recipe has an `OnlineDistillation` too.

    Args:
        encoder: a converted `Encoder` whose embeddings are as large as the teacher's output, as with `projector`.
        teacher: images in, a tensor (batch, size) out, as a timm model gives; of a model of transformers, "scores" are
            its `logits`, and features its `pooler_output` or else the mean of `last_hidden_state` over the tokens. A
            slimmable teacher runs at its active width.
        kind: "scores": Kullback-Leibler divergence of the classes' probabilities at `temperature`, times its square;
            "mse": mean squared difference of features; "cosine": 1 minus the cosine of features.
        temperature: of both sides' scores.
        label_weight: share, in [0, 1], of the cross-entropy with the batch's labels in the loss on scores.

    Raises: UsageError: if the teacher shares parameters with the encoder, or there are labels for features.

    >>> import torch, slimmable
    >>> from slimmable.methods import Batch, Encoder
    >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = Encoder(backbone, Distillation.projector(8, 3))
    >>> encoder = slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    >>> method = Distillation(encoder, teacher)
    >>> losses = method.step(slimmable.SlimRecipe(method.online), Batch([torch.rand(6, 1, 2, 2)]), progress=0.7)
    >>> list(losses)
    [1.0, 0.5]
    """

    views = 1
    two_passes = False
    teacher: nn.Module

    @checked
    def __init__(
        self,
        encoder: nn.Module,
        teacher: nn.Module,
        *,
        kind: TeacherKind = "scores",
        temperature: float = 4.0,
        label_weight: float = 0.0,
    ) -> None:
        super().__init__(encoder)
        check_module("Distillation: teacher", teacher)
        check_fraction("Distillation", label_weight=label_weight)
        if not isinstance(kind, str) or kind not in get_args(TeacherKind):
            raise UsageError(f"Distillation: kind must be one of {', '.join(get_args(TeacherKind))}, got {kind!r:.80}")
        if label_weight and kind != "scores":
            raise UsageError(f"Distillation: label_weight is for class scores, not for kind {kind!r}; leave it out")
        if not set(encoder.parameters()).isdisjoint(teacher.parameters()):
            raise UsageError("Distillation: the teacher shares parameters with the encoder; give a copy, which stays")
        self.kind, self.temperature, self.label_weight = kind, temperature, label_weight
        vars(self)["teacher"] = teacher  # no submodule

    @staticmethod
    @checked
    def projector(in_features: int, proj_dim: int) -> nn.Linear:
        """Return the linear map to the size of the teacher's output: (batch, in_features) -> (batch, proj_dim)."""
        return nn.Linear(in_features, proj_dim)

    @staticmethod
    def distillation() -> None:
        """Return None: the teacher teaches narrow widths, too."""

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Return the teacher's scores or features.

        Raises: DataError: if its output is not one such row for each image.
        """
        with in_eval_mode(self.teacher):
            return [_rows(self.teacher(batch.views[0]), self.kind, len(batch.views[0]))]

    def forward(self, batch: Batch) -> Outcome:
        """Return the loss of the embeddings, compared with the teacher's output, and on scores perhaps with labels.

        Raises: DataError: if the encoder's embeddings have another size than the teacher's output.
        """
        student, (target,) = self.encoder(batch.views[0]), batch.targets
        if student.shape != target.shape:
            sizes = f"embeddings of shape {tuple(student.shape)} from a teacher's output of {tuple(target.shape)}"
            raise DataError(f"Distillation: cannot learn {sizes}; end the encoder with Distillation.projector(...)")
        if self.kind == "scores":
            temperatures = self.temperature, self.temperature
            loss = losses.soft_cross_entropy(student, target, *temperatures)
            loss = loss - losses.soft_cross_entropy(target, target, *temperatures)  # the teacher's entropy
            if self.label_weight:
                own = class_loss("Distillation", student, batch.labels)
                loss = (1 - self.label_weight) * loss + self.label_weight * own
        else:
            loss = (
                losses.squared_error(student, target) if self.kind == "mse" else losses.byol_loss(student, target) / 2
            )
        return Outcome(loss, [student], [student])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # of `to`, `cuda`, `double` and the like
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _rows(output: Any, kind: str, images: int) -> Tensor:
    """Return the part of a teacher's output that `kind` compares, of shape (images, size); see `Distillation`."""
    rows = output
    if not isinstance(output, Tensor):
        rows = getattr(output, "logits" if kind == "scores" else "pooler_output", None)
        tokens = getattr(output, "last_hidden_state", None)
        if rows is None and kind != "scores" and isinstance(tokens, Tensor) and tokens.ndim == 3:
            rows = tokens.mean(1)
    if isinstance(rows, Tensor) and rows.ndim == 4 and rows.shape[2:] == (1, 1):
        rows = rows.flatten(1)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != images or not rows.is_floating_point():
        found = f"a tensor of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(output).__name__}"
        named = "" if isinstance(output, Tensor) or not hasattr(output, "keys") else f" with {', '.join(output)}"
        wanted = f"floats of shape ({images}, classes)" if kind == "scores" else f"floats of shape ({images}, features)"
        way = "give a module that returns them, such as timm's, or wrap this one"
        raise DataError(f"Distillation: the teacher gives {found}{named}, but kind {kind!r} needs {wanted}; {way}")
    return rows.detach()
