"""Fake models, whose forward runs on shapes alone."""

import copy
import io
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimmable._inputs import Arguments, is_index, map_tensors, output_tensors, tensors
from slimmable._modules import swapped, trust_distributions
from slimmable._reach import PROCESS, KnownNumbers, Reach, ReadInMemory, fits, know

_NOT_COPIED = (types.GeneratorType, io.IOBase, type(threading.Lock()), type(threading.RLock()))
_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")  # logs errors that are reported anyway


class FakeModel:
    """A copy of a model, in evaluation mode, with fake parameters and buffers, which have shapes but no values.

    Modules in `replayed` return these outputs in turn. `on_read` gets "skip" or "branch", the reason, and the tensors
    whose numbers they or branches read; `on_call` the path, the arguments and the output of each module that has run.
    """

    on_read: Callable[..., None] = staticmethod(lambda *_: None)
    on_call = on_read

    def __init__(self, model: nn.Module, example: Arguments, replayed: Mapping[str, list[Any]] | None = None) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._where: Any = self.mode  # the context of a forward
        memo: dict[int, Any] = left_behind(model)
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in memo:
                memo[id(tensor)] = self.mode.from_tensor(tensor, static_shapes=True)
        self.model: nn.Module = copy.deepcopy(model, memo).eval()
        self.made: list[weakref.ref[Tensor]] = []  # by the runs
        self.reach = Reach(self.model)
        self._buffers = {id(memo[id(real)]): real for real in model.buffers() if fits(real)}
        self.frozen = {id(memo[id(real)]): real for real in model.parameters() if not real.requires_grad}
        self._given = example
        inputs = output_tensors(example)
        self._known = {id(tensor) for tensor in inputs if tensor is not inputs[0] and fits(tensor)}
        self._input: Callable[[Tensor], Tensor] = self._fake_input
        self._stack = stack = [""]  # the modules that are running
        for path, module in self.model.named_modules():
            module.register_forward_pre_hook(lambda module, args, path=path: stack.append(path))
            module.register_forward_hook(lambda module, args, output, path=path: self._left(path, args, output))
            module.__dict__["_apply"] = lambda *_, own=module: own  # a forward may call `to`, which fakes refuse
        self._replayed = replayed or {}
        for path in self._replayed:
            self.model.get_submodule(path).forward = partial(self._replay, path)

    def on_meta(self) -> AbstractContextManager[None]:
        """Run the model on plain meta tensors, which is faster, but fails in forwards that need a real device."""
        stores = [store for module in self.model.modules() for store in (module._parameters, module._buffers)]
        bare = [(store, name, own if own is None else _bare(own)) for store in stores for name, own in store.items()]
        return swapped([(vars(self), "_where", torch.device("meta")), (vars(self), "_input", _bare), *bare])

    def _fake_input(self, tensor: Tensor) -> Tensor:
        fake = self.mode.from_tensor(tensor, static_shapes=True)
        if is_index(tensor) or id(tensor) in self._known:
            know(fake, tensor, copied=True)
        return fake

    def _left(self, path: str, args: Any, output: Any) -> None:
        self._stack.pop()
        self.on_call(path, args, output)

    def _replay(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self.on_read("skip", "read by a module that runs only with numbers", output_tensors((args, kwargs)))
        return map_tensors(self._fake_input, next(self._replays[path]))

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Let the model run as in training while the block runs; what the last run has found stays that of before."""
        modes = [(vars(module), "training", module.training) for module in self.model.modules()]
        with swapped(modes + [(vars(self.reach), name, value) for name, value in vars(self.reach).items()]):
            self.model.train()
            yield

    @property
    def running(self) -> str:
        """The path of the module that is running, or that has failed."""
        return self._stack[-1]

    def run(self, *modes: AbstractContextManager[Any]) -> Any:
        """Run the model's forward in these modes."""
        self._stack[1:] = []
        for buffer in self.model.buffers():
            buffer.__dict__.pop("slim_value", None)
        stores = [module._buffers for module in self.model.modules()]
        buffers = swapped([(store, name, own) for store in stores for name, own in store.items()])  # forwards set some
        on_branch = partial(self.on_read, "branch", "code depends on its numbers")
        values = KnownNumbers(self._buffers, on_branch) if self._where is self.mode else nullcontext()
        args, kwargs = map_tensors(self._input, self._given)
        self._replays = {path: iter(outputs) for path, outputs in self._replayed.items()}
        quietly = swapped([(vars(_LOGGER), "disabled", True)])
        around = (self.reach.untouched(), layers_in_parts(), quietly, buffers, self._where, values, ReadInMemory())
        with ExitStack() as stack:
            for mode in (*around, torch.no_grad(), _Shortcuts(self.made), *modes):
                stack.enter_context(mode)
            return self.model(*args, **kwargs)


def _bare(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Shortcuts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the tensors that operations make, and runs norms by shape alone, which torch splits on fake tensors."""

    def __init__(self, made: list[weakref.ref[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.native_batch_norm.default and not args[5]:
            out = _norm(args[0], args[0].shape[1:2], args[1:5])
        elif func is aten.native_layer_norm.default:
            out = _norm(args[0], args[0].shape[-len(args[1]) :], args[2:4], tuple(args[1]))
        else:
            out = func(*args, **(kwargs or {}))
        self.made += map(weakref.ref, [out] if isinstance(out, Tensor) else tensors(out))
        return out


def _norm(source: Tensor, normal: Sequence[int], tensors: Sequence[Tensor | None], *sizes: Sequence[int]) -> Any:
    for shape in (*sizes, *(tensor.shape for tensor in tensors if tensor is not None)):
        if tuple(shape) != tuple(normal):
            raise RuntimeError(f"a norm over {tuple(shape)} got an input of shape {tuple(source.shape)}")
    return torch.empty_like(source), source.new_empty(0), source.new_empty(0)


@contextmanager
def layers_in_parts() -> Iterator[None]:
    """Let an LSTM or TransformerEncoder run as separate operations, and modes see what functions call inside."""
    functions, mha, mkldnn = vars(torch.nn.functional), torch.backends.mha, torch.backends.mkldnn
    overridden = [(functions, name, lambda *_: False) for name in functions if name.startswith("has_torch_function")]
    with PROCESS, swapped(overridden), ExitStack() as after:
        after.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        was, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        after.callback(torch.use_deterministic_algorithms, was, warn_only=warns)
        torch.use_deterministic_algorithms(False)  # which would split resampling
        trust_distributions(after)
        after.callback(mkldnn.set_flags, mkldnn.set_flags(_enabled=False)[0])  # type: ignore[no-untyped-call]
        yield


def left_behind(model: nn.Module) -> dict[int, Any]:
    """Return by `id` what `deepcopy` refuses: tensors with a history, without it, and what runs or is open."""
    found: dict[int, Any] = {}
    for module in model.modules():
        columns = getattr(module.__dict__.get("_slim"), "columns", ())
        for value in tree_leaves((module.__dict__, [column.caches for column in columns])):
            if isinstance(value, Tensor) and not value.is_leaf:
                found[id(value)] = value.detach()
            elif isinstance(value, _NOT_COPIED):
                found[id(value)] = value
    return found


def recorded_outputs(model: nn.Module, example: Arguments, paths: Sequence[str]) -> dict[str, list[Any]]:
    """Run a copy of the model on real values; return the outputs of each call of the modules at `paths`."""
    twin = copy.deepcopy(model, left_behind(model)).eval()
    args, kwargs = example
    found: dict[str, list[Any]] = {path: [] for path in paths}
    for path in paths:
        twin.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: found[path].append(out))
    with PROCESS, torch.no_grad(), torch.random.fork_rng(devices=[]), Reach(twin).untouched():
        twin(*args, **kwargs)
    return found
