"""The width state of a module: a table with a column for each width, one of them active, and the cuts of tensors."""

import copy
import operator
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from slimmable._widths import Kept
from slimmable.errors import ConversionError
from slimmable.view.recompute import Active, switched

Counts: TypeAlias = tuple[int, ...]  # a sub-network, as the number of units that it keeps of each group of a plan
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_is_tracing = torch._C._is_tracing  # by torch.jit
# the blocks of parameters that a width of a recipe's step has read; each gets one gradient, padded with zeros once
READ: ContextVar[dict[tuple[Any, ...], Tensor] | None] = ContextVar("slimmable_read", default=None)


# -- the part of a full tensor that a width keeps, and how to take it
class Indices:
    """Units along an axis, as a tensor on each device that asks for them."""

    def __init__(self, units: Sequence[int]) -> None:
        self.units = tuple(units)
        self._tensors: dict[torch.device, Tensor] = {}
        self.on(torch.device("cpu"))

    def on(self, device: torch.device) -> Tensor:
        """Return them as a tensor on a device, which is made only once."""
        if device not in self._tensors:
            if is_compiling():
                return torch.tensor(self.units, device=device)
            with torch.inference_mode(False), _disable_current_modes():  # it is used outside of these, too
                self._tensors[device] = torch.tensor(self.units, device=device)
        return self._tensors[device]

    def __deepcopy__(self, memo: Any) -> "Indices":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Indices, (self.units,)


class Cut(NamedTuple):
    """How to slice a tensor of shape `full`: a block, empty for the whole, then selection by indices, by axis."""

    full: tuple[int, ...]
    block: tuple[slice, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    picks: tuple[tuple[int, Indices], ...]


def make_cut(tensor: Tensor, kept: Sequence[Kept], what: str) -> Cut | None:
    """Turn the units kept along each axis into a block and indices, or into None for the whole of the tensor `what`."""
    shape = tuple(tensor.shape)
    block: list[slice] = []
    picks: list[tuple[int, Indices]] = []
    for axis, (size, keep) in enumerate(zip(shape, kept, strict=True)):
        first, last = (0, size if keep is None else keep) if not isinstance(keep, tuple) else (keep[0], keep[-1] + 1)
        if last > size:
            raise ConversionError(f"{what}: axis {axis} has size {size}, cannot keep {keep}")
        if isinstance(keep, tuple) and last - first != len(keep):
            picks.append((axis, Indices(keep)))
            picks[-1][1].on(tensor.device)
            first, last = 0, size
        block.append(slice(first, last))
    sizes = tuple(part.stop - part.start for part in block)
    starts = tuple(part.start for part in block)
    if sizes == shape and not picks:
        return None
    return Cut(shape, tuple(block) if sizes != shape else (), starts if any(starts) else (), sizes, tuple(picks))


def units_of(cut: Cut) -> list[Sequence[int]]:
    """Return the units that a cut keeps of each axis."""
    starts = cut.starts or (0,) * len(cut.sizes)
    units: list[Sequence[int]] = [range(at, at + size) for at, size in zip(starts, cut.sizes, strict=True)]
    for axis, picked in cut.picks:
        units[axis] = picked.units
    return units


def take(tensor: Tensor, cut: Cut) -> Tensor:
    """Return the part of a tensor that a cut keeps; the block in one operation, where indexing needs one per axis."""
    if cut.block and (type(tensor) not in _PLAIN_TENSORS or is_compiling() or _is_tracing()):
        tensor = tensor[cut.block]  # which is all that those who record a program know
    elif cut.block:
        start = tensor.storage_offset() + sum(map(operator.mul, cut.starts, tensor.stride()))
        block = tensor.as_strided(cut.sizes, tensor.stride(), start)
        learns = torch.is_grad_enabled() and tensor.requires_grad and type(tensor) is nn.Parameter
        read = READ.get() if learns else None
        tensor = block if read is None else read.setdefault((id(tensor), block.data_ptr(), cut.sizes), block)
    for axis, picked in cut.picks:
        tensor = tensor.index_select(axis, picked.on(tensor.device))
    return tensor


def put(tensor: Tensor, cut: Cut, part: Tensor) -> Tensor:
    """Return a copy of a tensor in which `part` replaces what a cut keeps."""
    with torch.no_grad():
        whole = tensor.to(part, copy=True)
        block = whole[cut.block] if cut.block else whole
        places = [torch.arange(size, device=whole.device) for size in block.shape]
        for axis, picked in cut.picks:
            places[axis] = picked.on(whole.device)
        block[torch.meshgrid(*places, indexing="ij") if cut.picks else ...] = part
    return whole


# -- what a module has at each of its widths
@dataclass(eq=False)
class Column:
    """What one module has at one width; a *guest*, which is none of the module's own, from one switch to the next."""

    width: float | Counts  # or the counts of a sub-network without a single width
    index: int = -1  # position among the module's own columns, or -1 for a guest
    counts: Counts | None = None  # units kept of each group of the plan, if the module has one
    cuts: dict[str, Cut] = field(default_factory=dict)  # name of a tensor -> the part that is used, unless the whole
    values: dict[str, object] = field(default_factory=dict)  # name of a plain attribute -> its value
    caches: dict[str, object] = field(default_factory=dict)  # attribute in which the forward keeps results -> contents
    shared: bool = False  # whether a container's module reads its part of the full one's parameters, and has none
    module: nn.Module | None = None  # that of a guest of a container


class WidthState(Active[Column]):
    """The columns of one module, the full width first, and the active one.

    `widths` are those of the columns, `numbers` those that are no counts. `plan` is that of the conversion, None for a
    module built by hand, and `path` the place in it, "" for the converted model.
    """

    def __init__(self, columns: Iterable[Column]) -> None:
        self.keep(columns)
        super().__init__(self.columns[0])
        self.blanks: dict[str, object] = {}
        self.plan: Any = None
        self.path = ""

    @property
    def index(self) -> int:
        """The position of the active column, or -1 for a guest."""
        return operator.index(self.active.index)  # makes it a constant for torch.compile, even in torch 2.6

    def at_full(self) -> AbstractContextManager[None]:
        """Run a block at the full width."""
        return switched([(self, self.columns[0])])

    def keep(self, columns: Iterable[Column]) -> None:
        """Have these columns and no others."""
        self.columns = [*columns]
        for index, column in enumerate(self.columns):
            column.index = index
        self.widths: tuple[float | Counts, ...] = tuple(column.width for column in self.columns)
        self.numbers = tuple(width for width in self.widths if isinstance(width, float))


class HasWidths(nn.Module):
    """A module with a width state."""

    _slim: WidthState

    def extra_repr(self) -> str:
        """Return the settings at full width, then the widths and the active one."""
        with self._slim.at_full():
            full = super().extra_repr()
        width = f"widths={self._slim.widths}, width={self._slim.active.width}"
        return f"{full}, {width}" if full else width

    def _replicate_for_data_parallel(self) -> nn.Module:
        """Return a replica, which runs in another thread, with a state of its own: what is active here."""
        replica: nn.Module = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["_slim"] = copy.copy(self._slim)
        return replica


def state_of(module: nn.Module) -> WidthState | None:
    """Return the width state of a module, or None if it has no widths."""
    return module.__dict__.get("_slim")


def is_slim(module: nn.Module) -> bool:
    """Tell whether the module itself, not just a part of it, has widths."""
    return "_slim" in module.__dict__
