"""timm's training program at all widths: the task, and the unmodified train.py and validate.py.

The programs are not part of timm's package. SLIMMABLE_TIMM_CHECKOUT names a checkout of its repository.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
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
    assert other.recipe.progress == 0.8  # one step later, as before


class Step:
    """Two steps of one process of two: its gradients, with nothing updated in between."""

    def __init__(self, name: str, wrap: bool) -> None:
        self.name, self.wrap = name, wrap

    def __call__(self, rank: int) -> list[dict[str, Tensor]]:
        model = converted(self.name).double()
        recipe = slimmable.SlimRecipe(model, distillation(), slow_start=0.5, steps=2)
        task = SlimTask(model, recipe=recipe, verbose=False)
        if self.wrap:
            task.prepare_distributed(device_ids=[torch.device("cpu")])  # as train.py does
        steps = []
        for seed in rank, rank + 2:
            task.zero_grad(set_to_none=True)
            x, labels = batch(seed, 160 if self.name == "test_vit" else 32)
            task(x.double(), labels)["loss"].backward()
            steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return steps


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_two_processes_average_the_gradients_of_all_widths_also_with_a_slow_start(name, tmp_path):
    alone = [Step(name, wrap=False)(rank) for rank in range(2)]
    for steps in run_in_two(Step(name, wrap=True), tmp_path):
        for step, *own in zip(steps, *alone, strict=True):
            for key in own[0]:
                expected = (own[0][key] + own[1][key]) / 2
                torch.testing.assert_close(step[key], expected, rtol=0, atol=1e-8, msg=key)


PROGRAM = """
import sys, torch
from timm.models import create_model, load_checkpoint
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask

torch.manual_seed(0)
model = create_model("test_resnet", num_classes=3, checkpoint_path="")
if sys.argv[1:2] == ["--checkpoint"]:
    load_checkpoint(model, sys.argv[2])
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.save(model.eval()(x), "scores.pt")
else:
    task = ClassificationTask(model=model, verbose=False)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    create_scheduler_v2(optimizer, num_epochs=2, updates_per_epoch=2)
    for step in range(4):
        loss = task(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step + 1)
    torch.save(task.get_checkpoint_state(), "saved.pt")
