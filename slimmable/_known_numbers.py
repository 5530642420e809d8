"""Numbers of fake tensors, where they depend only on constants, buffers and inputs, so that code may branch on them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from slimmable._inputs import MOST
from slimmable._nested import tensors


def fits(tensor: Tensor) -> bool:
    """Tell whether the numbers of a tensor can be tracked."""
    real = not tensor.is_meta and not isinstance(tensor, FakeTensor)
    return real and tensor.layout == torch.strided and tensor.numel() <= MOST


def know(fake: Tensor, real: Tensor, sources: Iterable[Tensor] = (), copied: bool = False) -> Tensor:
    """Attach to a fake tensor its numbers, and the tensors that they come from, if others; return the numbers.

    What a forward may write into must be `copied`.
    """
    with _disable_current_modes():
        numbers = real.detach().cpu()
        numbers = numbers.clone() if copied else numbers
    fake.slim_value = numbers  # type: ignore[attr-defined]
    fake.slim_sources = [source for source in sources if source is not fake]  # type: ignore[attr-defined]
    return numbers


def arguments(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation by name; those that were not passed have their defaults."""
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


def written(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes into."""
    given = arguments(schema, args, kwargs)
    return tensors([given[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write])


class KnownNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes the numbers of fake tensors that depend only on tensors whose numbers are known.

    So code may branch on what it computes from constants, buffers and inputs (masks, lengths, coordinates), or size
    tensors by it. Which units scores choose, such as experts, is not known: they are assumed to choose each in turn.
    """

    def __init__(self, buffers: Mapping[int, Tensor], on_branch: Callable[[Sequence[Tensor]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers, self.on_branch = buffers, on_branch
        self._stale: dict[int, Tensor] = {}  # numbers that unknown ones were written into, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_grouped_mm" and args[1].ndim == 3:  # torch's own refuses float32 on shapes alone
            return args[0] @ (args[1][0] if args[0].ndim == 2 else args[1])
        features = args and isinstance(args[0], FakeTensor) and self._value(args[0]) is None
        if features and not func._schema.is_mutable and name not in _CHOICES and not name.startswith("index"):
            return func(*args, **kwargs)  # as most operations
        given = tensors((args, kwargs))
        known = all(self._value(tensor) is not None for tensor in given)
        sources = {id(source): source for tensor in given if known for source in _sources(tensor)}.values()
        if known and (torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags):
            self.on_branch(list(sources))
            real = self._computed(func, args, kwargs)
            out = func(*args, **kwargs) if real is None else tree_map(lambda value: _like(value, given[0]), real)
        else:
            if name.startswith("index"):
                args = self._masks_as_indices(args)
            out = func(*args, **kwargs)
            known = known and torch.Tag.nondeterministic_seeded not in func.tags
            known = known and all((given or result.numel()) and result.numel() <= MOST for result in tensors(out))
            real = self._computed(func, args, kwargs) if known else None
        if real is None:
            for value in map(self._value, written(func._schema, args, kwargs)):
                if value is not None:  # all that shares this memory is no longer known
                    self._stale[value.untyped_storage().data_ptr()] = value
            if name in _CHOICES:
                _assume_choices(func, args, kwargs, tensors(out)[-1])
            return out
        for fake, value in zip(tree_leaves(out), tree_leaves(real), strict=True):
            if isinstance(fake, Tensor):
                know(fake, value, sources)
        return out

    def _value(self, tensor: Tensor) -> Tensor | None:
        value: Tensor | None = tensor.__dict__.get("slim_value")
        if value is None:
            real = self.buffers.get(id(tensor)) if isinstance(tensor, FakeTensor) else tensor
            if real is None:
                return None
            value = know(tensor, real, copied=True)
        return None if self._stale and value.untyped_storage().data_ptr() in self._stale else value

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation gives on known numbers, or None if the CPU cannot run it."""
        here = {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
        args, kwargs = tree_map(lambda leaf: self._value(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        with _disable_current_modes():
            try:
                return func(*args, **{**kwargs, **here})
            except Exception:
                return None

    def _masks_as_indices(self, args: Any) -> Any:
        """Replace known boolean masks, whose results have unknown shapes, with the indices that they select."""
        indices: list[Any] = []
        for part in args[1] if isinstance(args[1], (list, tuple)) else ():
            mask = self._value(part) if isinstance(part, Tensor) and part.dtype == torch.bool else None
            if mask is not None:
                self.on_branch(_sources(part))
                with _disable_current_modes():
                    picked = mask.nonzero(as_tuple=True)
                indices += [_like(index, part) for index in picked]
            else:
                indices.append(part)
        return (args[0], indices, *args[2:]) if indices else args


_CHOICES = {"topk", "sort", "argmax", "argmin", "max", "min"}


def _assume_choices(func: Any, args: Any, kwargs: Any, indices: Tensor) -> None:
    """Assume that the rows of scores choose the first unit, the second, and so on, so that all are chosen."""
    dim: Any = arguments(func._schema, args, kwargs).get("dim")
    scores, units = args[0], 0 if dim is None or not args[0].numel() else args[0].shape[dim]
    if not units or indices.dtype != torch.long or indices.numel() > MOST:
        return
    rows = scores.numel() // units
    each = indices.numel() // rows
    if units <= rows * each:
        with _disable_current_modes():
            step = 1 if units <= rows else each
            numbers = (step * torch.arange(rows)[:, None] + torch.arange(each)) % units
            others = [size for axis, size in enumerate(scores.shape) if axis != dim % scores.ndim]
            numbers = numbers.reshape(*others, each).movedim(-1, dim).reshape(indices.shape)
        know(indices, numbers, [scores])


def _sources(tensor: Tensor) -> list[Tensor]:
    return getattr(tensor, "slim_sources", None) or [tensor]


def _like(value: Any, given: Tensor) -> Any:
    return torch.empty_like(value, device=given.device) if isinstance(value, Tensor) else value


class ReadInMemory(TorchFunctionMode):
    """Replaces what reads numbers in memory: the packing of sequences of different lengths, numbers in text."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "_pack_padded_sequence":
            source, lengths, batch_first = args
            ends = lengths.tolist()
            sizes = [sum(end > step for end in ends) for step in range(max(ends))]
            steps = source.unbind(1 if batch_first else 0)
            with _disable_current_modes():
                real = torch.tensor(sizes)  # recurrent layers read it in memory
            return torch.cat([step[:size] for step, size in zip(steps, sizes, strict=False)]), real
        if name == "_pad_packed_sequence":
            data, batch_sizes, batch_first, padding, total = args
            sizes = batch_sizes.tolist()
            rows = [_padded(step, 0, sizes[0], padding) for step in data.split(sizes)]
            lengths = torch.tensor([sum(size > row for size in sizes) for row in range(sizes[0])])
            dim = 1 if batch_first else 0
            return _padded(torch.stack(rows, dim), dim, max(total, len(sizes)), padding), lengths
        if name == "__format__" and "slim_value" in args[0].__dict__ and args[0].ndim == 0:
            return format(args[0].item(), args[1])
        return func(*args, **(kwargs or {}))


def _padded(tensor: Tensor, axis: int, size: int, value: float) -> Tensor:
    after = [0] * (2 * (tensor.ndim - axis) - 1) + [size - tensor.shape[axis]]
    return torch.nn.functional.pad(tensor, after, value=value)
