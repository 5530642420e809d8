"""The Trainer of transformers at all widths: published code, with a recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import slimmable
from slimmable.losses import slim_loss, width_weights
from tests.two_processes import run_in_two

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
SlimTrainer = pytest.importorskip("slimmable.integrations.transformers").SlimTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own
WIDTHS = (1.0, 0.5, 0.25)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def vit(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        num_channels=1, image_size=8, patch_size=2, num_labels=10, hidden_dropout_prob=dropout, **SIZES
    )
    return transformers.ViTForImageClassification(config)


def converted(widths: tuple[float, ...] = WIDTHS, dropout: float = 0.0) -> nn.Module:
    return slimmable.slimify(vit(dropout), widths, example_inputs={"pixel_values": torch.zeros(2, 1, 8, 8)})


def rows(count: int = 64, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return [{"pixel_values": image, "labels": place % 10} for place, image in enumerate(images)]


def options(folder: Path, steps: int = 4, **changed: Any) -> Any:
    given = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    given |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return transformers.TrainingArguments(str(folder), max_steps=steps, **{**given, **changed})


def recipe(model: nn.Module, **changed: Any) -> slimmable.SlimRecipe:
    return slimmable.SlimRecipe(model, slimmable.OnlineDistillation(), **changed)


def assert_same(mine: nn.Module, theirs: nn.Module) -> None:
    own, other = mine.state_dict(), theirs.state_dict()
    assert [name for name in other if not torch.equal(own[name], other[name])] == []


@pytest.mark.parametrize(
    "changed", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}, {"label_smoothing_factor": 0.1}]
)
def test_at_width_one_alone_it_is_the_plain_trainer_bit_for_bit(changed, tmp_path):
    plain, model = vit(dropout=0.1), converted((1.0,), dropout=0.1)
    theirs = transformers.Trainer(plain, options(tmp_path, **changed), train_dataset=rows())
    theirs.train()
    mine = SlimTrainer(model, options(tmp_path, **changed), recipe=slimmable.SlimRecipe(model), train_dataset=rows())
    mine.train()
    assert_same(model, plain)
    assert [log.get("loss") for log in mine.state.log_history] == [log.get("loss") for log in theirs.state.log_history]


@pytest.mark.parametrize("batches", [1, 3])
def test_a_step_is_that_of_a_loop(batches, tmp_path):
    """Distillation counts as much as the loss with which it is compared, whatever the number of batches."""
    model, plain = converted(), converted()
    changed = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.1}
    changed |= {"per_device_train_batch_size": 12 // batches, "gradient_accumulation_steps": batches}
    trainer = SlimTrainer(model, options(tmp_path, 1, **changed), recipe=recipe(model), train_dataset=rows(12))
    trainer.train()
    x = torch.stack([row["pixel_values"] for row in rows(12)])  # in another order, which a mean does not show
    labels = torch.tensor([row["labels"] for row in rows(12)])
    distill = slimmable.OnlineDistillation()
    scores = {w: out.logits for w, out in slimmable.run_widths(plain.train(), pixel_values=x).items()}
    own = [functional.cross_entropy(each, labels) for each in scores.values()]
    taught = [distill(each, scores[1.0].detach()) for width, each in scores.items() if width != 1.0]
    slim_loss(own, taught, width_weights(WIDTHS)).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(float(own[0]), rel=1e-5)
    assert logged["loss/w0.25"] == pytest.approx(float(own[2]), rel=1e-5)
    floor = distill.floor(scores[1.0].detach())
    assert logged["distillation/w0.25"] == pytest.approx(float(taught[1] - floor), abs=1e-4)


def test_resuming_is_bit_equal_and_a_checkpoint_loads_as_a_plain_model(tmp_path):
    def run(resume: str | None = None) -> tuple[nn.Module, Any]:
        model = converted(dropout=0.1)
        given = options(tmp_path / "run", 8, save_strategy="steps", save_steps=4, gradient_accumulation_steps=2)
        trainer = SlimTrainer(model, given, recipe=recipe(model, slow_start=0.6), train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    whole, trainer = run()
    saved = tmp_path / "run" / "checkpoint-4"
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 4
    assert ["loss/w0.5" in log for log in trainer.state.log_history[:-1]] == [False] * 5 + [True] * 3
    resumed, trainer = run(str(saved))
    assert_same(resumed, whole)
    assert ["loss/w0.5" in log for log in trainer.state.log_history[:-1]] == [False] * 5 + [True] * 3
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-8")
    assert_same(slimmable.extract(whole, 1.0), again)
    small = slimmable.extract(whole, 0.25)
    assert type(small) is transformers.ViTForImageClassification
    images = torch.rand(2, 1, 8, 8)
    with slimmable.at_width(whole.eval(), 0.25):
        torch.testing.assert_close(small.eval()(images).logits, whole(images).logits)


def test_every_width_is_evaluated_and_trainers_of_other_kinds_do(tmp_path):
    class Theirs(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            scores = model(pixel_values=inputs["pixel_values"]).logits
            loss = functional.cross_entropy(scores, inputs["labels"]) * 2
            return (loss, {"loss": loss, "logits": scores}) if return_outputs else loss

    class Mine(SlimTrainer, Theirs): ...

    model = converted()
    given = options(tmp_path, 2, eval_strategy="epoch", num_train_epochs=1)
    trainer = Mine(
        model, given, recipe=recipe(model), eval_widths=WIDTHS[1:], train_dataset=rows(16), eval_dataset=rows(16)
    )
    trainer.train()
    found = trainer.evaluate()
    for prefix, width in ("eval", 1.0), ("eval_w0.5", 0.5), ("eval_w0.25", 0.25):
        with slimmable.at_width(model, width):
            expected = super(SlimTrainer, trainer).evaluate()["eval_loss"]
        assert found[f"{prefix}_loss"] == expected
    several = trainer.evaluate({"a": rows(8), "b": rows(8)})
    assert {name for name in several if name.endswith("_loss")} == {
        f"eval_{name}{width}_loss" for name in "ab" for width in ("", "_w0.5", "_w0.25")
    }


def _trained(rank: int) -> dict[str, Tensor]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun does, for accelerate
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    return _train_in_double(batch_size=4)


def _train_in_double(batch_size: int) -> dict[str, Tensor]:
    model = converted().double()
    given = options(
        Path("unused"), 3, per_device_train_batch_size=batch_size, gradient_accumulation_steps=2,
        learning_rate=0.1, optim="sgd", logging_strategy="no", seed=1,
    )  # fmt: skip
    data = rows(64, torch.float64)
    SlimTrainer(model, given, recipe=recipe(model, slow_start=0.3), train_dataset=data).train()
    return model.state_dict()


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_in_two(_trained, tmp_path)
    expected = _train_in_double(batch_size=8)
    for state in found:
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-8, msg=name)
