"""Notice optimizers that were made before the conversion, and so lack parameters of the model."""

from __future__ import annotations

import re
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from slimmable.errors import UsageError


class OptimizerCheck:
    """Looks at the parameters of every optimizer that steps between the first gradients and the next ones."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._updated: set[int] = set()  # ids of parameters
        self._hook: Any = None
        self._done = False

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_hook": None}

    def before_gradients(self) -> None:
        """Begin to look or, once an optimizer has stepped, say what the optimizers lack."""
        if self._done:
            return
        if self._hook is None:
            own = weakref.ref(self)

            def look(optimizer: torch.optim.Optimizer, *step: Any) -> None:
                check = own()
                if check is not None and not check._done:
                    check._look(optimizer)

            self._hook = register_optimizer_step_pre_hook(look)
            weakref.finalize(self, self._hook.remove)
        elif self._updated:
            self._done = True
            self._hook.remove()
            parameters = dict(self._model.named_parameters())
            held = {name for name, parameter in parameters.items() if id(parameter) in self._updated}
            full = {name: re.sub(r"\bnarrow\.\d+\.", "", name) for name in parameters.keys() - held}
            missing = sorted(name for name, whole in full.items() if name != whole and whole in held)
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
                    f"SlimRecipe: this {type(optimizer).__name__} trains nothing: the model has no gradients when it "
                    "steps; call zero_grad before recipe.backward, not after it"
                )
        elif all(parameter.grad is None for parameter in held):
            raise UsageError(
                f"SlimRecipe: this {type(optimizer).__name__} trains nothing: none of its parameters is the model's or "
                "has a gradient; make it after slimmable.slimify, from the parameters of the converted model"
            )
