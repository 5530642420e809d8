"""What several processes tell each other, in its plainest form."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def alone(group: dist.ProcessGroup | None) -> bool:
    """Return whether there is no process group, or this process is the only one in it."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1


def of_all(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Return the processes' tensors in rank order; all must have one shape and type, and get no gradient."""
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group)
    return parts


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of this process, 0 without a process group."""
    return 0 if alone(group) else dist.get_rank(group)


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of processes, 1 without a process group."""
    return 1 if alone(group) else dist.get_world_size(group)
