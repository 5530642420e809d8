"""Losses of MoCo v2 and v3, SimCLR, BYOL, SimSiam, VICReg, Barlow Twins and DINO, and what distillation compares.

All `*_logits` functions put the positive pair in column 0 and the negatives in the others. They scale embeddings to
unit length, so raw and normalised ones give the same value, and compute half-precision input in float32.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slimmable._checks import check_matrices, check_same_shape, checked
from slimmable._numerics import at_least_float32, matmul_without_autocast, standardised, unit_vectors
from slimmable.errors import DataError


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

    >>> moco_logits(torch.eye(2), torch.eye(2), torch.tensor([[3.0], [4.0]]))
    tensor([[1.0000, 0.6000],
            [1.0000, 0.8000]])
    """
    check_same_shape("moco_logits", query=query, key=key)
    check_matrices("moco_logits", query=query, queue=queue)
    if queue.shape[0] != query.shape[1]:
        hint = "; it seems transposed" if queue.shape[1] == query.shape[1] else ""
        expected = f"expected ({query.shape[1]}, negatives) for queries of shape {tuple(query.shape)}"
        raise DataError(f"moco_logits: queue has shape {tuple(queue.shape)}, {expected}{hint}")
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

    >>> nt_xent_logits(torch.eye(2), torch.eye(2))
    tensor([[1., 0., 0.],
            [1., 0., 0.],
            [1., 0., 0.],
            [1., 0., 0.]])
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
    """Return the logits of MoCo v3 for one direction: cosines divided by `temperature`.

    `query` has shape (batch, dim) and `keys` (n, dim) with n >= batch; row `offset + i` of `keys` is the positive of
    `query[i]`. For keys gathered from several processes, `offset` is `rank * batch`. The result has shape (batch, n):
    the positive in column 0, then the other keys in order.

    >>> moco_v3_logits(torch.eye(2), torch.eye(2), temperature=0.5)
    tensor([[2., 0.],
            [2., 0.]])
    """
    check_matrices("moco_v3_logits", query=query, keys=keys)
    batch, end = query.shape[0], offset + query.shape[0]
    if keys.shape[1] != query.shape[1] or not 0 <= offset <= keys.shape[0] - batch:
        given = f"query {tuple(query.shape)}, keys {tuple(keys.shape)}, offset {offset}"
        expected = f"keys of {query.shape[1]} features, with rows {offset} to {end} as the queries' positives"
        raise DataError(f"moco_v3_logits: {given}: expected {expected}")
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

    Both arguments have shape (batch, dim). No gradient flows into `target`, the embedding of the other view. A step's
    loss is symmetric: `(simsiam_loss(p0, z1) + simsiam_loss(p1, z0)) / 2` (eq. 4).

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
        raise DataError(f"vicreg_loss: batch of shape {tuple(z0.shape)} has no variance; give at least two images")
    z0, z1 = at_least_float32(z0), at_least_float32(z1)
    loss = invariance * F.mse_loss(z0, z1)
    for z in (z0, z1):
        loss = loss + variance * F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()
        centred = z - z.mean(0)
        covariances = matmul_without_autocast(centred.T, centred) / (len(z) - 1)
        others = covariances - torch.diag(covariances.diagonal())  # of different features
        loss = loss + covariance * others.square().sum() / z.shape[1]
    return loss


@checked
def barlow_twins_loss(z0: Tensor, z1: Tensor, redundancy: float = 5e-3) -> Tensor:
    """Return the loss of Barlow Twins, a scalar (Zbontar et al. 2021, eq. 1; `redundancy` is its lambda).

    `z0` and `z1` are raw embeddings of shape (batch >= 2, dim), with row i of both from the same image. Each feature is
    standardised over the batch, with 1e-5 added to its variance. The features' correlations between the views should
    be 1, and 0 between different ones. With several processes, gather both views first (`slimmable.training.gather`).

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # uncorrelated features
    >>> barlow_twins_loss(z, z) < 1e-6, barlow_twins_loss(z, -z)  # 2 features, (1 - -1)^2 each
    (tensor(True), tensor(7.9998))
    """
    check_same_shape("barlow_twins_loss", z0=z0, z1=z1)
    if z0.shape[0] < 2:
        raise DataError(
            f"barlow_twins_loss: batch of shape {tuple(z0.shape)} has no variance; give at least two images"
        )
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
