"""The momentum encoder and the queue of MoCo v2, for a network that runs at several widths."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._errors import DataError, UsageError


class MoCo(nn.Module):
    """Key encoder and queue (He et al. 2020, algorithm 1), sized and timed as in SlimCLR (Zhao et al. 2024).

    The key encoder runs at the full width only. Once per step call `keys`, which first moves the key encoder's
    parameters towards the network's, and, after the last `backward`, `enqueue`. Queue and key encoder are part of the
    state dict; the network itself is not.

    Args:
        network: the query encoder at its full width, converted or not; images in, embeddings of shape (batch, dim) out.
        dim: size of an embedding.
        queue_size: number of keys kept as negatives. Well below the number of training images: an image must not meet
            its own key of the last epoch among the negatives.
        momentum: share of itself that the key encoder keeps in each step.
        parts: the key encoder runs on this many random parts of a batch, one after the other. With one part, a query
            and its key share their batch's statistics in every BatchNorm, which gives the pair away; MoCo shuffles
            batches between processes against that (He et al. 2020, section 3.3), more than one part does it in one.

    Raises: UsageError: if `dim`, `queue_size` or `parts` is below 1, or `momentum` is not in [0, 1].

    >>> network = nn.Linear(3, 8)
    >>> moco = MoCo(network, dim=8, queue_size=32)
    >>> moco.enqueue(moco.keys(network, torch.ones(4, 3)))
    >>> moco.queue.shape, int(moco.position)
    (torch.Size([8, 32]), 4)
    """

    queue: Tensor
    position: Tensor

    def __init__(
        self, network: nn.Module, dim: int, queue_size: int = 65536, momentum: float = 0.999, *, parts: int = 1
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("queue_size", queue_size), ("parts", parts)):
            if value < 1:
                raise UsageError(f"MoCo: {name} must be at least 1, got {value}")
        if not 0 <= momentum <= 1:
            raise UsageError(f"MoCo: momentum must be in [0, 1], got {momentum}")
        self.key = copy.deepcopy(network).requires_grad_(False)
        self.momentum = momentum
        self.parts = parts
        device = next(network.parameters()).device
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size, device=device), dim=0))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def keys(self, network: nn.Module, images: Tensor) -> Tensor:
        """Move the key encoder towards `network`, then return its unit-length embeddings of `images`, (batch, dim).

        Only parameters follow the network; BatchNorm statistics of the key encoder come from its own forward.
        """
        own: list[Tensor] = list(self.key.parameters())
        others: list[Tensor] = list(network.parameters())
        if len(own) != len(others):
            raise UsageError(
                f"MoCo.keys: the network has {len(others)} parameters, the one copied as key encoder had {len(own)}"
            )
        torch._foreach_lerp_(own, others, 1 - self.momentum)
        if self.parts == 1:
            return F.normalize(self.key(images), dim=1)
        order = torch.randperm(len(images), device=images.device)
        shuffled = torch.cat([self.key(images[part]) for part in order.tensor_split(self.parts)])
        return F.normalize(shuffled, dim=1)[order.argsort()]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Let `keys`, shape (batch, dim), take the place of the oldest in the queue.

        Call it after the step's last `backward`: the graph still refers to the queue.

        Raises: DataError: if the queue cannot hold the batch, or the embeddings have another size.
        """
        dim, size = self.queue.shape
        if keys.ndim != 2 or keys.shape[1] != dim or len(keys) > size:
            raise DataError(
                f"MoCo.enqueue: keys of shape {tuple(keys.shape)} do not fit a queue of shape ({dim}, {size})"
            )
        start = int(self.position)
        places = torch.arange(start, start + len(keys), device=self.queue.device) % size
        self.queue[:, places] = keys.T.to(self.queue.dtype)
        self.position.fill_((start + len(keys)) % size)
