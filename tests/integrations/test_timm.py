"""timm's training program at all widths: the task, and the unmodified train.py and validate.py.

The programs are not part of timm's package. SLIMMABLE_TIMM_CHECKOUT names a checkout of its repository.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import slimmable
from slimmable.losses import slim_loss, width_weights
from tests.two_processes import run_in_two

pytest.importorskip("timm.task", reason="this timm has no tasks")
from slimmable.integrations.timm import SlimTask, SlimTaskMixin

ROOT = Path(__file__).parents[2]
CHECKOUT = Path(os.environ.get("SLIMMABLE_TIMM_CHECKOUT", ROOT / "missing"))
published = pytest.mark.skipif(not (CHECKOUT / "train.py").exists(), reason="SLIMMABLE_TIMM_CHECKOUT is not set")
WIDTHS = (1.0, 0.5)


def converted(name: str = "test_resnet", widths: tuple[float, ...] = WIDTHS) -> nn.Module:
    torch.manual_seed(0)
    return slimmable.slimify(timm.create_model(name, num_classes=3), widths)


def distillation() -> slimmable.OnlineDistillation:
    return slimmable.OnlineDistillation("kl", 1.0, 1.0)


def batch(seed: int = 0, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 3, size, size, generator=generator), torch.randint(3, (4,), generator=generator)


def test_the_task_returns_the_loss_of_slimclr_and_the_results_of_the_widest():
    model = converted().eval()
    x, labels = batch()
    task = SlimTask(model, recipe=slimmable.SlimRecipe(model, distillation()), verbose=False)
    scores = slimmable.run_widths(model, x)
    own = {width: functional.cross_entropy(y, labels) for width, y in scores.items()}
    teacher = scores[1.0].detach()
    divergence = distillation()(scores[0.5], teacher) - distillation().floor(teacher)
    result = task(x, labels)
    torch.testing.assert_close(result["loss"], slim_loss(list(own.values()), [divergence], width_weights(WIDTHS)))
    assert torch.equal(result["output"], scores[1.0])
    assert {name: float(value) for name, value in result.items() if "/" in name} == {
        f"loss/w{width:g}": float(loss) for width, loss in own.items()
    }


def test_at_width_one_alone_it_is_the_plain_task_bit_for_bit():
    plain = timm.task.ClassificationTask(converted(widths=(1.0,)), verbose=False)
    model = copy.deepcopy(plain.trainable_module)
    task = SlimTask(model, recipe=slimmable.SlimRecipe(model, distillation()), verbose=False)
    for one in (plain, task):
        one(*batch())["loss"].backward()
    for mine, theirs in zip(task.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_teacher_of_another_model_runs_once_per_step():
    class Task(SlimTaskMixin, timm.task.LogitDistillationTask): ...

    model, teacher = converted(), timm.create_model("test_vit", num_classes=3, img_size=32)
    task = Task(model, teacher, recipe=slimmable.SlimRecipe(model, distillation()), verbose=False)
    calls = []
    teacher.patch_embed.register_forward_hook(lambda *call: calls.append(call))
    result = task(*batch())
    result["loss"].backward()
    assert len(calls) == 1
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_checkpoint_restores_the_progress_and_refuses_other_widths():
    def made(widths: tuple[float, ...]) -> SlimTask:
        model = converted(widths=widths)
        recipe = slimmable.SlimRecipe(model, slow_start=0.5, steps=10)
        return SlimTask(model, recipe=recipe, verbose=False)

    task, other = made(WIDTHS), made(WIDTHS)
    assert "loss/w0.5" not in task(*batch())
    task.update_ema(step=7)
    saved = task.get_checkpoint_state()
    other.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    assert other.recipe.progress == 0.7
    assert "loss/w0.5" in other(*batch())
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True))
    with pytest.raises(slimmable.errors.CheckpointError, match=r"has widths \[1.0, 0.5\], the model \[1.0, 0.25\]"):
        made((1.0, 0.25)).load_checkpoint_state(saved["state_dict"], saved["task_state"])
    plain = timm.task.ClassificationTask(timm.create_model("test_resnet", num_classes=3), verbose=False)
    saved = plain.get_checkpoint_state()
    other.load_checkpoint_state(saved["state_dict"], saved.get("task_state"))
    assert other.recipe.progress == 0.7


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_two_processes_average_the_gradients_of_all_widths_also_with_a_slow_start(name, tmp_path):
    alone, size = [], 160 if name == "test_vit" else 32
    for rank in range(2):  # each process's own gradients, step by step, from the same weights
        task = two_step_task(name)
        steps = gradients_of(task, [batch(rank, size), batch(rank + 2, size)])
        alone.append(steps)
    expected = [{key: (first[key] + second[key]) / 2 for key in first} for first, second in zip(*alone, strict=True)]
    for steps in run_in_two(lambda_free(name, size), tmp_path):
        for step, gradients in zip(expected, steps, strict=True):
            assert step.keys() <= gradients.keys()
            for key, gradient in step.items():
                torch.testing.assert_close(gradients[key], gradient, rtol=1e-8, atol=1e-10, msg=key)


def two_step_task(name: str) -> SlimTask:
    model = converted(name).double()
    recipe = slimmable.SlimRecipe(model, distillation(), slow_start=0.5, steps=2)
    return SlimTask(model, recipe=recipe, verbose=False)


def gradients_of(task: SlimTask, batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    """The gradients of each step, with nothing updated in between."""
    steps = []
    model = timm.utils.unwrap_model(task.get_trainable_module())
    for x, labels in batches:
        task.zero_grad(set_to_none=True)
        task(x.double(), labels)["loss"].backward()
        steps.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    return steps


class lambda_free:  # noqa: N801
    """What a process does; an object, because functions in functions cannot be sent to processes."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __call__(self, rank: int) -> list[dict[str, Tensor]]:
        task = two_step_task(self.name)
        task.prepare_distributed(device_ids=[torch.device("cpu")])  # as train.py does
        return gradients_of(task, [batch(rank, self.size), batch(rank + 2, self.size)])
