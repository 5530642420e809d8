"""What distillation compares if a training step does not say: the outputs of the model's own calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slimmable._nested import named_tensors
from slimmable.errors import UsageError
from slimmable.losses import nt_xent_logits
from slimmable.losses.distillation import DistillationKind


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[tuple[nn.Module, Any]]]:
    """Collect the calls of `model` in the block, with their outputs; for a `ModuleList` those of its modules.

    Where it returns nothing that can learn but a loss, the calls of its parts come before its own; those inside a
    compiled model are not seen.
    """
    calls: list[tuple[nn.Module, Any]] = []
    inner: list[tuple[nn.Module, Any]] = []
    models = _callable_parts(model)
    children = [child for each in models if not _is_compiled(each) for child in each.children()]
    parts = {part for child in children for part in _callable_parts(child)}.difference(models)

    def collect(module: nn.Module, args: Any, output: Any) -> None:
        if module in parts:
            inner.append((module, output))
            return
        calls.extend([] if _learnable(output) else inner)
        calls.append((module, output))
        inner.clear()

    with ExitStack() as stack:
        for part in (*models, *parts):
            stack.callback(part.register_forward_hook(collect).remove)
        yield calls


def compared(calls: Sequence[tuple[nn.Module, Any]], kind: DistillationKind) -> Sequence[Tensor]:
    """Return what distillation of this kind compares, from the calls of the module that was the last to return some.

    That is the model itself. If it returns the loss, it is its last part, such as a projector.

    Raises: UsageError: if no output has a gradient and at least two axes, or `kind` needs to know the right class.
    """
    last = next((module for module, output in reversed(calls) if _learnable(output)), None)
    found = [tensor for module, output in calls if module is last for tensor in _learnable(output)]
    if not found:
        raise UsageError(
            "SlimRecipe: distillation finds nothing to compare in what the model or its parts returned, which should "
            "be scores or embeddings of shape (batch, ...); return (loss, teach) from the closure"
        )
    two_views = len(found) == 2 and found[0].shape == found[1].shape and found[0].ndim == 2
    if two_views and kind not in ("embedding", "mse"):
        return [nt_xent_logits(*found)]
    if kind == "dkd":
        raise UsageError(
            "SlimRecipe: distillation of kind 'dkd' compares logits with the right class in column 0; return "
            "(loss, teach) from the closure"
        )
    return [(each.movedim(1, -1) if each.ndim == 4 else each).flatten(0, -2) for each in found]


def _callable_parts(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, DistributedDataParallel):
        return _callable_parts(model.module)
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        return [part for child in model.children() for part in _callable_parts(child)]
    return [model]


def _is_compiled(model: nn.Module) -> bool:
    return "_orig_mod" in model._modules or model._compiled_call_impl is not None


def _learnable(output: Any) -> list[Tensor]:
    """Return the tensors of an output that can learn, or its `logits` alone if it has some."""
    named = [
        (name, tensor)
        for name, tensor in named_tensors(output)
        if tensor.requires_grad and tensor.is_floating_point() and tensor.ndim >= 2
    ]
    logits = [tensor for name, tensor in named if name.split(".")[-1] == "logits"]
    return logits or [tensor for _, tensor in named]
