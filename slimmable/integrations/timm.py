"""All widths in timm's train.py, and any of them in its validate.py and inference.py.

The programs stay as they are; their options and these stand in any order behind the path:

    python -m slimmable.integrations.timm train.py --slim-widths 1.0 0.5 --model resnet18 --data-dir photos
    python -m slimmable.integrations.timm validate.py --slim-width 0.5 --model resnet18 --checkpoint last.pth.tar ...
"""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm import models, scheduler, task as tasks
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import Tensor, nn

from slimmable._convert import extract, slimify
from slimmable._width import set_width
from slimmable._widths import WIDTHS, check_widths
from slimmable.errors import CheckpointError, UsageError
from slimmable.losses import OnlineDistillation
from slimmable.training.recipe import SlimRecipe, check_recipe

_create_model, _load_checkpoint = models.create_model, models.load_checkpoint


class SlimTaskMixin(tasks.TrainingTask):
    """Makes a task of timm run all widths of its model: `class Mine(SlimTaskMixin, TheirTask)`.

    The task returns one loss, so all widths' graphs live until `backward`. Checkpoints hold widths and recipe.

    Args:
        recipe: the recipe of the model. Its `steps` count updates if `update_ema` is told their number, as in train.py.
        args, options: for the task.
    """

    def __init__(self, *args: Any, recipe: SlimRecipe, **options: Any) -> None:
        check_recipe(type(self).__name__, recipe=recipe)
        super().__init__(*args, **options)
        self.recipe = recipe

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the results of the widest width, but as `loss` that of all, and each one's own as `loss/w0.5`."""
        results: list[dict[str, Tensor]] = []
        forward, teacher = super().forward, getattr(self, "teacher", None)

        def closure() -> Any:
            results.append(forward(input, target))
            loss, scores = results[-1]["loss"], results[-1]["output"]
            return loss if self.recipe.distill is None else (loss, scores)

        self.recipe.model = cast(nn.Module, self.get_trainable_module())  # which may be wrapped by now
        total = self.recipe.total(closure, frozen=[] if teacher is None else [teacher])
        return {**results[0], **{f"loss/w{width:g}": loss for width, loss in self.recipe.losses.items()}, "loss": total}

    def prepare_distributed(self, device_ids: list[Any] | None = None, **options: Any) -> Any:
        """Wrap the model as the task does; on CPUs without the device that train.py gives, which torch refuses."""
        return super().prepare_distributed(None if self.device.type == "cpu" else device_ids, **options)

    def update_ema(self, step: int | None = None) -> None:
        """Update the averaged weights, and count the update."""
        super().update_ema(step)
        self.recipe.steps_done = self.recipe.steps_done if step is None else step

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the task's state with that of the recipe."""
        own = {"widths": list(self.recipe.loss_weights), "recipe": self.recipe.state_dict()}
        return {**super().get_task_state(module, ema), "slimmable": own}

    def load_checkpoint_state(self, state_dict: Any, task_state: Any = None, *args: Any, **options: Any) -> None:
        """Load weights and, unless the checkpoint is a plain one, the state of the recipe; its widths must agree."""
        widths = list(self.recipe.loss_weights)
        own = (task_state or {}).get("slimmable", {"widths": widths, "recipe": self.recipe.state_dict()})
        if own["widths"] != widths:
            raise CheckpointError(f"the checkpoint has widths {own['widths']}, the model {widths} (--slim-widths)")
        super().load_checkpoint_state(state_dict, task_state, *args, **options)
        self.recipe.load_state_dict(own["recipe"])


class SlimTask(SlimTaskMixin, tasks.ClassificationTask):
    """timm's `ClassificationTask` at all widths.

    >>> model = slimify(timm.create_model("test_resnet", num_classes=2), (1.0, 0.5))
    >>> task = SlimTask(model, recipe=SlimRecipe(model, OnlineDistillation()), verbose=False)
    >>> sorted(task(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])))
    ['loss', 'loss/w0.5', 'loss/w1', 'output']
    """


