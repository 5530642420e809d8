"""What a recipe sees of the program around it: what calls of the model return, and which optimizers step."""

import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from slimmable._modules import swapped
from slimmable._nested import named_tensors
from slimmable.errors import UsageError
from slimmable.losses import nt_xent_logits
from slimmable.losses.distillation import DistillationKind
from slimmable.training.once import entry


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
        with swapped([(vars(part), name, self._noting[part]) for part, name in self._entries.items()]):
            yield

    def outputs(self) -> list[Tensor] | None:
        """Return what the model returned that can learn, and forget the calls; None if there were none.

        Of several models, and of what is in one that returns its loss, the one that was called last counts.
        """
        found = [(part, _learnable(output)) for part, output in self._calls]
        self._calls.clear()
        inner = [call for call in found if call[1]]
        outer = [call for call in inner if call[0] in self._outer]
        calls = outer or inner or found
        return [tensor for part, tensors in calls if part is calls[-1][0] for tensor in tensors] if calls else None


def compared(outputs: Mapping[float, Sequence[Tensor]], kind: DistillationKind) -> dict[float, list[Tensor]]:
    """Return what distillation of this kind compares, for each width; features that get thinner are left out.

    Raises: UsageError: if nothing is left, or `kind` needs to know the right class.
    """
    if len({len(tensors) for tensors in outputs.values()}) > 1:
        counts = ", ".join(f"{len(tensors)} at width {width}" for width, tensors in outputs.items())
        raise UsageError(f"SlimRecipe: the model returned {counts}, so what to compare is open; return (loss, teach)")
    places = zip(*outputs.values(), strict=True)
    same = [found for found in places if len({tensor.shape for tensor in found}) == 1]
    return {width: _comparable([found[at] for found in same], kind) for at, width in enumerate(outputs)}


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


class OptimizerCheck:
    """Notices optimizers that train nothing or not all: made before the conversion, or left without gradients.

    It looks at the parameters of every optimizer that steps between the first gradients and the next ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._updated: set[int] = set()  # ids of parameters
        self._hook: Any = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_hook": None, "_updated": set()}

    def before_gradients(self) -> None:
        """Begin to look or, once an optimizer has stepped, say what the optimizers lack."""
        if self._hook is None:
            own = weakref.ref(self)

            def look(optimizer: torch.optim.Optimizer, *step: Any) -> None:
                check = own()
                if check is not None:
                    check._look(optimizer)

            self._hook = register_optimizer_step_post_hook(look)
            weakref.finalize(self, self._hook.remove)
        elif self._updated:
            self._hook.remove()
            updated, self._updated = self._updated, set()
            held = {name: id(parameter) in updated for name, parameter in self._model.named_parameters()}
            full = {name: re.sub(r"\bnarrow\.\d+\.", "", name) for name in held}  # the name in the full norm
            missing = [name for name in held if not held[name] and held.get(full[name])]
            if missing:
                warnings.warn(
                    f"SlimRecipe: no optimizer has the model's {missing[0]}, one of {len(missing)} of narrow "
                    "norms, which do not learn; make the optimizer after slimmable.slimify",
                    stacklevel=4,
                )

    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        ids = {id(parameter) for parameter in held}
        if not ids.isdisjoint(map(id, self._model.parameters())):
            self._updated |= ids
            if all(parameter.grad is None for parameter in self._model.parameters()):
                raise UsageError(
                    f"SlimRecipe: the model has no gradients when {type(optimizer).__name__} steps; call zero_grad "
                    "before recipe.backward, not after it"
                )
        elif all(parameter.grad is None for parameter in held):
            raise UsageError(
                f"SlimRecipe: this {type(optimizer).__name__} trains nothing: none of its parameters is the model's or "
                "has a gradient; make it after slimmable.slimify, from the parameters of the converted model"
            )


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
