"""Online distillation: wider widths teach narrower ones within the same training step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from slimmable.errors import DataError, UsageError
from slimmable.losses import _distill
from slimmable.losses._checks import check_share, check_temperature

Kind = Literal["kl", "embedding", "mse", "dkd", "atkd"]
Teachers = Literal["widest", "all wider"]


class OnlineDistillation(nn.Module):
    """The loss that draws a narrow width's output to the wider ones' outputs (SlimCLR, Zhao et al. 2024).

    Called with the student's output and that of one teacher, or of several from the widest on; all of shape
    (batch, classes). Returns a scalar. No gradient flows into a teacher.

    | kind | compares | published name |
    |---|---|---|
    | `kl` | logits, by `soft_cross_entropy` | seed loss (the paper's choice) |
    | `embedding` | embeddings, by `embedding_cross_entropy` | inplace distill |
    | `mse` | logits or normalised embeddings, by `squared_error` | mse |
    | `dkd` | logits with the right answer in column 0, by `decoupled` | dkd |
    | `atkd` | logits, by `standardised` | atkd |

    Args:
        kind: one of the table.
        teacher_temperature: of `kl` and `embedding`; the others have the constants of their publications. The default
            is the paper's for MoCo v2 and SimCLR, whose logits are plain cosines; MoCo v3 takes 1 and logits divided
            by its own temperature.
        student_temperature: the same for the student.
        teachers: "widest" takes the first of several teachers, "all wider" the mean of the losses to all.
        weight: share `a` of this loss in a width's loss, `(1 - a) contrastive + a distillation`, in [0, 1].

    Raises: UsageError: if an argument is not one of these. DataError: when called with shapes that differ.

    >>> distill = OnlineDistillation()
    >>> distill
    OnlineDistillation(kind='kl', teacher_temperature=5.0, student_temperature=5.0, teachers='widest', weight=0.5)
    >>> distill(torch.zeros(2, 4), torch.zeros(2, 4))  # 25 log 4
    tensor(34.6574)
    """

    def __init__(
        self,
        kind: Kind = "kl",
        teacher_temperature: float = 5.0,
        student_temperature: float = 5.0,
        teachers: Teachers = "widest",
        weight: float = 0.5,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise UsageError(f"OnlineDistillation: unknown kind {kind!r}; there are {', '.join(get_args(Kind))}")
        if teachers not in get_args(Teachers):
            raise UsageError(f"OnlineDistillation: teachers must be 'widest' or 'all wider', got {teachers!r}")
        check_share("OnlineDistillation", "weight", weight)
        check_temperature("OnlineDistillation", "teacher_temperature", teacher_temperature)
        check_temperature("OnlineDistillation", "student_temperature", student_temperature)
        self.kind: Kind = kind
        self.teacher_temperature = teacher_temperature
        self.student_temperature = student_temperature
        self.teachers: Teachers = teachers
        self.weight = weight

    def forward(
        self, student: torch.Tensor, teachers: torch.Tensor | Sequence[torch.Tensor], target: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """Return the loss of `student`; `target` is the right answer's column, needed by `dkd` only."""
        if isinstance(teachers, torch.Tensor):
            teachers = [teachers]
        elif not isinstance(teachers, Iterable):
            raise DataError(f"OnlineDistillation: teachers must be one or several tensors, got {teachers!r}")
        several = list(teachers)
        if not several:
            raise UsageError("OnlineDistillation: there is no teacher; give the output of at least one wider width")
        chosen = several[:1] if self.teachers == "widest" else several
        return torch.stack([self._compare(student, teacher, target) for teacher in chosen]).mean()

    def _compare(self, student: torch.Tensor, teacher: torch.Tensor, target: int | torch.Tensor) -> torch.Tensor:
        if self.kind == "kl":
            return _distill.soft_cross_entropy(student, teacher, self.teacher_temperature, self.student_temperature)
        if self.kind == "embedding":
            return _distill.embedding_cross_entropy(
                student, teacher, self.teacher_temperature, self.student_temperature
            )
        if self.kind == "mse":
            return _distill.squared_error(student, teacher)
        if self.kind == "dkd":
            return _distill.decoupled(student, teacher, target)
        return _distill.standardised(student, teacher)

    def extra_repr(self) -> str:
        """Return the settings, as in the constructor."""
        names = ("kind", "teacher_temperature", "student_temperature", "teachers", "weight")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
