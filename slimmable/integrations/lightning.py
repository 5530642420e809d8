"""A LightningModule at all widths: a callback for the Trainer; the module stays as it is."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from slimmable._distributed import averaged_once
from slimmable._modules import swapped
from slimmable._width import width_of
from slimmable.errors import UsageError
from slimmable.training.recipe import SlimRecipe, check_recipe

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback


class SlimCallback(Callback):
    """Trains a LightningModule at all widths of a recipe, with the memory of one.

    Each width calls `training_step` and has its own backward pass. What else the step changes (queues, metrics,
    counters, lists) changes once; momentum encoders go into `frozen` of the recipe. `self.log` logs the widest width
    under the plain name and the others as `name/w0.5`, but objects such as metrics for the widest only. The entry
    `teach` of a dict that the step returns is what distillation compares. With manual optimization, the step itself
    calls `recipe.backward(closure, backward=self.manual_backward)`. The recipe's state is in the checkpoint; for a slow
    start, the Trainer knows its `steps`.

    Args:
        recipe: of the module or its networks, which are converted before `Trainer.fit`, best in `__init__`.

    Raises: UsageError: in `Trainer.fit`, if `training_step` takes a `dataloader_iter`, or if the strategy runs its own
        backward pass (DeepSpeed). There, `training_step` can return `recipe.total(closure)`.

    >>> from lightning.pytorch import Trainer
    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> module = BoringModel()
    >>> module.layer = slimmable.SlimLinear(32, 2, widths=(1.0, 0.5), slim_in=False)
    >>> recipe = SlimRecipe(module)
    >>> Trainer(accelerator="cpu", max_steps=1, barebones=True, callbacks=[SlimCallback(recipe)]).fit(module)
    >>> list(recipe.losses)
    [1.0, 0.5]
    """

    def __init__(self, recipe: SlimRecipe) -> None:
        check_recipe("SlimCallback", recipe=recipe)
        self.recipe = recipe
        self.state_dict, self.load_state_dict = recipe.state_dict, recipe.load_state_dict
        self._counts = recipe.steps is None
        self._replaced = ExitStack()  # what is replaced while the module trains
        self._parts: Iterator[Tensor] = iter(())  # of the widths that are still to run
        self._part: Tensor | None = None  # of the width that has run, with its graph
        self._loss = torch.zeros(())  # what Lightning gets: the widest's own loss, without the graph

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Replace what the Trainer calls of the module by what runs all widths."""
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise UsageError("SlimCallback: training_step must take a batch, not a dataloader_iter")
        if self._counts and self.recipe.slow_start:
            steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
            self.recipe.steps = steps if 0 < steps < float("inf") else None
        if trainer.global_step == 0:  # not a resumed run
            self.recipe.steps_done = 0
        automatic = ("training_step", "backward", "optimizer_step") if pl_module.automatic_optimization else ()
        new: list[tuple[dict[str, Any], str, Any]] = []
        for name in ("log", *automatic):
            original = getattr(pl_module, name)
            own = partial(getattr(self, f"_{name}"), pl_module, original)
            new.append((vars(pl_module), name, wraps(original)(own)))
        if not automatic:
            new.append((vars(self.recipe), "backward", averaged_once(trainer.model)(self.recipe.backward)))
        self._replaced.enter_context(swapped(new))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Run the narrower widths if no backward pass did, as when `StochasticWeightAveraging` updates norms."""
        if self._loss.grad is not None:
            fault = f"{type(trainer.strategy).__name__} ran its own backward pass, which trains width 1.0"
            raise UsageError(f"SlimCallback: {fault}; return recipe.total(closure) instead, without this callback")
        while self._part is not None:
            self._run_next(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any, exception: BaseException | None = None) -> None:
        """Leave the module as it was, at width 1.0."""
        self._parts, self._part = iter(()), None
        self._replaced.close()

    on_exception = on_train_end

    def _log(self, module: Any, log: Callable[..., None], name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        width = width_of(self.recipe.model) if module.trainer.training else 1.0
        if width == 1.0:
            log(name, value, *args, **kwargs)
        elif width in self.recipe.loss_weights and not isinstance(value, nn.Module):
            log(f"{name}/w{width}", value, *args, **kwargs)

    def _training_step(self, module: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs = []

        def closure() -> Any:
            output = step(*args, **kwargs)
            entries = output if isinstance(output, Mapping) else {"loss": output}
            if self.recipe.first:
                outputs.append(output)
            return entries["loss"] if entries.get("teach") is None else (entries["loss"], entries["teach"])

        self._parts = self.recipe.parts(closure, once=[module])
        self._run_next(module)
        self._loss = self.recipe.losses[1.0].clone().requires_grad_()
        return {**outputs[0], "loss": self._loss} if isinstance(outputs[0], Mapping) else self._loss

    def _backward(self, module: Any, backward: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (factor,) = torch.autograd.grad(loss, self._loss)  # what precision and accumulation multiply the loss by
        while self._part is not None:
            backward(self._part * factor, *args, **kwargs)
            self._run_next(module)

    def _run_next(self, module: Any) -> None:
        """Run the next width as Lightning runs `training_step`."""
        self._part = None  # its graph is done with
        with module.trainer.precision_plugin.train_step_context():
            self._part = next(self._parts, None)

    def _optimizer_step(self, module: Any, step: Callable[..., None], *args: Any) -> None:
        """Let DistributedDataParallel, which expects one backward pass, average once after the closure's last."""
        step(*args[:-1], averaged_once(module.trainer.model)(args[-1]))
