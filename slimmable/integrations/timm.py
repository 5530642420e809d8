"""All widths in timm's train.py, and any of them in its validate.py, inference.py and onnx_export.py.

The programs stay as they are; their options and these may stand in any order behind the path:

    python -m slimmable.integrations.timm train.py --slim-widths 1.0 0.5 0.25 --model resnet18 --data-dir photos
    python -m slimmable.integrations.timm validate.py --slim-width 0.5 --model resnet18 --checkpoint last.pth.tar ...
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm import models, scheduler
from timm import task as tasks
from torch import Tensor, nn

from slimmable._convert import WIDTHS, extract, slimify
from slimmable._width import set_width
from slimmable._widths import check_widths
from slimmable.errors import CheckpointError, UsageError
from slimmable.losses import OnlineDistillation
from slimmable.training import SlimRecipe

__all__ = ["SlimTask", "SlimTaskMixin", "main"]


class SlimTaskMixin:
    """Makes a task of timm run all widths of its model: `class MyTask(SlimTaskMixin, TheirTask)`.

    The task returns one loss, their weighted sum, so whoever calls `backward` on it need not know. With
    `--model-ema` and other options of train.py it is the plain task, and its checkpoints hold the widths and the
    progress of the recipe in their `task_state`.

    Args:
        recipe: the recipe of the task's model. If `update_ema` is told the number of the update, as in train.py, the
            recipe's `steps` count updates, otherwise batches.
        args, options: for the task.
    """

    def __init__(self, *args: Any, recipe: SlimRecipe, **options: Any) -> None:
        super().__init__(*args, **options)
        self.recipe = recipe

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return what the task returns at the widest width, with the `loss` of all and each width's own `loss/w...`."""
        results: list[dict[str, Tensor]] = []
        forward = super().forward  # type: ignore[misc]
        self.recipe.model = self.get_trainable_module()  # type: ignore[attr-defined]

        def at_a_width() -> Any:
            results.append(forward(input, target))
            loss, scores = results[-1]["loss"], results[-1]["output"]
            return loss if self.recipe.distill is None else (loss, scores)

        total = self.recipe.total(at_a_width, frozen=[self.teacher] if hasattr(self, "teacher") else [])
        own = {f"loss/w{width:g}": loss for width, loss in self.recipe.losses.items()}
        return {**results[0], **own, "loss": total}

    def prepare_distributed(self, device_ids: list[Any] | None = None, **options: Any) -> Any:
        """Wrap the model as the task does, on CPUs too: there train.py gives a device, which torch refuses."""
        on_cpu = self.device.type == "cpu"  # type: ignore[attr-defined]
        return super().prepare_distributed(None if on_cpu else device_ids, **options)  # type: ignore[misc]

    def update_ema(self, step: int | None = None) -> None:
        """Update the averaged weights, and count the update."""
        super().update_ema(step)  # type: ignore[misc]
        if step is not None:
            self.recipe.steps_done = step

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the task's state with that of the recipe."""
        own = {"widths": list(self.recipe.loss_weights), "recipe": self.recipe.state_dict()}
        return {**super().get_task_state(module, ema), "slimmable": own}  # type: ignore[misc]

    def load_checkpoint_state(
        self, state_dict: dict[str, Any], task_state: dict[str, Any] | None = None, ema: bool = False, **options: Any
    ) -> None:
        """Load the weights, and the state of the recipe if there is one: a plain checkpoint has none.

        Raises: CheckpointError: if the checkpoint has other widths.
        """
        own = (task_state or {}).get("slimmable")
        if own is not None and own["widths"] != list(self.recipe.loss_weights):
            raise CheckpointError(
                f"this checkpoint has the widths {own['widths']}, the model {list(self.recipe.loss_weights)}; convert "
                "the model with the widths of the checkpoint (train.py: --slim-widths)"
            )
        super().load_checkpoint_state(state_dict, task_state, ema, **options)  # type: ignore[misc]
        if own is not None:
            self.recipe.load_state_dict(own["recipe"])


class SlimTask(SlimTaskMixin, tasks.ClassificationTask):
    """timm's `ClassificationTask` at all widths; arguments as there, and the recipe.

    >>> from timm import create_model
    >>> model = slimify(create_model("test_resnet", num_classes=2), (1.0, 0.5))
    >>> task = SlimTask(model, recipe=SlimRecipe(model, OnlineDistillation()), verbose=False)
    >>> result = task(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))
    >>> sorted(result)
    ['loss', 'loss/w0.5', 'loss/w1', 'output']
    """


