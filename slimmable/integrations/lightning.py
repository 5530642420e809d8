"""LightningModules at all widths: a callback for the Trainer; the module stays as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slimmable._width import width_of
from slimmable.errors import UsageError
from slimmable.training import SlimRecipe, average_gradients
from slimmable.view.norms import NarrowNorms

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

__all__ = ["SlimCallback"]


class SlimCallback(Callback):
    """Trains a LightningModule at all widths of a recipe, one width's graph at a time.

    Lightning calls `training_step` for the widest width, as always. When it asks for the backward pass, the narrower
    widths follow one by one: each runs `training_step` again and its own backward pass. Precision, accumulation,
    clipping, schedules and averages of weights stay Lightning's. Under DistributedDataParallel, gradients are averaged
    once per step. With manual optimization, call `recipe.backward(closure, backward=self.manual_backward)` in
    `training_step` instead; the rest of this text holds too.

    What the step changes besides parameters and BatchNorm statistics (buffers, queues, metrics, counters, lists) changes
    once per step: narrower widths start from the state before it. Momentum encoders go into `frozen` of the recipe.
    `self.log` keeps its names for the widest width, and logs as `name/w0.5` for the others; metric objects are logged
    for the widest only. With distillation, `training_step` may return what is compared as `teach` in its dict; otherwise
    it is the output of the calls of `recipe.model`.

    `recipe.steps` comes from the trainer if it is not given, and the recipe's state goes into the checkpoint. The
    checkpoint of the plain module can be resumed too: narrower norms start from the full one, without optimizer state.

    Args:
        recipe: of the module, or of a part of it. Convert the module before `Trainer.fit`, best in its `__init__`: then
            `load_from_checkpoint` finds all widths.

    Raises: UsageError: in `Trainer.fit`, if `training_step` takes a `dataloader_iter`, or the strategy (DeepSpeed) runs
        its own backward pass; return `recipe.total(closure)` from `training_step` there, which needs the memory of all
        widths.

    >>> import slimmable
    >>> from lightning.pytorch import Trainer
    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> class Boring(BoringModel):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> module = slimmable.slimify(Boring(), (1.0, 0.5), example_inputs=torch.zeros(1, 32))
    >>> callback = SlimCallback(slimmable.SlimRecipe(module))
    >>> trainer = Trainer(fast_dev_run=1, callbacks=[callback], accelerator="cpu", enable_progress_bar=False)
    >>> trainer.fit(module)
    >>> list(callback.recipe.losses)
    [1.0, 0.5]
    """

    def __init__(self, recipe: SlimRecipe) -> None:
        self.recipe = recipe
        self._counts_steps = recipe.steps is None
        self._restored = False  # whether the recipe's state came from a checkpoint
        self._checkpoint: dict[str, Any] = {}
        self._replaced: dict[str, Any] = {}  # attributes of the module, as they were
        self._parts: Iterator[tuple[Tensor, Any]] | None = None  # the widths of this step that are to come
        self._loss = self._widest = torch.zeros(())  # what Lightning gets, and what it stands for
        self._averages = False

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember the checkpoint until there are optimizers."""
        self._checkpoint = checkpoint

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the module run at all widths, and make room in the optimizer state of a plain checkpoint."""
        states = self._checkpoint.get("optimizer_states", ())
        for optimizer, state in zip(trainer.optimizers, states, strict=False):
            _make_room(state, optimizer, pl_module)
        self._checkpoint = {}
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise UsageError("SlimCallback: each width needs the same batch; take `batch` instead of `dataloader_iter`")
        wrappers: dict[str, Callable[..., Any]] = {"log": self._log}
        if pl_module.automatic_optimization:
            wrappers |= {
                "training_step": self._training_step,
                "backward": self._backward,
                "optimizer_step": self._optimizer_step,
            }
        for name, wrapper in wrappers.items():
            self._replaced[name] = vars(pl_module).get(name)
            function = getattr(pl_module, name)
            setattr(pl_module, name, wraps(function)(partial(wrapper, pl_module, function)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the recipe how long the training is, and how much of it is done."""
        steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        if self._counts_steps and 0 < steps < float("inf"):
            self.recipe.steps = steps
        if not self._restored:
            self.recipe.steps_done = trainer.global_step * trainer.accumulate_grad_batches
        self._restored = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Run the narrower widths without a backward pass if there was none, as in the last epoch of SWA."""
        if self._parts is None:
            return
        if self._loss.grad is not None:
            raise UsageError(
                f"SlimCallback: {type(trainer.strategy).__name__} runs its own backward pass, so only width 1.0 was "
                "trained; return recipe.total(closure) from training_step, without this callback"
            )
        with torch.no_grad():
            while self._next(pl_module) is not None:
                pass

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        for name, before in self._replaced.items():
            delattr(pl_module, name)
            if before is not None:
                setattr(pl_module, name, before)
        self._replaced = {}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the recipe's state, for the checkpoint."""
        return self.recipe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the recipe of the checkpoint had got."""
        self.recipe.load_state_dict(state_dict)
        self._restored = True

    def _log(self, module: Any, log: Callable[..., None], name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        width = width_of(self.recipe.model) if module.trainer.training else 1.0
        if width == 1.0:
            log(name, value, *args, **kwargs)
        elif width in self.recipe.loss_weights and not isinstance(value, nn.Module):
            log(f"{name}/w{width}", value, *args, **kwargs)

    def _training_step(self, module: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the widest width, and return its loss as the start of a graph of its own."""
        outputs = []

        def closure() -> Any:
            output = step(*args, **kwargs)
            if not outputs:
                outputs.append(output)
            loss, teach = (output["loss"], output.get("teach")) if isinstance(output, Mapping) else (output, None)
            if loss is None:
                raise _NoLossError
            return loss if teach is None else (loss, teach)

        self._parts = self.recipe._parts(closure, (), [module])
        try:
            self._widest, _ = next(self._parts)
        except _NoLossError:
            self._parts = None
            return None
        (output,) = outputs
        self._loss = self.recipe.losses[1.0].clone().requires_grad_()
        return {**output, "loss": self._loss} if isinstance(output, Mapping) else self._loss

    def _backward(self, module: Any, backward: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass of the widest width, then each narrower width and its backward pass.

        What Lightning did to the loss (divided by the batches of a step, scaled) is done to each width's.
        """
        (factor,) = torch.autograd.grad(loss, self._loss)
        part: Tensor | None = self._widest
        while part is not None:
            backward(part * factor, *args, **kwargs)
            part = self._next(module)
        if self._averages:
            average_gradients(module)

    def _next(self, module: Any) -> Tensor | None:
        """Run the next width, and return its part of the loss; None after the last one."""
        assert self._parts is not None
        self._widest = torch.zeros(())
        with module.trainer.precision_plugin.train_step_context():
            part, _ = next(self._parts, (None, None))
        if part is None:
            self._parts = None
        return part

    def _optimizer_step(
        self, module: Any, step: Callable[..., None], epoch: int, batch: int, optimizer: Any, closure: Callable[[], Any]
    ) -> None:
        """Hold back DistributedDataParallel's own averaging, which expects one backward pass."""
        wrapped = module.trainer.model

        def unsynchronised() -> Any:
            with wrapped.no_sync():
                result = closure()
            wrapped.require_forward_param_sync = True  # the next forward hands out buffers, as after a plain step
            return result

        self._averages = isinstance(wrapped, DistributedDataParallel)
        step(epoch, batch, optimizer, unsynchronised if self._averages else closure)
        self._averages = False


class _NoLossError(Exception):
    """`training_step` returned None: the batch is skipped at all widths."""


def _make_room(state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Number the parameters in the optimizer state of a plain module as in that of the converted one, in place."""
    narrow = {
        id(parameter) for part in module.modules() if isinstance(part, NarrowNorms) for parameter in part.parameters()
    }
    start, numbers = 0, {}
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        places = range(start, start + len(group["params"]))
        kept = [place for place, each in zip(places, group["params"], strict=True) if id(each) not in narrow]
        if len(kept) != len(saved["params"]):  # not that of the plain module
            return
        numbers.update(zip(saved["params"], kept, strict=True))
        saved["params"], start = list(places), places.stop
    state["state"] = {numbers[number]: each for number, each in state["state"].items()}
