"""One run of a model on fake tensors, in which every operation moves or merges channel labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from slimmable._errors import TraceError
from slimmable.analysis import _rules_layer, _rules_shape
from slimmable.analysis._context import Call, Context
from slimmable.analysis._integers import Attribute, Expression, TracedInt
from slimmable.analysis._labels import Ids
from slimmable.analysis._rules import name_of, rule_of, tensors

__all__ = ["FakeModel", "Trace", "output_tensors", "trace"]
_ = _rules_shape  # imported for its rules

Skip = Callable[[str, nn.Module], bool | str]  # whether a module stays full, or why


class FakeModel:
    """A copy of a model whose parameters and buffers are fake: same shapes, no memory, nothing computed."""

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        keep_caches: bool = False,
        prepare: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        memo = {key: value.detach() for key, value in left_behind(model).items()}
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = self.mode.from_tensor(tensor, static_shapes=True)
        self.model: nn.Module = copy.deepcopy(model, memo).eval()
        if prepare is not None:
            with self.mode:
                prepare(self.model)
        self.emptied = [] if keep_caches else filled_caches(self.model)
        for cache in self.emptied:
            cache.clear()
        self.args, self.kwargs = tree_map(self._fake_input, (tuple(args), dict(kwargs)))
        self._stack = [""]  # the modules that are running
        for path, module in self.model.named_modules():
            module.register_forward_pre_hook(self._enter(path))
            module.register_forward_hook(self._leave())
        self._before = [
            (path, module, name, copy.copy(value))
            for path, module in self.model.named_modules()
            for name, value in module.__dict__.items()
            if not name.startswith("_") and (value is None or isinstance(value, (dict, Tensor)))
        ]

    def _fake_input(self, value: Any) -> Any:
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value

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
        with ExitStack() as stack:
            inside: list[Any] = [self.mode, torch.no_grad(), _recurrent_layers_in_parts(), *modes]
            for mode in inside:
                stack.enter_context(mode)
            return self.model(*self.args, **self.kwargs)

    def forget(self) -> dict[str, dict[str, Any]]:
        """Empty what the last run has left in attributes; return module path -> attribute -> what it was before."""
        found: dict[str, dict[str, Any]] = {}
        for path, module, name, before in self._before:
            now = module.__dict__.get(name)
            same = now.keys() == before.keys() if isinstance(before, dict) and isinstance(now, dict) else now is before
            if not same and tensors(now):
                found.setdefault(path, {})[name] = before
                module.__dict__[name] = copy.copy(before)
        return found


@contextmanager
def _recurrent_layers_in_parts() -> Iterator[None]:
    """Let an LSTM run as the matrix products that it is made of, not as one operation."""
    before = torch.backends.mkldnn.set_flags(_enabled=False)[0]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
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
        caches = getattr(module.__dict__.get("_slim"), "caches", {})
        for value in tree_leaves((module.__dict__, caches)):
            if isinstance(value, Tensor) and not value.is_leaf:
                found[id(value)] = value
    return found


@dataclass
class Trace:
    """What one run has shown."""

    context: Context
    tensors: dict[tuple[str, str], list[Ids | None]] = field(default_factory=dict)
    attributes: dict[Attribute, int] = field(default_factory=dict)
    outputs: list[tuple[tuple[int, ...], list[Ids | None]]] = field(default_factory=list)
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)  # as `FakeModel.forget` says


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rule of every ATen operation."""

    def __init__(self, context: Context, fake: FakeModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.context, self.fake, self.asleep = context, fake, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.asleep and tensors(out):
            context = self.context
            context.operation, context.module = name_of(func), self.fake.running
            rule_of(func)(context, args, kwargs, out)
        return out


class _Calls(TorchFunctionMode):
    """Remembers the Python-level call, hands out traced sizes, and takes attention as one operation."""

    def __init__(self, context: Context, operations: _Operations) -> None:
        super().__init__()
        self.context, self.operations = context, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.shape.__get__ or name == "size":  # type: ignore[attr-defined]
            return self._size(args, kwargs)
        if name == "numel":
            total: int = 1
            for axis in range(args[0].ndim):
                total = total * self.context.size(args[0], axis)
            return total
        if name == "scaled_dot_product_attention":
            return self._attention(func, args, kwargs)
        if name in ("layer_norm", "rms_norm") and isinstance(args[1], (list, tuple)):
            self.context.operation = name
            _rules_layer.normalized_shape(self.context, args[0], args[1])
        self.context.call = Call(name, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self.context.call = None

    def _size(self, args: Any, kwargs: Any) -> Any:
        tensor, dims = args[0], args[1:] or tuple(kwargs.values())
        if dims and dims[0] is not None:
            return self.context.size(tensor, int(dims[0]))
        return torch.Size([self.context.size(tensor, axis) for axis in range(tensor.ndim)])

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.operations.asleep = True
        try:
            out = func(*args, **kwargs)
        finally:
            self.operations.asleep = False
        context = self.context
        context.operation, context.module = "scaled_dot_product_attention", self.operations.fake.running
        names = ("query", "key", "value")
        _rules_layer.attention(context, [*args, *(kwargs[n] for n in names[len(args) :])], kwargs, out)
        return out


def trace(fake: FakeModel, widths: tuple[float, ...], skip: Skip, choices: Mapping[int, int]) -> Trace:
    """Run `fake` once and return the labels of all parameters, buffers and outputs.

    Raises: TraceError: if the forward fails; the message names the operation and the module.
    """
    context = Context(widths, choices)
    result = Trace(context)
    _label_tensors(fake.model, result, skip)
    operations = _Operations(context, fake)
    never = {f"has_torch_function{kind}": _never for kind in ("", "_unary", "_variadic")}
    quiet = mock.patch.dict(vars(torch.nn.functional), never)  # its Python functions show the operations inside them
    with _traced_attributes(fake.model, result), quiet:
        try:
            output = fake.run(operations, _Calls(context, operations))
        except Exception as error:
            module = fake.model.get_submodule(fake.running)
            raise TraceError(
                f"{type(fake.model).__name__} cannot be traced: {type(error).__name__} in module "
                f"{fake.running or '(the model itself)'!r} ({type(module).__name__}) after operation "
                f"{context.operation or '(none)'!r}: {str(error).strip()[:400]}"
            ) from error
        finally:
            for tensor in (*fake.model.parameters(), *fake.model.buffers()):
                tensor.__dict__.pop("slim_axes", None)
                tensor.__dict__.pop("slim_origin", None)
    result.caches = fake.forget()
    for tensor in output_tensors(output):
        _label_output(context, tensor, result)
    return result


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors in what a forward returns: nested tuples, lists, dicts, or an object with attributes."""
    return tensors(output) or tensors(vars(output) if hasattr(output, "__dict__") else ())


def _never(*_: Any) -> bool:
    return False


def _label_tensors(model: nn.Module, result: Trace, skip: Skip) -> None:
    context = result.context
    for path, module in model.named_modules():
        skipped = skip(path, module)
        first_space = 2 if isinstance(module, nn.modules.conv._ConvNd) else 99
        owned = {**module._parameters, **module._buffers}
        for name, tensor in owned.items():
            if tensor is None:
                continue
            if not hasattr(tensor, "slim_axes"):
                labelled = [n > 1 and axis < first_space for axis, n in enumerate(tensor.shape)]
                axes = [context.labels.fresh(n) if yes else None for n, yes in zip(tensor.shape, labelled, strict=True)]
                context.label(tensor, axes, "weights")
                context.labels.roles.extend(ids for ids in axes if ids is not None)
            result.tensors[path, name] = context.axes(tensor)
            if skipped:
                context.operation, context.module = skipped if isinstance(skipped, str) else "skip", path
                for ids in context.axes(tensor):
                    context.pin(ids)


@contextmanager
def _traced_attributes(model: nn.Module, result: Trace) -> Iterator[None]:
    """Replace the integer attributes of all modules by traced ones for the time of a run."""
    before: list[tuple[nn.Module, str, Any]] = []

    def traced(value: Any, key: Attribute) -> Any:
        if type(value) is int:
            result.attributes[key] = value
            return TracedInt(value, Expression("attribute", key), result.context.on_equal)
        if type(value) in (tuple, list, torch.Size):
            parts = [traced(part, (*key[:2], (*key[2], i))) for i, part in enumerate(value)]
            return type(value)(parts)
        return value

    for path, module in model.named_modules():
        for name, value in list(module.__dict__.items()):
            if type(value) in (int, tuple, list, torch.Size) and value:
                replaced = traced(value, (path, name, ()))
                before.append((module, name, value))
                module.__dict__[name] = replaced
    try:
        yield
    finally:
        for module, name, value in before:
            module.__dict__[name] = value


def _label_output(context: Context, tensor: Tensor, result: Trace) -> None:
    """Pin the units of a classifier or an embedding; features of a backbone may get thinner.

    An output is final if only affine steps lie between the last layer with weights and it, and no other layer
    reads it (class scores), or a single layer makes it and it is a vector (the embedding of a projection head,
    which a predictor may read).
    """
    axes = context.axes(tensor)
    result.outputs.append((tuple(tensor.shape), axes))
    origin = context.origin(tensor)
    if origin not in ("mixed", "normed") or (origin == "normed" and tensor.ndim > 2):
        return
    labels = context.labels
    for ids in axes:
        if ids is None:
            continue
        roots = set(labels.find(ids).tolist())
        read = any(not roots.isdisjoint(labels.find(other).tolist()) for other in context.consumed)
        makers = sum(not roots.isdisjoint(labels.find(other).tolist()) for other in context.producers)
        if not read or (tensor.ndim == 2 and makers == 1):
            context.operation, context.module = "output", ""
            context.pin(ids, "class scores or an embedding")