class _Program:
    """What a program of timm gets instead of what it imports from timm."""

    def __init__(self, widths: Iterable[float], width: float | None, **recipe: Any) -> None:
        self.widths = check_widths({*widths, width or 1.0})
        self.width = width
        self._options = recipe
        self._recipe: SlimRecipe | None = None
        self._create_model, self._load_checkpoint = models.create_model, models.load_checkpoint
        self._create_scheduler = scheduler.create_scheduler_v2

    def install(self) -> None:
        timm.create_model = models.create_model = self.create_model
        models.load_checkpoint = self.load_checkpoint
        scheduler.create_scheduler_v2 = self.create_scheduler
        for name, task in [*vars(tasks).items()]:
            if isinstance(task, type) and issubclass(task, tasks.TrainingTask) and task is not tasks.TrainingTask:
                setattr(tasks, name, self._slim_task(task))

    def create_model(self, *args: Any, checkpoint_path: str = "", **options: Any) -> nn.Module:
        """Convert the model; with --slim-width, set its width, or return that width's network of a checkpoint."""
        model = slimify(self._create_model(*args, **options), self.widths, inplace=True)
        if checkpoint_path:
            model = self._loaded(model, checkpoint_path)
            if self.width is not None:
                return extract(model, self.width)
            model = slimify(model, self.widths, inplace=True)
        set_width(model, self.width or 1.0)
        self._recipe = SlimRecipe(model, **self._options)
        return model

    def load_checkpoint(self, model: nn.Module, checkpoint_path: str, *args: Any, **options: Any) -> None:
        """Turn `model` into the network of --slim-width of a checkpoint, so that its size and speed are that one's."""
        small = extract(self._loaded(model, checkpoint_path, *args, **options), self.width or 1.0)
        vars(model).clear()
        vars(model).update(vars(small))

    def create_scheduler(self, *args: Any, **options: Any) -> Any:
        """Create the schedule, and learn from it how many updates there will be."""
        schedule, epochs = self._create_scheduler(*args, **options)
        if self._recipe is not None:
            self._recipe.steps = epochs * options.get("updates_per_epoch", 0) or None
        return schedule, epochs

    def _loaded(self, model: nn.Module, checkpoint_path: str, *args: Any, **options: Any) -> nn.Module:
        widths = _widths_in(checkpoint_path) or self.widths
        model = slimify(model, widths, inplace=True)
        try:
            self._load_checkpoint(model, checkpoint_path, *args, **options)
        except RuntimeError as error:
            message = f"{checkpoint_path} does not fit this model at --slim-widths {' '.join(map(str, widths))}: {error}"
            raise CheckpointError(message) from error
        return model

    def _slim_task(self, task: type[Any]) -> type[Any]:
        program = self

        class Slim(SlimTaskMixin, task):  # type: ignore[misc]
            def __init__(self, *args: Any, **options: Any) -> None:
                if issubclass(task, tasks.FeatureDistillationTask):
                    raise UsageError("--kd-distill-type feature compares features, which get thinner; use logit")
                super().__init__(*args, recipe=program._recipe, **options)

        Slim.__name__ = f"Slim{task.__name__}"
        return Slim


def _widths_in(checkpoint_path: str) -> tuple[float, ...] | None:
    """Return the widths that a checkpoint of `SlimTaskMixin` names; others name none."""
    if Path(checkpoint_path).suffix in (".safetensors", ".npz", ".npy"):
        return None
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    found = checkpoint.get("task_state", {}).get("slimmable") if isinstance(checkpoint, dict) else None
    return None if found is None else check_widths(found["widths"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run a program of timm."""
    parser = argparse.ArgumentParser(
        prog="python -m slimmable.integrations.timm",
        usage="%(prog)s path/to/train.py|validate.py [--slim-... ...] [options of the program]",
        description="Run timm's train.py at all widths, or its validate.py, inference.py or onnx_export.py at one.",
        add_help=False,
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("--slim-help", action="help", help="show this message")
    option("--slim-widths", type=float, nargs="+", default=WIDTHS, metavar="W", help=f"widths to train: {WIDTHS}")
    option("--slim-width", type=float, metavar="W", help="width of the checkpoint that validate.py reads: 1.0")
    option("--slim-distill", type=float, default=0.5, metavar="X", help="weight of distillation, 0 for none: 0.5")
    option("--slim-temperature", type=float, default=1.0, metavar="T", help="temperature of distillation: 1.0")
    option("--slim-slow-start", type=float, default=0.0, metavar="X", help="fraction of full width alone: 0.0")
    own, arguments = parser.parse_known_args(argv)
    if not arguments or not Path(arguments[0]).is_file():
        parser.error(f"expected the path of a program of timm, such as train.py, got {arguments[:1]}")
    distill = None
    if own.slim_distill:
        distill = OnlineDistillation("kl", own.slim_temperature, own.slim_temperature, weight=own.slim_distill)
    _Program(own.slim_widths, own.slim_width, distill=distill, slow_start=own.slim_slow_start).install()
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))  # as if Python ran it
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
