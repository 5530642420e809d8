"""Momentum encoders and their schedule, and the key queue of MoCo, for a network that runs at several widths."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._checks import check_count, check_fraction, check_matrices, check_module
from slimmable._distributed import gather, rank, world_size
from slimmable._width import set_width
from slimmable.errors import DataError, UsageError
from slimmable.view.state import is_slim


def cosine_momentum(progress: float, start: float = 0.99) -> float:
    """Return the momentum `1 - (1 - start) (1 + cos(pi progress)) / 2`, which rises from `start` to 1.

    It is the fraction of itself that a momentum encoder keeps in a step (Grill et al., BYOL, 2020, section 3.2; MoCo
    v3, Chen et al. 2021, starts from 0.99).

    Args:
        progress: fraction of the training done, in [0, 1].
        start: momentum at the start, in [0, 1].

    Raises: UsageError: if an argument is not in [0, 1].

    >>> cosine_momentum(0.0), cosine_momentum(0.5), cosine_momentum(1.0)
    (0.99, 0.995, 1.0)
    """
    check_fraction("cosine_momentum", progress=progress, start=start)
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


class MomentumEncoder(nn.Module):
    """A copy of `network` at its full width that takes no gradients and follows it as an exponential moving average.

    Calling it runs the copy, which is `self.network`. Only parameters are averaged; buffers such as BatchNorm
    statistics come from the copy's own forward passes.

    Raises: UsageError: if `network` is not a module, or has no parameters to follow.

    >>> network = nn.Linear(2, 2)
    >>> encoder = MomentumEncoder(network)
    >>> network.weight.data += 1.0
    >>> encoder.update(network, momentum=0.75)
    >>> (network.weight - encoder.network.weight)[0]
    tensor([0.7500, 0.7500], grad_fn=<SelectBackward0>)
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        check_module("MomentumEncoder", network)
        if next(network.parameters(), None) is None:
            raise UsageError(f"MomentumEncoder: the network, {type(network).__name__}, has no parameters to follow")
        self.network = copy.deepcopy(network).requires_grad_(False)
        if any(is_slim(module) for module in self.network.modules()):
            set_width(self.network, 1.0)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the copy, without gradient."""
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def update(self, network: nn.Module, momentum: float) -> None:
        """Replace each parameter `p` of the copy by `momentum * p + (1 - momentum) * q`, with `q` that of `network`.

        Raises: UsageError: if `momentum` is not in [0, 1], or `network` has another number of parameters than the copy
            or other shapes.
        """
        check_fraction("MomentumEncoder.update", momentum=momentum)
        own: list[Tensor] = list(self.network.parameters())
        others: list[Tensor] = list(network.parameters())
        if len(own) != len(others):
            raise UsageError(
                f"MomentumEncoder.update: the network has {len(others)} parameters, the copy of it has {len(own)}"
            )
        for number, (mine, other) in enumerate(zip(own, others, strict=True)):
            if mine.shape != other.shape:
                raise UsageError(
                    f"MomentumEncoder.update: parameter {number} has shape {tuple(other.shape)} in the network, "
                    f"{tuple(mine.shape)} in the copy of it"
                )
        torch._foreach_lerp_(own, others, 1 - momentum)


class MoCo(nn.Module):
    """Key encoder and queue (He et al. 2020, algorithm 1), with the sizes and the order of SlimCLR (Zhao et al. 2024).

    The key encoder runs at the full width only. Once per step call `keys`, which first moves the key encoder's
    parameters towards the network's, and, after the last `backward`, `enqueue`. Queue and key encoder are in the state
    dict; the network itself is not.

    Args:
        network: the query encoder, converted or not; images in, embeddings of shape (batch, proj_dim) out.
        proj_dim: size of an embedding.
        queue_size: number of keys kept as negatives. Keep it well below the number of training images: an image must
            not meet its own key of the last epoch among the negatives.
        momentum: fraction of itself that the key encoder keeps in each step.
        bn_splits: the key encoder runs on this many random parts of a batch, one after the other. With one, a query and
            its key share their batch's statistics in every BatchNorm, which gives the pair away. MoCo shuffles batches
            between processes against that (He et al. 2020, section 3.3); more than one part does so in one process. A
            batch with fewer images than that has a part for each image. Several processes split the joined batch, into
            at least one part for each process.

    Raises: UsageError: if `proj_dim`, `queue_size` or `bn_splits` is not an integer of at least 1, `momentum` is not in
        [0, 1], or `network` has no parameters.

    >>> network = nn.Linear(3, 8)
    >>> moco = MoCo(network, proj_dim=8, queue_size=32)
    >>> moco.enqueue(moco.keys(network, torch.ones(4, 3)))
    >>> moco.queue.shape, int(moco.position)
    (torch.Size([8, 32]), 4)
    """

    queue: Tensor
    position: Tensor

    def __init__(
        self,
        network: nn.Module,
        proj_dim: int,
        queue_size: int = 65536,
        momentum: float = 0.999,
        *,
        bn_splits: int = 1,
    ) -> None:
        super().__init__()
        check_count("MoCo", proj_dim=proj_dim, queue_size=queue_size, bn_splits=bn_splits)
        check_fraction("MoCo", momentum=momentum)
        check_module("MoCo", network)
        self.key_encoder = MomentumEncoder(network)
        self.momentum = momentum
        self.bn_splits = bn_splits
        device = next(network.parameters()).device
        self.register_buffer("queue", F.normalize(torch.randn(proj_dim, queue_size, device=device), dim=0))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def keys(self, network: nn.Module, images: Tensor) -> Tensor:
        """Move the key encoder towards `network`, then return its unit-length embeddings of `images`.

        The result has shape (batch, proj_dim).

        Raises:
            UsageError: if `network` is not the one that the key encoder was copied from.
            DataError: if several processes cannot divide the parts evenly.
        """
        processes, batch = world_size(), len(images)
        splits = max(processes, min(self.bn_splits, batch * processes))
        if processes > 1 and (splits % processes or batch * processes % splits):
            raise DataError(
                f"MoCo.keys: {splits} parts of {processes} x {batch} images cannot be divided among {processes} "
                "processes; choose multiples of their number"
            )
        self.key_encoder.update(network, self.momentum)
        if splits == 1:
            return F.normalize(self.key_encoder(images), dim=1)
        images = gather(images)
        order = torch.randperm(len(images), device=images.device)
        order = gather(order[None])[0]  # the same in all processes
        parts = order.tensor_split(splits)  # process r makes the keys of parts r, r + processes, ...
        own = [self.key_encoder(images[part]) for part in parts[rank() :: processes]]
        keys = F.normalize(gather(torch.cat(own)), dim=1)
        rows = torch.cat([part for process in range(processes) for part in parts[process::processes]])
        return keys[rows.argsort()][rank() * batch :][:batch]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys of the queue by `keys`, shape (batch, proj_dim), of all processes.

        Call it after the step's last `backward`: the graph still refers to the queue.

        Raises: DataError: if the queue cannot hold the batch, or the embeddings have another size.
        """
        dim, size = self.queue.shape
        check_matrices("MoCo.enqueue", keys=keys)
        keys = gather(keys)
        if keys.shape[1] != dim or len(keys) > size:
            raise DataError(
                f"MoCo.enqueue: keys of shape {tuple(keys.shape)} do not fit a queue of shape ({dim}, {size})"
            )
        places = (torch.arange(len(keys), device=self.queue.device) + self.position) % size
        self.queue[:, places] = keys.T.to(self.queue.dtype)
        self.position.copy_((self.position + len(keys)) % size)
