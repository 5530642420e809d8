"""Losses for training all widths of a network at once: plain functions of tensors for any training code.

First online distillation, in which wider widths teach narrower ones, and the total loss over all widths, as in SlimCLR;
then the losses of self-supervised methods. All compute half-precision input in float32, and raise DataError for tensors
whose shapes or types do not fit, and UsageError for numbers out of range.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._checks import (
    are_class_numbers,
    check_floats,
    check_fraction,
    check_matrices,
    check_number,
    check_same_shape,
    checked,
    shown,
)
from slimmable._numerics import at_least_float32, matmul_without_autocast, standardised, unit_vectors
from slimmable._widths import check_widths
from slimmable.errors import DataError, UsageError, WidthError

__all__ = [
    "OnlineDistillation", "barlow_twins_loss", "byol_loss", "contrastive_cross_entropy", "decoupled_distillation",
    "dino_loss", "embedding_cross_entropy", "info_nce", "moco_logits", "moco_v3_logits", "moco_v3_loss", "nt_xent",
    "nt_xent_logits", "simsiam_loss", "slim_loss", "slim_term", "soft_cross_entropy", "squared_error",
    "standardised_distillation", "vicreg_loss", "width_weights",
]  # fmt: skip

DistillationKind = Literal["kl", "embedding", "mse", "dkd", "atkd"]


# -- distillation compares two outputs of shape (batch, classes); no gradient flows into the teacher
@checked
def soft_cross_entropy(
    student: Tensor, teacher: Tensor, teacher_temperature: float = 5.0, student_temperature: float = 5.0
) -> Tensor:
    """Return the cross-entropy of softmax(student / T_s) with targets softmax(teacher / T_t), times T_s^2, in nats.

    The distillation of SlimCLR (Zhao et al. 2024, "online distillation", after Hinton et al. 2015). The teacher's
    entropy is not subtracted; the gradient is that of the Kullback-Leibler divergence.

    >>> soft_cross_entropy(torch.zeros(2, 4), torch.zeros(2, 4), 1.0, 1.0)  # log 4
    tensor(1.3863)
    """
    student, teacher = _prepare("soft_cross_entropy", student, teacher)
    targets = (teacher / teacher_temperature).softmax(1)
    return student_temperature**2 * F.cross_entropy(student / student_temperature, targets)


@checked
def embedding_cross_entropy(
    student: Tensor, teacher: Tensor, teacher_temperature: float = 5.0, student_temperature: float = 5.0
) -> Tensor:
    """Return `soft_cross_entropy` of embeddings scaled to unit length, with features in place of classes.

    >>> z = torch.eye(2)
    >>> bool(embedding_cross_entropy(z, z) == embedding_cross_entropy(7 * z, z))
    True
    """
    student, teacher = map(unit_vectors, _prepare("embedding_cross_entropy", student, teacher))
    return soft_cross_entropy(student, teacher, teacher_temperature, student_temperature)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference over all elements, of logits or of embeddings already scaled to unit length.

    >>> squared_error(torch.zeros(2, 2), torch.full((2, 2), 3.0))
    tensor(9.)
    """
    return F.mse_loss(*_prepare("squared_error", student, teacher))