"""


def run(folder: Path, *command: Any, **environment: str) -> str:
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=given, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def slim(folder: Path, *command: Any) -> str:
    return run(folder, "-m", "slimmable.integrations.timm", *command)


def test_a_program_that_imports_from_timm_trains_all_widths_and_reads_one(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    slim(tmp_path, "program.py", "--slim-widths", "1", "0.5", "--slim-slow-start", "0.5")
    saved = torch.load(tmp_path / "saved.pt")
    assert saved["task_state"] == {"slimmable": {"widths": [1.0, 0.5], "recipe": {"steps_done": 4}}}
    model, start = converted(), converted()
    model.load_state_dict(saved["state_dict"])
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert all(moved)
    assert int(model.get_buffer("bn1.narrow.0.num_batches_tracked")) == 2  # of four steps
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for width, scores in slimmable.run_widths(model.eval(), images).items():
        slim(tmp_path, "program.py", "--slim-width", width, "--checkpoint", "saved.pt")
        torch.testing.assert_close(torch.load(tmp_path / "scores.pt"), scores)


def test_the_command_says_what_it_expects(tmp_path):
    command = [sys.executable, "-m", "slimmable.integrations.timm", "--slim-widths", "1", "0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "the first argument must be the path of timm's train.py or validate.py" in done.stderr
    assert "--slim-slow-start" in slim(ROOT, "--slim-help")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "slimmable.integrations.timm", "program.py", "--slim-width", "0.5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "--slim-width is for programs that read a checkpoint" in done.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder, numbers = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for place in range(24):
        image = Image.fromarray(numbers.integers(256, size=(32, 32, 3), dtype=np.uint8))
        path = folder / ("validation" if place % 3 == 2 else "train") / f"class{place % 2}" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


COMMON = shlex.split("--model test_resnet --num-classes 2 --input-size 3 32 32 -b 4 --device cpu -j 0 --no-prefetcher")
TRAIN = [*COMMON, *shlex.split("--epochs 2 --warmup-epochs 0 --output . --lr 0.05")]


def checkpoint(folder: Path, experiment: str) -> dict[str, Any]:
    return torch.load(folder / experiment / "last.pth.tar", weights_only=False)


@published
def test_the_published_programs_train_resume_and_measure(photos, tmp_path):
    train, data = CHECKOUT / "train.py", ["--data-dir", photos]
    run(tmp_path, train, *data, *TRAIN, "--experiment", "plain", "--model-ema", "--mixup", "0.2")
    slim(tmp_path, train, *data, *TRAIN, "--experiment", "one", "--model-ema", "--mixup", "0.2", "--slim-widths", "1")
    plain, one = checkpoint(tmp_path, "plain"), checkpoint(tmp_path, "one")
    for weights in "state_dict", "state_dict_ema":
        assert plain[weights].keys() == one[weights].keys()
        assert all(torch.equal(plain[weights][name], tensor) for name, tensor in one[weights].items())
    assert (tmp_path / "plain" / "summary.csv").read_text() == (tmp_path / "one" / "summary.csv").read_text()

    own = ["--slim-widths", "1", "0.5", "--slim-slow-start", "0.4"]
    other = shlex.split("--model-ema --amp --amp-dtype bfloat16 --clip-grad 1 --grad-accum-steps 3 --mixup 0.2")
    slim(tmp_path, train, *data, *TRAIN, *own, *other, "--experiment", "all")
    saved = checkpoint(tmp_path, "all")
    assert saved["task_state"]["slimmable"] == {"widths": [1.0, 0.5], "recipe": {"steps_done": 4}}
    more = ["--experiment", "resumed", "--resume", tmp_path / "all" / "last.pth.tar", "--epochs", "3"]
    slim(tmp_path, train, *data, *TRAIN, *own, *other, *more)
    assert checkpoint(tmp_path, "resumed")["task_state"]["slimmable"]["recipe"] == {"steps_done": 6}

    model = slimmable.slimify(timm.create_model("test_resnet", num_classes=2), WIDTHS)
    model.load_state_dict(saved["state_dict"])
    file = tmp_path / "all" / "last.pth.tar"
    for width in WIDTHS:
        printed = slim(tmp_path, CHECKOUT / "validate.py", *data, *COMMON, "--checkpoint", file, "--slim-width", width)
        found = json.loads(printed.partition("--result")[2])
        small = slimmable.extract(model, width)
        assert found["param_count"] == round(sum(p.numel() for p in small.parameters()) / 1e6, 2)


@published
def test_the_published_inference_classifies_at_a_width(photos, tmp_path):
    pytest.importorskip("pandas", reason="inference.py needs pandas")
    own = ["--slim-widths", "1", "0.5", "--experiment", "all"]
    slim(tmp_path, CHECKOUT / "train.py", "--data-dir", photos, *TRAIN, *own)
    own = ["--slim-width", "0.5", "--checkpoint", tmp_path / "all" / "last.pth.tar"]
    more = ["--data-dir", photos / "validation", "--results-dir", tmp_path, "--results-file", "found"]
    slim(tmp_path, CHECKOUT / "inference.py", *COMMON[:-1], *own, *more)
    assert (tmp_path / "found.csv").exists()


@published
def test_the_published_program_runs_in_two_processes_with_a_slow_start(photos, tmp_path):
    program = ["-m", "slimmable.integrations.timm", CHECKOUT / "train.py", "--data-dir", photos, *TRAIN]
    own = ["--slim-widths", "1", "0.5", "--slim-slow-start", "0.5", "--experiment", "two"]
    run(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program, *own)
    assert checkpoint(tmp_path, "two")["task_state"]["slimmable"]["recipe"]["steps_done"] == 4
