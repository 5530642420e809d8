"""Cuts: the part of a full tensor that a width keeps, and how to take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import mul
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from slimmable._widths import Kept
from slimmable.errors import ConversionError, WidthError

_INDEX_PREFIX = "_slim_kept"
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_is_tracing = torch._C._is_tracing  # by torch.jit


class Cut(NamedTuple):
    """How to slice a tensor of shape `full`: a block, empty for the whole, then selection by index buffers, by axis."""

    full: tuple[int, ...]
    block: tuple[slice, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    picks: tuple[tuple[int, str], ...]


def make_cut(shape: Sequence[int], kept: Sequence[Kept], what: str, buffers: dict[str, tuple[int, ...]]) -> Cut | None:
    """Turn the units kept along each axis into a block and index buffers, or into None for the whole tensor.

    The index buffers that it needs are added to `buffers`; `what` is the tensor's name, for errors.

    Raises: ConversionError: if an axis has too few units.
    """
    block: list[slice] = []
    picks: list[tuple[int, str]] = []
    for axis, (size, keep) in enumerate(zip(shape, kept, strict=True)):
        first, last = (0, size if keep is None else keep) if not isinstance(keep, tuple) else (keep[0], keep[-1] + 1)
        if last > size:
            raise ConversionError(f"{what}: axis {axis} has size {size}, cannot keep {keep}")
        if isinstance(keep, tuple) and last - first != len(keep):
            name = f"{_INDEX_PREFIX}{hash(keep) % 2**64:x}"  # equal indices share a name, whatever they cut
            buffers[name] = keep
            picks.append((axis, name))
            first, last = 0, size
        block.append(slice(first, last))
    sizes = tuple(part.stop - part.start for part in block)
    starts = tuple(part.start for part in block)
    if sizes == tuple(shape) and not picks:
        return None
    block = block if sizes != tuple(shape) else []
    return Cut(tuple(shape), tuple(block), starts if any(starts) else (), sizes, tuple(picks))


def take(tensor: Tensor, cut: Cut, buffers: Mapping[str, Tensor | None]) -> Tensor:
    """Return the part of a tensor that a cut keeps, with the indices in `buffers`."""
    if cut.block:
        tensor = _block(tensor, cut)
    for axis, buffer in cut.picks:
        if buffer not in buffers:
            raise WidthError(
                "a switch removed a sub-network that the model had not kept; call backward before the next switch"
            )
        tensor = tensor.index_select(axis, cast(Tensor, buffers[buffer]))
    return tensor


def put(tensor: Tensor, cut: Cut, buffers: Mapping[str, Tensor | None], part: Tensor) -> Tensor:
    """Return a copy of a tensor in which `part` replaces what a cut keeps."""
    with torch.no_grad():
        whole = tensor.to(part.dtype).flatten().clone()
        places = take(torch.arange(len(whole), device=whole.device).view(tensor.shape), cut, buffers)
        return whole.index_copy_(0, places.flatten(), part.to(whole.device).flatten()).view(tensor.shape)


def _block(tensor: Tensor, cut: Cut) -> Tensor:
    """Take the block in one operation; indexing, which all that records a program knows, needs one per axis."""
    if type(tensor) not in _PLAIN_TENSORS or is_compiling() or _is_tracing():
        return tensor[cut.block]
    strides = tensor.stride()
    if not cut.starts:
        return tensor.as_strided(cut.sizes, strides)
    return tensor.as_strided(cut.sizes, strides, tensor.storage_offset() + sum(map(mul, cut.starts, strides)))


def take_channels(tensor: Tensor, kept: Kept) -> Tensor:
    """Return the part of a tensor that is kept along its first axis."""
    if kept is None:
        return tensor
    if isinstance(kept, int):
        return tensor[:kept]
    return tensor.index_select(0, torch.tensor(kept, device=tensor.device))
