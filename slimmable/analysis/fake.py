"""Fake models, whose forward runs on shapes alone."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from slimmable._inputs import MOST, is_index
from slimmable._nested import map_tensors, output_tensors
from slimmable._reach import PROCESS, Reach
from slimmable.analysis._context import tensors
from slimmable.analysis.integers import depends_on_trace


class FakeModel:
    """A copy of a model, in evaluation mode, with fake parameters and buffers, which have shapes but no values.

    Modules in `replayed` do not run: each call passes the module's path and inputs to `on_replay`, and returns a copy
    of the next of these outputs.
    """

    on_replay: Callable[[str, Any], None] | None = None
    on_branch: Callable[[Sequence[Tensor]], None] | None = None  # gets what the numbers that code asks for come from

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        replayed: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._where: Any = self.mode  # the context of a forward
        memo = {key: value.detach() for key, value in left_behind(model).items()}
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = self._fake_weight(tensor)
        self.model: nn.Module = copy.deepcopy(model, memo).eval()
        self.made: list[weakref.ref[Tensor]] = []  # by the runs
        self.reach = Reach(self.model)
        self._buffers = {id(memo[id(real)]): real for real in model.buffers() if _fits(real)}
        self._given = tuple(args), dict(kwargs)
        inputs = output_tensors(self._given)
        self._known = {id(tensor) for tensor in inputs if tensor is not inputs[0] and _fits(tensor)}
        self._input: Callable[[Tensor], Tensor] = self._fake_input
        self._stack = stack = [""]  # the modules that are running
        for path, module in self.model.named_modules():
            module.register_forward_pre_hook(lambda module, args, path=path: stack.append(path))
            module.register_forward_hook(lambda module, args, output: stack.__delitem__(-1))
            # a forward may call `to`, which fakes do not support
            module.__dict__["_apply"] = lambda *_, own=module: own
        for path, outputs in (replayed or {}).items():
            self.model.get_submodule(path).forward = self._replay(path, outputs)

    def _fake_weight(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or not tensor.is_leaf:
            return self.mode.from_tensor(tensor, static_shapes=True)
        return self._wrap(_bare(tensor), tensor)

    def weight(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return a weight of this shape, without values, that is otherwise like another."""
        if not isinstance(like, FakeTensor):
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        return self._wrap(torch.empty(shape, dtype=like.dtype, device="meta"), like)

    @contextmanager
    def on_meta(self) -> Iterator[None]:
        """Run the model on plain meta tensors, which is faster, but fails in forwards that need a real device."""
        before = self._where, self._input
        stores: list[dict[str, Any]] = []
        for module in self.model.modules():
            stores += module._parameters, module._buffers
        fakes = [dict(store) for store in stores]
        for store in stores:
            store.update({name: tensor if tensor is None else _bare(tensor) for name, tensor in store.items()})
        self._where, self._input = torch.device("meta"), _bare
        try:
            yield
        finally:
            for store, tensors in zip(stores, fakes, strict=True):
                store.update(tensors)
            self._where, self._input = before

    def _wrap(self, meta: Tensor, like: Tensor) -> Tensor:
        fake: Tensor = FakeTensor(self.mode, meta, like.device)  # as by `from_tensor`, in a tenth of the time
        if isinstance(like, nn.Parameter):
            fake._is_param = True
        return fake.requires_grad_(like.requires_grad)

    def _fake_input(self, tensor: Tensor) -> Tensor:
        fake = self.mode.from_tensor(tensor, static_shapes=True)
        if is_index(tensor) or id(tensor) in self._known:
            _know(fake, tensor, copied=True)
        return fake

    def _replay(self, path: str, outputs: Sequence[Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.on_replay is not None:
                self.on_replay(path, (args, kwargs))
            self._replays[path] = self._replays.get(path, 0) + 1
            return map_tensors(self._fake_input, outputs[self._replays[path] - 1])

        return forward

    @property
    def running(self) -> str:
        """The path of the module that is running, or that has failed."""
        return self._stack[-1]

    def run(self, *modes: AbstractContextManager[Any]) -> Any:
        """Run the model's forward in these modes."""
        self._stack[1:] = []
        for buffer in self.model.buffers():
            buffer.__dict__.pop("slim_value", None)
        values = _Values(self._buffers, self.on_branch) if self._where is self.mode else nullcontext()
        args, kwargs = map_tensors(self._input, self._given)
        self._replays: dict[str, int] = {}
        parts: list[Any] = [self.reach.untouched(depends_on_trace), layers_in_parts(), _quietly()]
        with ExitStack() as stack:
            inside = (self._where, values, _Replaced(), torch.no_grad(), _Shortcuts(self.made), *modes)
            for mode in (*parts, *inside):
                stack.enter_context(mode)
            return self.model(*args, **kwargs)


def _bare(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _fits(tensor: Tensor) -> bool:
    """Tell whether the numbers of a tensor can be tracked."""
    real = not tensor.is_meta and not isinstance(tensor, FakeTensor)
    return real and tensor.layout == torch.strided and tensor.numel() <= MOST


def _know(fake: Tensor, real: Tensor, sources: Iterable[Tensor] = (), copied: bool = False) -> Tensor:
    """Attach to a fake tensor its numbers, and the tensors that they come from, if others; return the numbers.

    What a forward may write into must be `copied`.
    """
    with _disable_current_modes():
        numbers = real.detach().cpu()
        numbers = numbers.clone() if copied else numbers
    fake.slim_value = numbers  # type: ignore[attr-defined]
    fake.slim_sources = [source for source in sources if source is not fake]  # type: ignore[attr-defined]
    return numbers


class _Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes the numbers of fake tensors that depend only on tensors whose numbers are known.

    So code may branch on what it computes from constants, buffers and inputs (masks, lengths, coordinates), or size
    tensors by it. Which units scores choose, such as experts, is not known: they are assumed to choose each in turn.
    """

    def __init__(self, buffers: Mapping[int, Tensor], on_branch: Callable[[Sequence[Tensor]], None] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers, self.on_branch = buffers, on_branch or (lambda sources: None)
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
            self._forget_written(func, args, kwargs)
            if name in _CHOICES:
                _assume_choices(func, args, kwargs, tensors(out)[-1])
            return out
        for fake, value in zip(tree_leaves(out), tree_leaves(real), strict=True):
            if isinstance(fake, Tensor):
                _know(fake, value, sources)
        return out

    def _value(self, tensor: Tensor) -> Tensor | None:
        """Return the numbers of a tensor, or None if they are not known."""
        value: Tensor | None = tensor.__dict__.get("slim_value")
        if value is None:
            real = self.buffers.get(id(tensor)) if isinstance(tensor, FakeTensor) else tensor
            if real is None:
                return None
            value = _know(tensor, real, copied=True)
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

    def _forget_written(self, func: Any, args: Any, kwargs: Any) -> None:
        """Forget the numbers of tensors that share memory with those that an operation writes into."""
        if func._schema.is_mutable:
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = args[position] if position < len(args) else kwargs.get(argument.name)
                    for tensor in tensors(written):
                        value = self._value(tensor)
                        if value is not None:
                            self._stale[value.untyped_storage().data_ptr()] = value


_CHOICES = {"topk", "sort", "argmax", "argmin", "max", "min"}


def _assume_choices(func: Any, args: Any, kwargs: Any, indices: Tensor) -> None:
    """Assume that the rows of scores choose the first unit, the second, and so on, so that all are chosen."""
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    dim: Any = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}.get("dim")
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
        _know(indices, numbers, [scores])


def _sources(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that the numbers of a known one come from."""
    return getattr(tensor, "slim_sources", None) or [tensor]


def _like(value: Any, given: Tensor) -> Any:
    """Return a fake tensor of the shape of a real one, on the device of a given one."""
    return torch.empty_like(value, device=given.device) if isinstance(value, Tensor) else value


class _Replaced(TorchFunctionMode):
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


class _Shortcuts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations through `_run_operation`, which has shortcuts for slow ones, and notes the tensors they make."""

    def __init__(self, made: list[weakref.ref[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _run_operation(func, args, kwargs or {})
        self.made += map(weakref.ref, [out] if isinstance(out, Tensor) else tensors(out))
        return out


def _run_operation(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run one operation, norms by shape alone, because torch splits them into a dozen operations on fake tensors."""
    aten = torch.ops.aten
    if func is aten.native_batch_norm.default and not args[5]:
        return _norm(args[0], args[0].shape[1:2], args[1:5])
    if func is aten.native_layer_norm.default:
        return _norm(args[0], args[0].shape[-len(args[1]) :], args[2:4], tuple(args[1]))
    return func(*args, **kwargs)


def _norm(source: Tensor, normal: Sequence[int], tensors: Sequence[Tensor | None], *sizes: Sequence[int]) -> Any:
    for shape in (*sizes, *(tensor.shape for tensor in tensors if tensor is not None)):
        if tuple(shape) != tuple(normal):
            raise RuntimeError(f"a norm over {tuple(shape)} got an input of shape {tuple(source.shape)}")
    return torch.empty_like(source), source.new_empty(0), source.new_empty(0)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch from logging errors that are reported anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def layers_in_parts() -> Iterator[None]:
    """Let an LSTM or TransformerEncoder run as separate matrix products, not as one fused operation.

    Modes also see what torch's Python functions, such as `multi_head_attention_forward`, call inside.
    """
    functions = vars(torch.nn.functional)
    with PROCESS:
        overridden = {name: functions[name] for name in functions if name.startswith("has_torch_function")}
        fused = torch.backends.mkldnn.set_flags(_enabled=False)[0]  # type: ignore[no-untyped-call]
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        functions.update(dict.fromkeys(overridden, lambda *_: False))
        try:
            yield
        finally:
            functions.update(overridden)
            torch.backends.mha.set_fastpath_enabled(fast)
            torch.backends.mkldnn.set_flags(_enabled=fused)  # type: ignore[no-untyped-call]


def left_behind(model: nn.Module) -> dict[int, Tensor]:
    """Return by `id` the tensors with autograd history in attributes, which `deepcopy` refuses."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        columns = getattr(module.__dict__.get("_slim"), "columns", ())
        for value in tree_leaves((module.__dict__, [column.caches for column in columns])):
            if isinstance(value, Tensor) and not value.is_leaf:
                found[id(value)] = value
    return found


def recorded_outputs(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], paths: Sequence[str]
) -> dict[str, list[Any]]:
    """Run a copy of the model on real values; return the outputs of each call of the modules at `paths`."""
    memo: dict[int, Any] = {key: value.detach() for key, value in left_behind(model).items()}
    twin = copy.deepcopy(model, memo).eval()
    found: dict[str, list[Any]] = {path: [] for path in paths}
    for path in paths:
        twin.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: found[path].append(out))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), Reach(twin).untouched(depends_on_trace):
        twin(*args, **kwargs)
    return found
