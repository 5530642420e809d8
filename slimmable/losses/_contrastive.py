"""Losses of MoCo v2, SimCLR, MoCo v3 and BYOL, and the logits that online distillation compares.

All `*_logits` functions put the positive pair into column 0, the negatives behind it. Embeddings are scaled to unit
length here, so raw ones and normalised ones give the same value. Half-precision input is computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from slimmable.errors import DataError
from slimmable.losses._checks import check_matrix, check_same_shape, check_temperature
from slimmable.losses._cosines import at_least_float32, products, unit, without_diagonal


def contrast(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean cross-entropy of picking column 0 by `logits / temperature`.

    The core of the losses below: where the logits are needed anyway, for distillation, computing them once and calling
    this saves the second matrix product. `logits` has shape (batch, 1 + negatives).

    Raises: DataError: if `logits` is no floating-point matrix. UsageError: if `temperature` is not positive.

    >>> contrast(torch.zeros(3, 5), temperature=0.2)  # nothing to choose by: log 5
    tensor(1.6094)
    """
    check_matrix("contrast", "logits", logits)
    check_temperature("contrast", "temperature", temperature)
    positive = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
    return F.cross_entropy(at_least_float32(logits) / temperature, positive)


def moco_logits(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    """Return the cosines of MoCo (He et al. 2020, algorithm 1), not divided by a temperature.

    `query` and `key` have shape (batch, dim), `queue` (dim, negatives) as in MoCo; the result (batch, 1 + negatives),
    with `query[i] . key[i]` in column 0. The result does not depend on later changes of `queue`.

    Raises: DataError: if shapes do not fit.

    >>> moco_logits(torch.eye(2), torch.eye(2), torch.tensor([[3.0], [4.0]]))
    tensor([[1.0000, 0.6000],
            [1.0000, 0.8000]])
    """
    check_same_shape("moco_logits", query=query, key=key)
    check_matrix("moco_logits", "queue", queue)
    if queue.shape[0] != query.shape[1]:
        hint = "; it seems transposed" if queue.shape[1] == query.shape[1] else ""
        raise DataError(
            f"moco_logits: queue has shape {tuple(queue.shape)}, expected ({query.shape[1]}, negatives) "
            f"for queries of shape {tuple(query.shape)}{hint}"
        )
    query = unit(query)
    positives = (query * unit(key)).sum(1, keepdim=True)
    return torch.cat([positives, products(query, unit(queue, dim=0))], dim=1)


def info_nce(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, temperature: float = 0.2) -> torch.Tensor:
    """Return the InfoNCE loss of MoCo v2, a scalar in nats (He et al. 2020, eq. 1; temperature of Chen et al. 2020).

    Shapes and `Raises` as in `moco_logits`; the queue must not hold the keys of this batch yet.

    >>> query = torch.eye(4, 8)
    >>> queue = torch.eye(8)[:, 4:]  # orthogonal to all queries
    >>> info_nce(query, query, queue, temperature=1.0)  # log(e + 4) - 1
    tensor(0.9048)
    """
    return contrast(moco_logits(query, key, queue), temperature)


def nt_xent_logits(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    """Return the cosines of SimCLR among all 2n embeddings of two views, not divided by a temperature.

    `z0` and `z1` have shape (n, dim), row i of both from the same image; the result (2n, 2n - 1), rows of `z0` first.
    Column 0 is the other view of the same image, then follow the other images in the other view, then those in the
    same view. With several processes, give both views gathered, by `slimmable.training.gather`.

    Raises: DataError: if shapes differ or are no matrices.

    >>> nt_xent_logits(torch.eye(2), torch.eye(2))
    tensor([[1., 0., 0.],
            [1., 0., 0.],
            [1., 0., 0.],
            [1., 0., 0.]])
    """
    check_same_shape("nt_xent_logits", z0=z0, z1=z1)
    z0, z1 = unit(z0), unit(z1)
    across = products(z0, z1.T)
    positives = across.diagonal()[:, None]
    return torch.cat(
        [
            torch.cat([positives, without_diagonal(across), without_diagonal(products(z0, z0.T))], dim=1),
            torch.cat([positives, without_diagonal(across.T), without_diagonal(products(z1, z1.T))], dim=1),
        ]
    )


def nt_xent(z0: torch.Tensor, z1: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Return the NT-Xent loss of SimCLR, a scalar in nats: the mean over all 2n embeddings (Chen et al. 2020, eq. 1).

    Shapes and `Raises` as in `nt_xent_logits`.

    >>> nt_xent(torch.ones(4, 8), torch.ones(4, 8))  # all alike: log(2n - 1)
    tensor(1.9459)
    """
    return contrast(nt_xent_logits(z0, z1), temperature)


def moco_v3_logits(query: torch.Tensor, keys: torch.Tensor, temperature: float = 1.0, offset: int = 0) -> torch.Tensor:
    """Return the logits of MoCo v3 for one direction: cosines, here divided by `temperature`.

    `query` has shape (batch, dim) and `keys` (n, dim) with n >= batch; row `offset + i` of `keys` is the positive of
    `query[i]`. So gathered keys of several processes go in with `offset = rank * batch`. The result has shape
    (batch, n), the positive in column 0, the other keys behind it in their order.

    Raises: DataError: if shapes do not fit. UsageError: if `temperature` is not positive.

    >>> moco_v3_logits(torch.eye(2), torch.eye(2), temperature=0.5)
    tensor([[2., 0.],
            [2., 0.]])
    """
    check_matrix("moco_v3_logits", "query", query)
    check_matrix("moco_v3_logits", "keys", keys)
    check_temperature("moco_v3_logits", "temperature", temperature)
    batch, end = query.shape[0], offset + query.shape[0]
    if keys.shape[1] != query.shape[1] or not 0 <= offset <= keys.shape[0] - batch:
        raise DataError(
            f"moco_v3_logits: query {tuple(query.shape)}, keys {tuple(keys.shape)}, offset {offset}: expected "
            f"keys of {query.shape[1]} features, with rows {offset} to {end} as the queries' positives"
        )
    logits = products(unit(query), unit(keys).T) / temperature
    own = logits[:, offset:end]
    return torch.cat([own.diagonal()[:, None], logits[:, :offset], without_diagonal(own), logits[:, end:]], dim=1)


def moco_v3(query: torch.Tensor, keys: torch.Tensor, temperature: float = 1.0, offset: int = 0) -> torch.Tensor:
    """Return the loss of MoCo v3 for one direction, a scalar: cross-entropy times `2 * temperature`.

    The loss of a step is symmetric: `moco_v3(q0, k1) + moco_v3(q1, k0)` (Chen et al. 2021, algorithm 1; the temperature
    is 1.0 for ResNets and 0.2 for vision transformers). Shapes and `Raises` as in `moco_v3_logits`.

    >>> moco_v3(torch.ones(4, 8), torch.ones(4, 8))  # all alike: 2 log 4
    tensor(2.7726)
    """
    return 2 * temperature * contrast(moco_v3_logits(query, keys, temperature, offset), 1.0)


def byol(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the loss of BYOL for one direction, a scalar: the mean squared distance of unit vectors, `2 - 2 cosine`.

    Both have shape (batch, dim). No gradient flows into `target`, the momentum encoder's embedding of the other view.
    The loss of a step is symmetric: `byol(p0, z1) + byol(p1, z0)` (Grill et al. 2020, eq. 2).

    Raises: DataError: if shapes differ or are no matrices.

    >>> byol(torch.eye(2), torch.ones(2, 2))  # 2 - sqrt(2)
    tensor(0.5858)
    """
    check_same_shape("byol", prediction=prediction, target=target)
    return 2 - 2 * (unit(prediction) * unit(target.detach())).sum(1).mean()
