"""All widths in the Trainer of transformers."""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from slimmable._modules import swapped
from slimmable._width import at_width, columns_of, places_of
from slimmable.errors import UsageError
from slimmable.training.recipe import SlimRecipe, check_recipe


class SlimTrainer(Trainer):
    """A Trainer that trains all widths of its model; also one of another kind: `class Mine(SlimTrainer, SFTTrainer)`.

    Each width runs the Trainer's own step, with a backward pass of its own and the memory of one width. The logs show
    the loss of the widest as `loss`, and of narrower ones as `loss/w0.5` and, in distillation, `distillation/w0.5`.

    Args:
        recipe: the recipe of the model. It needs no `steps`: the Trainer and its checkpoints know how many there are.
        eval_widths: widths at which `evaluate` runs too; it names their metrics `eval_w0.5_loss` and so on.
        args, options: for the Trainer.
    """

    def __init__(self, *args: Any, recipe: SlimRecipe, eval_widths: tuple[float, ...] = (), **options: Any) -> None:
        check_recipe(type(self).__name__, recipe=recipe)
        if not isinstance(eval_widths, (tuple, list)):
            raise UsageError(f"SlimTrainer: eval_widths must be a list of widths, got {eval_widths!r:.80}")
        for width in eval_widths:
            columns_of(places_of(recipe.model), width)  # which refuses what is no width of it
        super().__init__(*args, **options)
        self.recipe, self.eval_widths = recipe, eval_widths
        self._logged: dict[str, list[Tensor]] = defaultdict(list)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the Trainer's step at each width, and return the loss of the widest."""
        recipe, accelerator = self.recipe, self.accelerator
        recipe.model, recipe.steps, recipe.steps_done = model, self.state.max_steps, self.state.global_step
        step = partial(super().training_step, model, inputs, num_items_in_batch)
        batches: int = self.current_gradient_accumulation_steps  # the Trainer divides losses by it, but not scores
        held: list[tuple[Tensor, dict[str, Any]]] = []

        def closure() -> Tensor:
            with swapped([(accelerator.__dict__, "backward", lambda loss, **more: held.append((loss, more)))]):
                step()
            return held[-1][0] * batches

        def backward(loss: Tensor) -> None:
            accelerator.backward(loss / batches, **held.pop()[1])

        loss = recipe.backward(closure, backward=backward) / batches
        for name, values in ("loss", recipe.losses), ("distillation", recipe.distillations):
            for width in values.keys() & recipe.loss_weights.keys() - {1.0}:  # but not widths drawn for this step
                self._logged[f"{name}/w{width:g}"].append(values[width])
        return loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log what the Trainer logs, and beside a `loss` the means of the narrower widths since the last one."""
        if "loss" in logs and self._logged:
            means = torch.stack([torch.stack(self._logged[name]).mean() for name in sorted(self._logged)])
            logs |= zip(sorted(self._logged), self.accelerator.reduce(means, "mean").tolist(), strict=True)
            self._logged.clear()
        super().log(logs, *args, **options)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Evaluate as the Trainer does, then at each of `eval_widths`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not isinstance(eval_dataset or self.eval_dataset, dict):  # of which each comes here by itself
            for width in self.eval_widths:
                with at_width(self.recipe.model, width):
                    metrics |= super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_w{width:g}")
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save weights under the names of the modules: the Trainer does not rename them when it loads them again."""
        named = isinstance(self.model, PreTrainedModel)
        save = partial(self.model.save_pretrained, save_original_format=False) if named else None
        with swapped([(self.model.__dict__, "save_pretrained", save)] if named else []):
            super()._save(output_dir, state_dict)
