"""Momentum encoders, and the queue of MoCo v2, for a network that runs at several widths."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._errors import DataError, UsageError
from slimmable._inputs import check_module
from slimmable.layers._state import is_slim
from slimmable.losses._checks import check_count, check_matrix, check_share
from slimmable.training._processes import rank, world_size
from slimmable.training.distributed import gather
from slimmable.width import set_width


def follower_of(network: nn.Module) -> nn.Module:
    """Return a copy of `network` at its full width that takes no gradients: a momentum encoder at its start.

    >>> [parameter.requires_grad for parameter in follower_of(nn.Linear(2, 2)).parameters()]
    [False, False]
    """
    follower = copy.deepcopy(network).requires_grad_(False)
    if any(is_slim(module) for module in follower.modules()):
        set_width(follower, 1.0)
    return follower


@torch.no_grad()
def follow(follower: nn.Module, network: nn.Module, momentum: float) -> None:
    """Move the parameters of `follower` towards those of `network`: `momentum` of its own, the rest of the network's.

    Buffers, such as BatchNorm statistics, stay: they come from the follower's own forward.

    Raises: UsageError: if the two have not the same number of parameters, or not of the same shapes.

    >>> network = nn.Linear(2, 2)
    >>> follower = follower_of(network)
    >>> network.weight.data += 1.0
    >>> follow(follower, network, momentum=0.75)
    >>> (network.weight - follower.weight)[0]
    tensor([0.7500, 0.7500], grad_fn=<SelectBackward0>)
    """
    own: list[Tensor] = list(follower.parameters())
    others: list[Tensor] = list(network.parameters())
    if len(own) != len(others):
        raise UsageError(f"follow: the network has {len(others)} parameters, the one copied from it has {len(own)}")
    for number, (follows, leads) in enumerate(zip(own, others, strict=True)):
        if follows.shape != leads.shape:
            raise UsageError(
                f"follow: parameter {number} of the network has shape {tuple(leads.shape)}, of the one copied from it "
                f"{tuple(follows.shape)}"
            )
    torch._foreach_lerp_(own, others, 1 - momentum)


class MoCo(nn.Module):
    """Key encoder and queue (He et al. 2020, algorithm 1), sized and timed as in SlimCLR (Zhao et al. 2024).

    The key encoder runs at the full width only. Once per step call `keys`, which first moves the key encoder's
    parameters towards the network's, and, after the last `backward`, `enqueue`. Queue and key encoder are part of the
    state dict; the network itself is not.

    Args:
        network: the query encoder, converted or not; images in, embeddings of shape (batch, dim) out.
        dim: size of an embedding.
        queue_size: number of keys kept as negatives. Well below the number of training images: an image must not meet
            its own key of the last epoch among the negatives.
        momentum: share of itself that the key encoder keeps in each step.
        parts: the key encoder runs on this many random parts of a batch, one after the other. With one part, a query
            and its key share their batch's statistics in every BatchNorm, which gives the pair away; MoCo shuffles
            batches between processes against that (He et al. 2020, section 3.3), more than one part does it in one.
            A batch with fewer images has a part for each.
            Several processes share the parts, of the joined batch; there are at least as many parts as processes.

    Raises: UsageError: if `dim`, `queue_size` or `parts` is no integer from 1 on, `momentum` is not in [0, 1], or
        `network` has no parameters.

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
            check_count("MoCo", name, value)
        check_share("MoCo", "momentum", momentum)
        check_module("MoCo", network)
        first = next(network.parameters(), None)
        if first is None:
            raise UsageError(f"MoCo: the network, {type(network).__name__}, has no parameters to follow")
        self.key = follower_of(network)
        self.momentum = momentum
        self.parts = parts
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size, device=first.device), dim=0))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def keys(self, network: nn.Module, images: Tensor) -> Tensor:
        """Move the key encoder towards `network`, then return its unit-length embeddings of `images`, (batch, dim).

        Only parameters follow the network; BatchNorm statistics of the key encoder come from its own forward.

        Raises:
            UsageError: if `network` is not the one that the key encoder was copied from.
            DataError: if several processes cannot share the parts evenly.
        """
        processes, batch = world_size(), len(images)
        parts = max(processes, min(self.parts, batch * processes))
        if processes > 1 and (parts % processes or batch * processes % parts):
            raise DataError(
                f"MoCo.keys: {parts} parts of {processes} x {batch} images cannot be shared by {processes} processes; "
                "choose multiples of their number"
            )
        follow(self.key, network, self.momentum)
        if parts == 1:
            return F.normalize(self.key(images), dim=1)
        images = gather(images)
        order = self._order(len(images), images.device)
        shares = order.tensor_split(parts)  # process r makes the keys of every share from r on, in steps of processes
        own = [self.key(images[share]) for share in shares[rank() :: processes]]
        keys = F.normalize(gather(torch.cat(own)), dim=1)
        taken = torch.cat([share for first in range(processes) for share in shares[first::processes]])
        return keys[taken.argsort()][rank() * batch :][:batch]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Let `keys`, shape (batch, dim), of all processes take the place of the oldest in the queue.

        Call it after the step's last `backward`: the graph still refers to the queue.

        Raises: DataError: if the queue cannot hold the batch, or the embeddings have another size.
        """
        dim, size = self.queue.shape
        check_matrix("MoCo.enqueue", "keys", keys)
        keys = gather(keys)
        if keys.shape[1] != dim or len(keys) > size:
            raise DataError(
                f"MoCo.enqueue: keys of shape {tuple(keys.shape)} do not fit a queue of shape ({dim}, {size})"
            )
        places = (torch.arange(len(keys), device=self.queue.device) + self.position) % size
        self.queue[:, places] = keys.T.to(self.queue.dtype)
        self.position.copy_((self.position + len(keys)) % size)

    @staticmethod
    def _order(count: int, device: torch.device) -> Tensor:
        """Return a random order of the joined batch, the same in all processes."""
        order = torch.randperm(count, device=device)
        return order if world_size() == 1 else gather(order[None])[0]
