"""A model without numbers: what it takes to run a forward on shapes alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimmable._inputs import is_index
from slimmable._modules import empty_cache
from slimmable._nested import map_tensors
from slimmable.analysis._rules import tensors
from slimmable.analysis.values import Values, know


class FakeModel:
    """A copy of a model whose parameters and buffers are fake: same shapes, no memory, nothing computed.

    Modules in `replayed` do not run; they return copies of these outputs, one a call, and `on_replay` is told the path
    of the module and what went in.
    """

    on_replay: Callable[[str, Any], None] | None = None

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        keep_caches: bool = False,
        prepare: Callable[[nn.Module], object] | None = None,
        replayed: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._where: Any = self.mode  # what a forward runs in
        memo = {key: value.detach() for key, value in left_behind(model).items()}
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = self._fake_weight(tensor)
        self.model: nn.Module = copy.deepcopy(model, memo).eval()
        if prepare is not None:
            with self.mode:
                prepare(self.model)
        self.emptied = [] if keep_caches else filled_caches(self.model)
        for cache in self.emptied:
            cache.clear()
        self._values: AbstractContextManager[Any] = nullcontext()
        self._given = tuple(args), dict(kwargs)
        self._input: Callable[[Tensor], Tensor] = self._fake_input
        self._stack = [""]  # the modules that are running
        for path, module in self.model.named_modules():
            module.register_forward_pre_hook(self._enter(path))
            module.register_forward_hook(self._leave())
        for path, outputs in (replayed or {}).items():
            self.model.get_submodule(path).forward = self._replay(path, outputs)
        self._before = [
            (path, module, name, empty_cache(value))
            for path, module in self.model.named_modules()
            for name, value in module.__dict__.items()
            if not name.startswith("_") and (value is None or isinstance(value, (dict, Tensor)))
        ]

    def _fake_weight(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or not tensor.is_leaf:
            return self.mode.from_tensor(tensor, static_shapes=True)
        return self._wrap(_bare(tensor), tensor)

    def weight(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return a weight of another shape than the model's, but otherwise like it."""
        meta = torch.empty(shape, dtype=like.dtype, device="meta")
        return self._wrap(meta, like) if isinstance(like, FakeTensor) else meta

    @contextmanager
    def on_meta(self) -> Iterator[None]:
        """Let the model run on plain meta tensors: quicker, but not every forward can, as they are on no device."""
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
        fake: Tensor = FakeTensor(self.mode, meta, like.device)  # what `from_tensor` makes, in a tenth of the time
        if isinstance(like, nn.Parameter):
            fake._is_param = True
        return fake.requires_grad_(like.requires_grad)

    def _fake_input(self, tensor: Tensor) -> Tensor:
        fake = self.mode.from_tensor(tensor, static_shapes=True)
        if is_index(tensor):
            self._values = Values(self.mode)
            know(fake, tensor.clone())  # a forward may write into its inputs
        return fake

    def _replay(self, path: str, outputs: Sequence[Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.on_replay is not None:
                self.on_replay(path, (args, kwargs))
            self._replays[path] = self._replays.get(path, 0) + 1
            return map_tensors(self._fake_input, outputs[self._replays[path] - 1])

        return forward

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append(path)

        return hook

    def _leave(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        return hook

    @property
    def running(self) -> str:
        """The path of the module that is running, or that has failed."""
        return self._stack[-1]

    def run(self, *modes: AbstractContextManager[Any]) -> Any:
        """Run the forward of the model, in these modes."""
        self._stack[1:] = []
        self._values = nullcontext()
        args, kwargs = map_tensors(self._input, self._given)
        self._replays: dict[str, int] = {}
        with ExitStack() as stack:
            inside: list[Any] = [self._where, self._values, torch.no_grad(), layers_in_parts(), _quietly(), *modes]
            for mode in inside:
                stack.enter_context(mode)
            return self.model(*args, **kwargs)

    def forget(self) -> dict[str, dict[str, Any]]:
        """Empty what the last run has left in attributes; return module path -> attribute -> what it was before."""
        found: dict[str, dict[str, Any]] = {}
        for path, module, name, before in self._before:
            now = module.__dict__.get(name)
            same = now.keys() == before.keys() if isinstance(before, dict) and isinstance(now, dict) else now is before
            if not same and tensors(now):
                found.setdefault(path, {})[name] = before
                module.__dict__[name] = empty_cache(before)
        return found


def _bare(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class Shortcuts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on fake tensors, those that torch takes long over by hand."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operation(func, args, kwargs or {})


def run_operation(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run one operation; torch takes fake norms apart into a dozen, of which only the shape is of interest."""
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
    """Keep torch from logging the errors that are raised, and reported, anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def layers_in_parts() -> Iterator[None]:
    """Let an LSTM or a TransformerEncoder run as the products that it is made of, not as one operation.

    Nor do torch's Python functions, such as `multi_head_attention_forward`, hide from modes what they call.
    """
    never = {f"has_torch_function{kind}": lambda *_: False for kind in ("", "_unary", "_variadic")}
    before = torch.backends.mkldnn.set_flags(_enabled=False)[0]  # type: ignore[no-untyped-call]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.dict(vars(torch.nn.functional), never):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.set_flags(_enabled=before)  # type: ignore[no-untyped-call]


def filled_caches(model: nn.Module) -> list[dict[Any, Any]]:
    """Return the dicts of plain tensors that modules hold: most likely filled by an earlier forward."""
    found = []
    for module in model.modules():
        for name, value in module.__dict__.items():
            filled = isinstance(value, dict) and value and not name.startswith("_")
            if filled and all(type(item) is Tensor for item in value.values()):
                found.append(value)
    return found


def left_behind(model: nn.Module) -> dict[int, Tensor]:
    """Return, by `id`, tensors with a history that a forward has left in attributes; they cannot be copied as is."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        columns = getattr(module.__dict__.get("_slim"), "columns", ())
        for value in tree_leaves((module.__dict__, [column.caches for column in columns])):
            if isinstance(value, Tensor) and not value.is_leaf:
                found[id(value)] = value
    return found


def recorded_outputs(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    paths: Sequence[str],
    prepare: Callable[[nn.Module], object] | None = None,
) -> dict[str, list[Any]]:
    """Run a copy of the model with its numbers and return what the modules at `paths` returned, call by call."""
    memo: dict[int, Any] = {key: value.detach() for key, value in left_behind(model).items()}
    twin = copy.deepcopy(model, memo).eval()
    if prepare is not None:
        prepare(twin)
    found: dict[str, list[Any]] = {path: [] for path in paths}
    for path in paths:
        twin.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: found[path].append(out))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin(*args, **kwargs)
    return found
