"""The memory that autograd holds for the backward, counted tensor by tensor."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Saved:
    """A saved tensor, counted as long as autograd holds it."""

    def __init__(self, tensor: Tensor, count: _Count) -> None:
        self.tensor, self.count = tensor, count
        self.storage = tensor.untyped_storage().data_ptr()
        count.add(self.storage, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self.count.remove(self.storage, self.tensor.untyped_storage().nbytes())


class _Count:
    """Bytes of the storages that are held now, and the most that there have been."""

    def __init__(self, left_out: set[int]) -> None:
        self.left_out = left_out
        self.holders: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def add(self, storage: int, size: int) -> None:
        if storage in self.left_out:
            return
        self.holders[storage] += 1
        if self.holders[storage] == 1:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def remove(self, storage: int, size: int) -> None:
        if storage in self.left_out:
            return
        self.holders[storage] -= 1
        if self.holders[storage] == 0:
            self.bytes -= size


def peak_saved_bytes(step: Callable[[], object], model: nn.Module) -> int:
    """Return the most bytes that autograd held at once during `step`, without the parameters and buffers of `model`.

    A storage counts once, and whole, however many saved tensors share it.

    >>> weight = nn.Linear(4, 4, bias=False)
    >>> x = torch.zeros(8, 4)
    >>> peak_saved_bytes(lambda: weight(x).exp().sum().backward(), weight)  # x and the exponentials
    256
    """
    own = itertools.chain(model.parameters(), model.buffers())
    count = _Count({tensor.untyped_storage().data_ptr() for tensor in own})
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, count), lambda saved: saved.tensor):
        step()
    return count.peak