class _Program:
    """What a program of timm finds in timm while it runs."""

    recipe: SlimRecipe

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.width = options, options.slim_width
        self.widths = check_widths({*options.slim_widths, self.width or 1.0})
        timm.create_model = models.create_model = self.create_model  # type: ignore[assignment]
        models.load_checkpoint = self.load_checkpoint
        scheduler.create_scheduler_v2 = self.create_scheduler  # type: ignore[attr-defined]
        for name, task in dict(vars(tasks)).items():
            if isinstance(task, type) and issubclass(task, tasks.TrainingTask) and name != "TrainingTask":
                setattr(tasks, name, self.slim(task))

    def create_model(self, *args: Any, checkpoint_path: str = "", **options: Any) -> nn.Module:
        model = _create_model(*args, **options)
        if checkpoint_path:
            self.load(model, checkpoint_path)
            if self.width is not None:
                return extract(model, self.width)
        slimify(model, self.widths, inplace=True)
        set_width(model, self.width or 1.0)
        weight = self.options.slim_distill
        distill = OnlineDistillation("kl", 1.0, 1.0, weight=weight) if weight else None
        self.recipe = SlimRecipe(model, distill, slow_start=self.options.slim_slow_start)
        return model

    def load_checkpoint(self, model: nn.Module, checkpoint_path: str, *args: Any, **options: Any) -> None:
        self.load(model, checkpoint_path, *args, **options)
        small = extract(model, self.width or 1.0)
        vars(model).clear()  # the program goes on with this object, which becomes the plain network of one width
        vars(model).update(vars(small))

    def load(self, model: nn.Module, checkpoint_path: str, *args: Any, **options: Any) -> None:
        named = None  # widths, in a checkpoint of `SlimTaskMixin`
        if Path(checkpoint_path).suffix not in (".safetensors", ".npz", ".npy"):
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
            named = checkpoint.get("task_state", {}).get("slimmable", {}).get("widths")
        slimify(model, named or self.widths, inplace=True)
        _load_checkpoint(model, checkpoint_path, *args, **options)

    def create_scheduler(self, *args: Any, **options: Any) -> Any:
        schedule, epochs = create_scheduler_v2(*args, **options)
        self.recipe.steps = epochs * options.get("updates_per_epoch", 0) or None
        return schedule, epochs

    def slim(self, task: type[Any]) -> type[Any]:
        def init(own: Any, *args: Any, **options: Any) -> None:
            if issubclass(task, tasks.FeatureDistillationTask):
                raise UsageError("--kd-distill-type feature compares features, which get thinner; use logit")
            if self.width is not None:
                raise UsageError("--slim-width is for programs that read a checkpoint; --slim-widths are trained")
            SlimTaskMixin.__init__(own, *args, recipe=self.recipe, **options)

        return type(f"Slim{task.__name__}", (SlimTaskMixin, task), {"__init__": init})


def _main() -> None:
    parser = argparse.ArgumentParser("slimmable.integrations.timm", add_help=False, allow_abbrev=False)
    option = parser.add_argument
    option("--slim-help", action="help", help="show this message and exit")
    option("--slim-widths", type=float, nargs="+", default=WIDTHS, metavar="W", help=f"train these: {WIDTHS}")
    option("--slim-width", type=float, metavar="W", help="width of a checkpoint that validate.py reads: 1.0")
    option("--slim-distill", type=float, default=0.5, metavar="X", help="weight of distillation, 0 for none: 0.5")
    option("--slim-slow-start", type=float, default=0.0, metavar="X", help="fraction with full width alone: 0.0")
    own, arguments = parser.parse_known_args()
    if not arguments or not Path(arguments[0]).is_file():
        parser.error(f"the first argument must be the path of timm's train.py or validate.py, got {arguments[:1]}")
    _Program(own)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))  # as Python does
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _main()