@checked
def decoupled_distillation(
    student: Tensor,
    teacher: Tensor,
    target: int | Tensor = 0,
    alpha: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Return the decoupled knowledge distillation loss (Zhao et al. 2022, eq. 7), times the temperature squared.

    `alpha` weights the divergence of "target or not", `beta` that among the other classes. `target` is the column of
    the right class: one for all rows, or a tensor of shape (batch,). In this package's logits it is column 0.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> decoupled_distillation(logits, logits)
    tensor(0.)
    """
    where = "decoupled_distillation"
    student, teacher = _prepare(where, student, teacher)
    batch, classes = student.shape
    if classes < 2:
        raise DataError(f"{where}: logits of shape {tuple(student.shape)} have no class other than the target")
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < classes:
        target = torch.full((batch,), target, device=student.device)
    if not isinstance(target, Tensor) or target.shape != (batch,) or not are_class_numbers(target):
        raise DataError(f"{where}: target must be a column below {classes}, or {batch} of them, got {shown(target)}")
    right = target.long()[:, None]
    columns = torch.arange(classes - 1, device=student.device)
    of_target, of_others = [], []
    for logits in (student / temperature, teacher / temperature):
        others = logits.gather(1, columns + (columns >= right))
        both = torch.cat([logits.gather(1, right), others.logsumexp(1, keepdim=True)], dim=1)
        of_target.append(both - logits.logsumexp(1, keepdim=True))
        of_others.append(others.log_softmax(1))
    return temperature**2 * (alpha * _divergence(*of_target) + beta * _divergence(*of_others))


@checked
def standardised_distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0, scale: float = 2.0) -> Tensor:
    """Return the divergence of logits that are standardised row by row and multiplied by `scale` ("atkd").

    This is the Kullback-Leibler divergence at `temperature`, times the temperature squared, as in the code of SlimCLR
    (Zhao et al. 2024). The gradient flows through the student's standardisation.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> standardised_distillation(logits, 10 * logits) < 1e-6
    tensor(True)
    """
    student, teacher = _prepare("standardised_distillation", student, teacher)
    standard = (F.layer_norm(logits, logits.shape[1:]) for logits in (student, teacher))
    return temperature**2 * _divergence(*((each * scale / temperature).log_softmax(1) for each in standard))


def _prepare(where: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape(where, student=student, teacher=teacher)
    return at_least_float32(student), at_least_float32(teacher.detach())


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of log-probabilities, averaged over the batch."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


_COMPARE: dict[str, Callable[..., Tensor]] = {
    "kl": soft_cross_entropy,
    "embedding": embedding_cross_entropy,
    "mse": squared_error,
    "dkd": decoupled_distillation,
    "atkd": standardised_distillation,
}


class OnlineDistillation(nn.Module):
    """The loss that pulls a narrow width's output towards the outputs of wider ones (SlimCLR, Zhao et al. 2024).

    Call it with the student's output and that of one teacher, or of several teachers from the widest down, all of shape
    (batch, classes). It returns a scalar; no gradient flows into a teacher.

    | kind | compares | published name |
    |---|---|---|
    | `kl` | logits, by `soft_cross_entropy` | seed loss (the paper's choice) |
    | `embedding` | embeddings, by `embedding_cross_entropy` | inplace distill |
    | `mse` | logits or normalised embeddings, by `squared_error` | mse |
    | `dkd` | logits with the right class in column 0, by `decoupled_distillation` | dkd |
    | `atkd` | logits, by `standardised_distillation` | atkd |

    Args:
        kind: one of the table.
        teacher_temperature, student_temperature: for `kl` and `embedding`; others use their publications' constants.
            The default is the paper's for MoCo v2 and SimCLR, whose logits are plain cosines; for MoCo v3's use 1.
        teachers: "widest" uses only the first of several teachers, "all wider" averages the losses over all of them.
        weight: fraction `a` of this loss in a width's loss, `(1 - a) own loss + a distillation`, in [0, 1].

    >>> distill = OnlineDistillation()
    >>> distill(torch.zeros(2, 4), torch.zeros(2, 4))  # 25 log 4, its floor
    tensor(34.6574)
    """

    @checked
    def __init__(
        self,
        kind: DistillationKind = "kl",
        teacher_temperature: float = 5.0,
        student_temperature: float = 5.0,
        teachers: Literal["widest", "all wider"] = "widest",
        weight: float = 0.5,
    ) -> None:
        super().__init__()
        check_fraction("OnlineDistillation", weight=weight)
        self.kind, self.teachers, self.weight = kind, teachers, weight
        self.teacher_temperature, self.student_temperature = teacher_temperature, student_temperature

    def forward(self, student: Tensor, teachers: Tensor | Sequence[Tensor], target: int | Tensor = 0) -> Tensor:
        """Return the loss of `student`; `target` is the column of the right class, which only `dkd` needs."""
        more = {"kl": self._temperatures, "embedding": self._temperatures, "dkd": (target,)}.get(self.kind, ())
        return torch.stack([_COMPARE[self.kind](student, teacher, *more) for teacher in self._chosen(teachers)]).mean()

    @checked
    @torch.no_grad()
    def floor(self, teachers: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the loss of a student that agrees with each of its teachers, which has no gradient.

        A cross-entropy is then the teacher's entropy, and above this floor a divergence; other kinds are zero anyway.

        >>> teacher = torch.zeros(2, 4)
        >>> distill = OnlineDistillation()
        >>> distill(teacher, teacher) - distill.floor(teacher)
        tensor(0.)
        """
        chosen = [at_least_float32(teacher) for teacher in self._chosen(teachers)]
        if self.kind not in ("kl", "embedding"):
            return chosen[0].new_zeros(())
        logits = chosen if self.kind == "kl" else [unit_vectors(teacher) for teacher in chosen]
        agreeing = self.student_temperature / self.teacher_temperature
        return torch.stack([soft_cross_entropy(agreeing * each, each, *self._temperatures) for each in logits]).mean()

    def _chosen(self, teachers: Tensor | Sequence[Tensor]) -> list[Tensor]:
        several = [teachers] if isinstance(teachers, Tensor) else teachers
        if not isinstance(several, Iterable):
            raise DataError(f"OnlineDistillation: teachers must be one or several tensors, got {teachers!r}")
        if not (chosen := list(several)):
            raise UsageError("OnlineDistillation: there is no teacher; give the output of at least one wider width")
        return chosen[:1] if self.teachers == "widest" else chosen

    @property
    def _temperatures(self) -> tuple[float, float]:
        return self.teacher_temperature, self.student_temperature

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        names = "kind", "teacher_temperature", "student_temperature", "teachers", "weight"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def width_weights(widths: Sequence[float], mode: str = "widest_plus_rest") -> tuple[float, ...]:
    """Return the weight `k` of each width's loss, in the order of `widths`.

    | mode | weight of width w | number in the published code |
    |---|---|---|
    | `ones` | 1 | 0 |
    | `share` | w over the sum of all widths | 1 |
    | `width` | w | 2 |
    | `scaled_share` | number of widths times `share` | 3 |
    | `widest_plus_rest` | widest: 1 + sum of the other widths; others: 1 (the paper's choice) | 5 |
    | `narrower_sums` | 1 + sum of the narrower widths, scaled to sum to the number of widths | 6 |
    | `widest_plus_second` | widest: 1 + second widest; others: 1 | 7 |

    From SlimCLR (Zhao et al. 2024, "loss re-weighting"), whose code rounds modes 1, 3 and 6 to three decimals.

    Raises: WidthError: if `widths` is invalid, or too short for the mode. UsageError: if the mode is unknown.

    >>> width_weights((1.0, 0.75, 0.5, 0.25))
    (2.5, 1.0, 1.0, 1.0)
    """
    widest, *narrower = check_widths(widths)
    count, total, second = len(widths), sum(widths), max(narrower, default=0.0)
    sums = [1 + sum(other for other in widths if other < width) for width in widths]
    modes = {
        "ones": [1.0] * count,
        "share": [width / total for width in widths],
        "width": widths,
        "scaled_share": [count * width / total for width in widths],
        "widest_plus_rest": [1 + (total - widest) if width == widest else 1.0 for width in widths],
        "narrower_sums": [count * each / sum(sums) for each in sums],
        "widest_plus_second": [1 + second if width == widest else 1.0 for width in widths],
    }
    if not isinstance(mode, str) or mode not in modes:
        raise UsageError(f"unknown mode {mode!r} of width weights; choose one of {', '.join(modes)}")
    if mode == "widest_plus_second" and not narrower:
        raise WidthError(f"mode 'widest_plus_second' needs at least two widths, got {list(widths)}")
    return tuple(map(float, modes[mode]))


@checked
def slim_term(
    loss: Tensor, distillation: Tensor | None = None, weight: float | Tensor = 1.0, distill_weight: float = 0.5
) -> Tensor:
    """Return one width's part of the step's loss, `k ((1 - a) C + a A)`, or `k C` without distillation.

    `C` is `loss`, `A` is `distillation`, `k` is `weight` and `a` is `distill_weight`.

    >>> slim_term(torch.tensor(2.0), torch.tensor(4.0), weight=10.0, distill_weight=0.25)
    tensor(25.)
    """
    check_floats("slim_term", 1, loss=loss, distillation=loss if distillation is None else distillation)
    if not isinstance(weight, Tensor) or weight.numel() != 1:
        check_number("slim_term", weight=weight)
    if distillation is None:
        return weight * loss
    return weight * ((1 - distill_weight) * loss + distill_weight * distillation)


@checked
def slim_loss(
    losses: Sequence[Tensor],
    distillations: Sequence[Tensor] = (),
    weights: Sequence[float] | None = None,
    distill_weight: float = 0.5,
) -> Tensor:
    """Return the loss of SlimCLR, `k_1 C_1 + sum of k_w ((1 - a) C_w + a A_w)` (Zhao et al. 2024).

    A training loop need not hold all widths' graphs at once: `SlimRecipe` calls `backward` term by term.

    Args:
        losses: the scalar `C_w` of each width, from the widest down; during the slow start only the widest's.
        distillations: the scalar `A_w` of each width except the widest, or none, which sets a = 0.
        weights, distill_weight: the `k_w`, as from `width_weights`, or None for 1 everywhere; `a`, in [0, 1].

    Raises: UsageError: if the numbers of losses and weights do not match.

    >>> c, a = [torch.tensor(3.0), torch.tensor(5.0)], [torch.tensor(7.0)]
    >>> slim_loss(c, a, weights=(1.5, 1.0))  # 1.5 * 3 + (5 + 7) / 2
    tensor(10.5000)
    """
    for name, each in {"losses": losses, "distillations": distillations, "weights": weights}.items():
        if isinstance(each, (str, Mapping)):
            raise UsageError(f"slim_loss: {name} must be a list with an entry for each width, got {each!r:.80}")
    factors = [1.0] * len(losses) if weights is None else weights
    lessons = [None, *distillations] if len(distillations) else [None] * max(1, len(losses))
    if not len(losses) == len(lessons) == len(factors):
        given = f"{len(losses)} losses, {len(distillations)} distillation losses and {len(factors)} weights"
        raise UsageError(f"slim_loss: {given}; give one of each for each width, without distillation of the widest")
    terms = zip(losses, lessons, factors, strict=True)
    check_floats("slim_loss", 1, **{f"distillations[{at}]": each for at, each in enumerate(distillations)})
    return torch.stack([slim_term(loss, a, weight, distill_weight).reshape(()) for loss, a, weight in terms]).sum()


# -- self-supervised losses; all `*_logits` functions put the positive pair in column 0 and the negatives in the others,
# and scale embeddings to unit length, so raw and normalised ones give the same value
@checked
def contrastive_cross_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy of `logits / temperature` with column 0 as the right class, a scalar in nats.

    `logits` has shape (batch, 1 + negatives). If distillation needs them anyway, compute them once and call this.

    >>> contrastive_cross_entropy(torch.zeros(3, 5), temperature=0.2)  # all columns alike: log 5
    tensor(1.6094)
    """
    check_matrices("contrastive_cross_entropy", logits=logits)
    return F.cross_entropy(at_least_float32(logits) / temperature, logits.new_zeros(len(logits), dtype=torch.long))


def moco_logits(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """Return the cosines of MoCo (He et al. 2020, algorithm 1), not divided by a temperature.

    `query` and `key` have shape (batch, dim), `queue` (dim, negatives), the result (batch, 1 + negatives), with the
    cosine of `query[i]` and `key[i]` in column 0. Later changes to `queue` do not affect it.

    >>> moco_logits(torch.eye(2), torch.eye(2), torch.tensor([[3.0], [4.0]]))[0]
    tensor([1.0000, 0.6000])
    """
    check_same_shape("moco_logits", query=query, key=key)
    check_matrices("moco_logits", query=query, queue=queue)
    if queue.shape[0] != query.shape[1]:
        raise DataError(f"moco_logits: queue has shape {tuple(queue.shape)}, expected ({query.shape[1]}, negatives)")
    query = unit_vectors(query)
    positives = (query * unit_vectors(key)).sum(1, keepdim=True)
    return torch.cat([positives, matmul_without_autocast(query, unit_vectors(queue, dim=0))], dim=1)


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """Return the InfoNCE loss of MoCo v2, a scalar in nats (He et al. 2020, eq. 1; temperature of Chen et al. 2020).

    Shapes are those of `moco_logits`. The queue must not yet hold the keys of this batch.

    >>> query = torch.eye(4, 8)
    >>> queue = torch.eye(8)[:, 4:]  # orthogonal to all queries
    >>> info_nce(query, query, queue, temperature=1.0)  # log(e + 4) - 1
    tensor(0.9048)
    """
    return contrastive_cross_entropy(moco_logits(query, key, queue), temperature)


def nt_xent_logits(z0: Tensor, z1: Tensor) -> Tensor:
    """Return the cosines of SimCLR among all 2n embeddings of two views, not divided by a temperature.

    `z0` and `z1` have shape (n, dim), with row i of both from the same image; the result has shape (2n, 2n - 1), with
    the rows of `z0` first. Column 0 is the other view of the same image, followed by the other images in the other view
    and then in the same view. With several processes, gather both views first (`slimmable.training.gather`).

    >>> nt_xent_logits(torch.eye(2), torch.eye(2))[3]
    tensor([1., 0., 0.])
    """
    check_same_shape("nt_xent_logits", z0=z0, z1=z1)
    z0, z1 = unit_vectors(z0), unit_vectors(z1)
    across = matmul_without_autocast(z0, z1.T)
    positives = across.diagonal()[:, None]
    within = (matmul_without_autocast(z, z.T) for z in (z0, z1))
    rows = zip(map(_off_diagonal, (across, across.T)), map(_off_diagonal, within), strict=True)
    return torch.cat([torch.cat([positives, *negatives], dim=1) for negatives in rows])


def nt_xent(z0: Tensor, z1: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the NT-Xent loss of SimCLR, a scalar in nats: the mean over all 2n embeddings (Chen et al. 2020, eq. 1).

    Shapes are those of `nt_xent_logits`.

    >>> nt_xent(torch.ones(4, 8), torch.ones(4, 8))  # all alike: log(2n - 1)
    tensor(1.9459)
    """
    return contrastive_cross_entropy(nt_xent_logits(z0, z1), temperature)


@checked
def moco_v3_logits(query: Tensor, keys: Tensor, temperature: float = 1.0, offset: int = 0) -> Tensor:
    """Return the logits of MoCo v3 for one direction: cosines divided by `temperature`, the positive in column 0.

    `query` has shape (batch, dim) and `keys` (n, dim) with n >= batch; row `offset + i` of `keys` is the positive of
    `query[i]`. For keys gathered from several processes, `offset` is `rank * batch`. The result has shape (batch, n).

    >>> moco_v3_logits(torch.eye(2), torch.eye(2), temperature=0.5)[1]
    tensor([2., 0.])
    """
    check_matrices("moco_v3_logits", query=query, keys=keys)
    batch, end = query.shape[0], offset + query.shape[0]
    if keys.shape[1] != query.shape[1] or not 0 <= offset <= keys.shape[0] - batch:
        given = f"keys of shape {tuple(keys.shape)} do not have the positives of queries {tuple(query.shape)}"
        raise DataError(f"moco_v3_logits: {given}, rows {offset} to {end} from offset {offset}")
    logits = matmul_without_autocast(unit_vectors(query), unit_vectors(keys).T) / temperature
    own = logits[:, offset:end]
    return torch.cat([own.diagonal()[:, None], logits[:, :offset], _off_diagonal(own), logits[:, end:]], dim=1)


@checked
def moco_v3_loss(query: Tensor, keys: Tensor, temperature: float = 1.0, offset: int = 0) -> Tensor:
    """Return the loss of MoCo v3 for one direction, a scalar: cross-entropy times `2 * temperature`.

    A step's loss is symmetric: `moco_v3_loss(q0, k1) + moco_v3_loss(q1, k0)` (Chen et al. 2021, algorithm 1; the
    temperature is 1.0 for ResNets and 0.2 for vision transformers). Shapes are those of `moco_v3_logits`.

    >>> moco_v3_loss(torch.ones(4, 8), torch.ones(4, 8))  # all alike: 2 log 4
    tensor(2.7726)
    """
    return 2 * temperature * contrastive_cross_entropy(moco_v3_logits(query, keys, temperature, offset), 1.0)


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the loss of BYOL for one direction, a scalar: the mean squared distance of unit vectors, `2 - 2 cosine`.

    Both arguments have shape (batch, dim). No gradient flows into `target`, the momentum encoder's embedding of the
    other view. A step's loss is symmetric: `byol_loss(p0, z1) + byol_loss(p1, z0)` (Grill et al. 2020, eq. 2).

    >>> byol_loss(torch.eye(2), torch.ones(2, 2))  # 2 - sqrt(2)
    tensor(0.5858)
    """
    check_same_shape("byol_loss", prediction=prediction, target=target)
    return 2 - 2 * (unit_vectors(prediction) * unit_vectors(target.detach())).sum(1).mean()


def simsiam_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the loss of SimSiam for one direction, a scalar: the mean negative cosine (Chen and He 2021, eq. 1).

    Arguments are as for `byol_loss`. A step's loss is `(simsiam_loss(p0, z1) + simsiam_loss(p1, z0)) / 2` (eq. 4).

    >>> simsiam_loss(torch.eye(2), torch.ones(2, 2))  # -1 / sqrt(2)
    tensor(-0.7071)
    """
    check_same_shape("simsiam_loss", prediction=prediction, target=target)
    return -(unit_vectors(prediction) * unit_vectors(target.detach())).sum(1).mean()


@checked
def vicreg_loss(
    z0: Tensor, z1: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """Return the VICReg loss, a scalar: its three terms times the three factors (Bardes et al. 2022, eq. 1-6).

    `z0` and `z1` are raw embeddings of shape (batch >= 2, dim), with row i of both from the same image. The variance
    and covariance terms are summed over the two views, not averaged, as in the code of Krishna et al. 2023 (VICReg's
    own halves the variance term). With several processes, gather both views first (`slimmable.training.gather`).

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # std .816 per feature, uncorrelated
    >>> vicreg_loss(z, z)
    tensor(9.1721)
    """
    check_same_shape("vicreg_loss", z0=z0, z1=z1)
    if z0.shape[0] < 2:
        raise DataError(f"vicreg_loss: batch of shape {tuple(z0.shape)} has no variance; give two images or more")
    z0, z1 = at_least_float32(z0), at_least_float32(z1)
    loss = invariance * F.mse_loss(z0, z1)
    for z in (z0, z1):
        loss = loss + variance * F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()
        centred = z - z.mean(0)
        covariances = matmul_without_autocast(centred.T, centred) / (len(z) - 1)
        loss = loss + covariance * _off_diagonal(covariances).square().sum() / z.shape[1]
    return loss


@checked
def barlow_twins_loss(z0: Tensor, z1: Tensor, redundancy: float = 5e-3) -> Tensor:
    """Return the loss of Barlow Twins, a scalar (Zbontar et al. 2021, eq. 1; `redundancy` is its lambda).

    `z0` and `z1` are as for `vicreg_loss`. Each feature is standardised over the batch, with 1e-5 added to its
    variance. The features' correlations between the views should be 1, and 0 between different ones.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # uncorrelated features
    >>> barlow_twins_loss(z, z) < 1e-6, barlow_twins_loss(z, -z)  # 2 features, (1 - -1)^2 each
    (tensor(True), tensor(7.9998))
    """
    check_same_shape("barlow_twins_loss", z0=z0, z1=z1)
    if z0.shape[0] < 2:
        raise DataError(f"barlow_twins_loss: batch of shape {tuple(z0.shape)} has no variance; give two images or more")
    correlations = matmul_without_autocast(standardised(z0).T, standardised(z1)) / len(z0)
    return (correlations.diagonal() - 1).square().sum() + redundancy * _off_diagonal(correlations).square().sum()


@checked
def dino_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    center: Tensor | None = None,
    teacher_temperature: float = 0.04,
    student_temperature: float = 0.1,
) -> Tensor:
    """Return the loss of DINO, a scalar in nats: the mean cross-entropy over pairs of views (Caron et al. 2021, eq. 3).

    Args:
        students, teachers: the outputs for each view, of shape (batch, classes), those of the teacher's views first. A
            view of the student is compared with all of the teacher's but itself; no gradient flows into the teacher.
        center: moving average of the teacher's outputs, of shape (classes), which is subtracted from them.
        teacher_temperature, student_temperature: temperatures of the two softmaxes.

    >>> dino_loss([torch.zeros(3, 5)] * 4, [torch.zeros(3, 5)] * 2)  # nothing learnt: log 5
    tensor(1.6094)
    """
    pairs = len(students) * len(teachers) - min(len(students), len(teachers))
    if pairs < 1:
        raise DataError(f"dino_loss: {len(students)} and {len(teachers)} outputs are not of two different views")
    named = {f"students[{at}]": each for at, each in enumerate(students)}
    check_same_shape("dino_loss", **named, **{f"teachers[{at}]": each for at, each in enumerate(teachers)})
    shift = students[0].new_zeros(students[0].shape[1:]) if center is None else center
    check_matrices("dino_loss", center=shift[None])
    if shift.shape != students[0].shape[1:]:
        raise DataError(f"dino_loss: center has shape {tuple(shift.shape)}, expected {tuple(students[0].shape[1:])}")
    targets = [((at_least_float32(each.detach()) - shift) / teacher_temperature).softmax(1) for each in teachers]
    total = torch.stack(targets).sum(0)  # the cross-entropy is linear in its targets
    others = [*(total - each for each in targets), *[total] * (len(students) - len(teachers))]
    scaled = [at_least_float32(each) / student_temperature for each in students]
    return torch.stack([F.cross_entropy(*pair) for pair in zip(scaled, others, strict=False)]).sum() / pairs


def _off_diagonal(square: Tensor) -> Tensor:
    """Return the entries off the diagonal of a matrix of shape (n, n), as shape (n, n - 1)."""
    n = square.shape[0]
    # After its first entry, the flattened matrix is n - 1 runs of n entries, each followed by a diagonal one.
    return square.reshape(-1)[1:].reshape(n - 1, n + 1)[:, :n].reshape(n, n - 1)
