"""Momentum encoders, their schedule, and MoCo's key queue, for a network that runs at several widths."""

import copy
import math
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimmable._checks import check_fraction, check_matrices, check_module, check_tensors, checked, shown
from slimmable._distributed import gather, rank, world_size
from slimmable._width import set_width
from slimmable.errors import DataError, UsageError
from slimmable.view.state import is_slim


def cosine_momentum(progress: float, start: float = 0.99) -> float:
    """Return the momentum `1 - (1 - start) (1 + cos(pi progress)) / 2`, which rises from `start` to 1.

    `progress` is the fraction of the training done. From BYOL (Grill et al. 2020, section 3.2); 0.99 is MoCo v3's.

    >>> cosine_momentum(0.0), cosine_momentum(0.5), cosine_momentum(1.0)
    (0.99, 0.995, 1.0)
    """
    check_fraction("cosine_momentum", progress=progress, start=start)
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


class MomentumEncoder(nn.Module):
    """A copy of `network` at full width, without gradients, that follows it as an exponential moving average.

    Calling it runs the copy, `self.network`. Buffers such as BatchNorm statistics come from its own forward passes.

    Raises: UsageError: if `network` has no parameters to follow.

    >>> network = nn.Linear(2, 2)
    >>> encoder = MomentumEncoder(network)
    >>> network.weight.data += 1.0
    >>> encoder.update(network, momentum=0.75)
    >>> (network.weight - encoder.network.weight)[0]
    tensor([0.7500, 0.7500], grad_fn=<SelectBackward0>)
    """

    @checked
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
        """Return the outputs of the copy, without gradients."""
        return self.network(*args, **kwargs)

    @checked
    @torch.no_grad()
    def update(self, network: nn.Module, momentum: float) -> None:
        """Replace each parameter `p` of the copy by `momentum * p + (1 - momentum) * q`, with `q` from `network`.

        Raises: UsageError: if the number or shapes of the parameters of `network` differ from the copy's.
        """
        own, others = tuple(self.network.parameters()), tuple(network.parameters())
        for number, (mine, other) in enumerate(zip_longest(map(shown, own), map(shown, others))):
            if mine != other:
                what = f"parameter {number} is {mine} in the copy and {other} in the network"
                raise UsageError(f"MomentumEncoder.update: {what}; give the network that was copied")
        torch._foreach_lerp_(own, others, 1 - momentum)


class MoCo(nn.Module):
    """Key encoder and queue (He et al. 2020, algorithm 1), with the sizes and the order of SlimCLR (Zhao et al. 2024).

    Once per step call `keys`, which moves the key encoder, always at full width, towards the network and, after the
    last `backward`, `enqueue`. The queue and the key encoder are in the state dict; the network is not.

    Args:
        network: the query encoder, converted or not; images in, embeddings of shape (batch, proj_dim) out.
        proj_dim: size of an embedding.
        queue_size: number of keys kept as negatives, well below that of the images, so that none meets its own old key.
        momentum: fraction of its own weights that the key encoder keeps in each step.
        bn_splits: number of random parts of the joined batch, at most single images and at least one per process, on
            which the key encoder runs in turn, so that BatchNorm statistics do not give pairs away (section 3.3).

    Raises: UsageError: if `network` has no parameters.

    >>> network = nn.Linear(3, 8)
    >>> moco = MoCo(network, proj_dim=8, queue_size=32)
    >>> moco.enqueue(moco.keys(network, torch.ones(4, 3)))
    >>> moco.queue.shape, int(moco.position)
    (torch.Size([8, 32]), 4)
    """

    queue: Tensor
    position: Tensor

    @checked
    def __init__(
        self, network: nn.Module, proj_dim: int, queue_size: int = 65536, momentum: float = 0.999, *, bn_splits: int = 1
    ) -> None:
        super().__init__()
        self.key_encoder = MomentumEncoder(network)
        self.momentum, self.bn_splits = momentum, bn_splits
        device = next(network.parameters()).device
        self.register_buffer("queue", F.normalize(torch.randn(proj_dim, queue_size, device=device), dim=0))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @checked
    @torch.no_grad()
    def keys(self, network: nn.Module, images: Tensor) -> Tensor:
        """Move the key encoder towards `network`, then return its unit-length embeddings, shape (batch, proj_dim).

        Raises: UsageError: if the key encoder was not copied from `network`. DataError: if several processes cannot
            divide the parts evenly, or the encoder does not make a matrix of embeddings, in which case it has moved.
        """
        check_tensors("MoCo.keys", images=images)
        processes, batch = world_size(), len(images)
        splits = max(processes, min(self.bn_splits, batch * processes))
        if processes > 1 and (splits % processes or batch * processes % splits):
            raise DataError(f"MoCo.keys: {splits} parts of {batch} images each in {processes} processes are not equal")
        self.key_encoder.update(network, self.momentum)
        if splits == 1:
            keys = self.key_encoder(images)
            check_matrices("MoCo.keys", keys=keys)
            return F.normalize(keys, dim=1)
        images = gather(images)
        order = gather(torch.randperm(len(images), device=images.device)[None])[0]  # the same in all processes
        parts = order.tensor_split(splits)  # process r makes the keys of parts r, r + processes, ...
        own = [self.key_encoder(images[part]) for part in parts[rank() :: processes]]
        keys = F.normalize(gather(torch.cat(own)), dim=1)
        rows = torch.cat([part for process in range(processes) for part in parts[process::processes]])
        return keys[rows.argsort()][rank() * batch :][:batch]

    @checked
    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys of the queue by the `keys` of all processes, each of shape (batch, proj_dim).

        Call it after the step's last `backward`: until then the graph refers to the queue.
        Raises: DataError: if the queue cannot hold the batch, or the size of the embeddings differs.
        """
        dim, size = self.queue.shape
        check_matrices("MoCo.enqueue", keys=keys)
        keys = gather(keys)
        if keys.shape[1] != dim or len(keys) > size:
            raise DataError(f"MoCo.enqueue: keys, {shown(keys)}, do not fit a queue of shape ({dim}, {size})")
        places = (torch.arange(len(keys), device=self.queue.device) + self.position) % size
        self.queue[:, places] = keys.T.to(self.queue.dtype)
        self.position.copy_((self.position + len(keys)) % size)
