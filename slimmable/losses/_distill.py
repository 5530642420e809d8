"""What a student's output is asked to share with a teacher's: the divergences of online distillation.

All take matrices of one shape (batch, classes), return a scalar and let no gradient into the teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from slimmable.errors import DataError
from slimmable.losses._checks import check_factor, check_same_shape, check_temperature
from slimmable.losses._cosines import at_least_float32, unit


def soft_cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, teacher_temperature: float = 5.0, student_temperature: float = 5.0
) -> torch.Tensor:
    """Return the cross-entropy from softmax(teacher / T_t) to softmax(student / T_s), times T_s squared, in nats.

    The distillation of SlimCLR (Zhao et al. 2024, "online distillation", after Hinton et al. 2015). The teacher's
    entropy is not subtracted; the gradient is that of the Kullback-Leibler divergence.

    Raises: DataError: if shapes differ. UsageError: if a temperature is not positive.

    >>> soft_cross_entropy(torch.zeros(2, 4), torch.zeros(2, 4), 1.0, 1.0)  # log 4
    tensor(1.3863)
    """
    student, teacher = _prepare("soft_cross_entropy", student, teacher)
    check_temperature("soft_cross_entropy", "teacher_temperature", teacher_temperature)
    check_temperature("soft_cross_entropy", "student_temperature", student_temperature)
    targets = (teacher / teacher_temperature).softmax(1)
    return student_temperature**2 * F.cross_entropy(student / student_temperature, targets)


def embedding_cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, teacher_temperature: float = 5.0, student_temperature: float = 5.0
) -> torch.Tensor:
    """Return `soft_cross_entropy` of embeddings scaled to unit length, their features taken for classes.

    Raises: DataError: if shapes differ. UsageError: if a temperature is not positive.

    >>> z = torch.eye(2)
    >>> bool(embedding_cross_entropy(z, z) == embedding_cross_entropy(7 * z, z))
    True
    """
    student, teacher = _prepare("embedding_cross_entropy", student, teacher)
    return soft_cross_entropy(unit(student), unit(teacher), teacher_temperature, student_temperature)


def squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference over all elements, of logits or of embeddings (scaled to unit length before).

    Raises: DataError: if shapes differ.

    >>> squared_error(torch.zeros(2, 2), torch.full((2, 2), 3.0))
    tensor(9.)
    """
    student, teacher = _prepare("squared_error", student, teacher)
    return F.mse_loss(student, teacher)


def decoupled(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: int | torch.Tensor = 0,
    alpha: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return the decoupled knowledge distillation loss (Zhao et al. 2022, eq. 7), times the temperature squared.

    `alpha` weighs the divergence of "target or not", `beta` that among the other classes. `target` is the column of
    the right class: one for all rows, or a tensor of shape (batch,). The logits of this package have it in column 0.

    Raises: DataError: if shapes do not fit, or there is only one class. UsageError: if the temperature is not positive,
        or a weight is negative.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> decoupled(logits, logits)
    tensor(0.)
    """
    student, teacher = _prepare("decoupled", student, teacher)
    check_temperature("decoupled", "temperature", temperature)
    check_factor("decoupled", "alpha", alpha)
    check_factor("decoupled", "beta", beta)
    of_target, of_others = [], []
    for logits in (student / temperature, teacher / temperature):
        right, others = _split(logits, target)
        total = logits.logsumexp(1, keepdim=True)
        of_target.append(torch.cat([right, others.logsumexp(1, keepdim=True)], dim=1) - total)
        of_others.append(others.log_softmax(1))
    return temperature**2 * (alpha * _divergence(*of_target) + beta * _divergence(*of_others))


def standardised(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 4.0, scale: float = 2.0
) -> torch.Tensor:
    """Return the divergence of logits that are standardised row by row and multiplied by `scale` ("atkd").

    Kullback-Leibler divergence at `temperature`, times the temperature squared; the gradient flows through the
    student's standardisation. As in the code of SlimCLR (Zhao et al. 2024).

    Raises: DataError: if shapes differ. UsageError: if the temperature or `scale` is not positive.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> standardised(logits, 10 * logits) < 1e-6
    tensor(True)
    """
    student, teacher = _prepare("standardised", student, teacher)
    check_temperature("standardised", "temperature", temperature)
    check_temperature("standardised", "scale", scale)
    classes = student.shape[1:]
    return temperature**2 * _divergence(
        (F.layer_norm(student, classes) * scale / temperature).log_softmax(1),
        (F.layer_norm(teacher, classes) * scale / temperature).log_softmax(1),
    )


def _prepare(where: str, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_same_shape(where, student=student, teacher=teacher)
    return at_least_float32(student), at_least_float32(teacher.detach())


def _divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from log-probabilities `teacher` to `student`, mean over the batch."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _split(logits: torch.Tensor, target: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split into the logit of the target, shape (batch, 1), and the others, shape (batch, classes - 1)."""
    batch, classes = logits.shape
    if classes < 2:
        raise DataError(f"decoupled: logits of shape {tuple(logits.shape)} have no other class than the target")
    if isinstance(target, int):
        if not 0 <= target < classes:
            raise DataError(f"decoupled: target column {target} is not among the {classes} classes")
        others = torch.cat([logits[:, :target], logits[:, target + 1 :]], dim=1) if target else logits[:, 1:]
        return logits[:, target : target + 1], others
    if not isinstance(target, torch.Tensor):
        raise DataError(f"decoupled: target must be a column number or a tensor of them, got {target!r}")
    if target.shape != (batch,) or target.is_floating_point():
        raise DataError(
            f"decoupled: target has shape {tuple(target.shape)} and type {target.dtype}, expected {batch} column "
            f"numbers for logits of shape {tuple(logits.shape)}"
        )
    right = target.long()[:, None]
    columns = torch.arange(classes - 1, device=logits.device)
    return logits.gather(1, right), logits.gather(1, columns + (columns >= right))
