"""What distillation compares if a training step does not say: the outputs of the model's own calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slimmable._nested import named_tensors
from slimmable.errors import UsageError
from slimmable.losses import nt_xent_logits
from slimmable.losses.distillation import DistillationKind
from slimmable.training.once import entry, replaced


class Calls:
    """Notes what calls of a model, and of the modules directly in it, return while a block runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._calls: list[tuple[nn.Module, Any]] = []
        self._outer = _callable_parts(model)
        plain = [part for part in self._outer if entry(part) == "forward" and "_orig_mod" not in part._modules]
        inner = [each for part in plain for child in part.children() for each in _callable_parts(child)]
        self._entries = {part: entry(part) for part in (*self._outer, *inner)}
        # the same functions in every step, so that a compiler that has seen them need not compile again
        self._noting = {part: self._noted(part, getattr(part, name)) for part, name in self._entries.items()}

    def _noted(self, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if not torch.compiler.is_compiling():
                self._calls.append((part, output))
            return output

        return noted

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the calls in a block."""
        self._calls.clear()
        with replaced([(part, name, self._noting[part]) for part, name in self._entries.items()]):
            yield

    def outputs(self) -> list[Tensor] | None:
        """Return what the model returned that can learn, and forget the calls; None if there were none.

        Of several models, and of what is in one that returns its loss, the one that was called last counts.
        """
        found = [(part, _learnable(output)) for part, output in self._calls]
        self._calls.clear()
        outer = [call for call in found if call[1] and call[0] in self._outer]
        inner = [call for call in found if call[1]]
        for calls in filter(None, (outer, inner)):
            return [tensor for part, tensors in calls if part is calls[-1][0] for tensor in tensors]
        return [] if found else None


def compared(outputs: Mapping[float, Sequence[Tensor]], kind: DistillationKind) -> dict[float, list[Tensor]]:
    """Return what distillation of this kind compares, for each width; features that get thinner are left out.

    Raises: UsageError: if nothing is left, or `kind` needs to know the right class.
    """
    if len({len(tensors) for tensors in outputs.values()}) > 1:
        counts = ", ".join(f"{len(tensors)} at width {width}" for width, tensors in outputs.items())
        raise UsageError(f"SlimRecipe: the model returned {counts}, so what to compare is open; return (loss, teach)")
    same = [
        place for place, found in enumerate(zip(*outputs.values(), strict=True)) if len({t.shape for t in found}) == 1
    ]
    return {width: _comparable([tensors[place] for place in same], kind) for width, tensors in outputs.items()}


def _comparable(found: Sequence[Tensor], kind: DistillationKind) -> list[Tensor]:
    if not found:
        raise UsageError(
            "SlimRecipe: distillation finds nothing to compare in what the model returned, which should be scores or "
            "embeddings of shape (batch, ...), of one size at all widths; return (loss, teach) from the closure"
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


def _learnable(output: Any) -> list[Tensor]:
    """Return the tensors of an output that can learn, or its `logits` alone if it has some."""
    named = [
        (name, tensor)
        for name, tensor in named_tensors(output)
        if tensor.requires_grad and tensor.is_floating_point() and tensor.ndim >= 2
    ]
    logits = [tensor for name, tensor in named if name.split(".")[-1] == "logits"]
    return logits or [tensor for _, tensor in named]
