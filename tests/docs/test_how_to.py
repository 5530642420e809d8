"""The programs of the how-to pages do what the pages say: they train every width, as a plain loop would."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import slimmable
from slimmable.losses import contrastive_cross_entropy, moco_logits, slim_loss
from tests.docs.test_examples import NEEDED, afters, blocks, needs, place, run

__all__ = ["place"]  # a fixture for all tests here

Start = dict[str, Tensor]


@pytest.fixture
def converted(monkeypatch) -> list[tuple[nn.Module, Start]]:
    """Every model that a program converts, and what its parameters were then."""
    found: list[tuple[nn.Module, Start]] = []
    slimify = slimmable.slimify

    def noting(*args: Any, **options: Any) -> nn.Module:
        model = slimify(*args, **options)
        found.append((model, {name: p.detach().clone() for name, p in model.named_parameters()}))
        return model

    monkeypatch.setattr(slimmable, "slimify", noting)
    monkeypatch.setattr(slimmable.integrations.solo, "slimify", noting)
    return found


@pytest.mark.parametrize("page", sorted(page for page in NEEDED if afters(page)))
def test_every_parameter_of_every_width_is_trained(page, tmp_path, converted):
    needs(page)
    for program in afters(page):
        run(program, tmp_path)
    assert len(converted) == len(afters(page)) > 0
    for model, start in converted:
        now = dict(model.named_parameters())
        frozen = {name for name in start if name.partition(".")[0].endswith("_momentum")}
        assert [name for name in start.keys() - frozen if torch.equal(now[name], start[name])] == []
        assert all(parameter.isfinite().all() for parameter in now.values())
        assert len(slimmable.widths_of(model)) > 2
        assert slimmable.width_of(model) == 1.0


def test_a_model_that_returns_its_loss_trains_every_width_and_moves_its_momentum_encoder_once(tmp_path):
    pytest.importorskip("torchvision")
    (program,) = afters("docs/how-to/facebook.md")
    found = run(program, tmp_path)
    model, recipe = found["model"], found["recipe"]
    assert list(recipe.losses) == [1.0, 0.75, 0.5, 0.25]
    assert recipe.steps_done == 4
    narrow = {name: p for name, p in model.encoder.named_parameters() if ".narrow." in name and name.endswith("weight")}
    assert len(narrow) == 20 * 3
    assert [name for name, parameter in narrow.items() if torch.equal(parameter, torch.ones_like(parameter))] == []
    assert model.encoder.bn1.narrow[0].num_batches_tracked == model.momentum_encoder.bn1.full.num_batches_tracked == 8
    assert model.momentum_encoder.bn1.narrow[0].num_batches_tracked == 0
    assert all(slimmable.width_of(encoder) == 1.0 for encoder in (model.encoder, model.momentum_encoder))


def test_the_logits_that_moco_teaches_are_those_of_the_criterion_of_lightly():
    lightly_loss = pytest.importorskip("lightly.loss")
    criterion = lightly_loss.NTXentLoss(memory_bank_size=(32, 8))
    query, key = torch.randn(4, 8), torch.randn(4, 8)
    negatives = criterion.memory_bank.bank.T.clone()  # as on the page
    page = "".join(blocks("docs/how-to/lightly.md", "python"))
    (line,) = {line.strip() for line in page.splitlines() if "bank.T" in line}
    assert line == "negatives = criterion.memory_bank.bank.T.clone()"
    expected = contrastive_cross_entropy(moco_logits(query, key, negatives), criterion.temperature)
    torch.testing.assert_close(criterion(query, key), expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_of_transformers_takes_the_step_of_a_plain_loop(accumulation, tmp_path):
    needs("docs/how-to/hf-trainer.md")
    found = run(afters("docs/how-to/hf-trainer.md")[0], tmp_path)
    torch.manual_seed(0)
    model = found["ViTForImageClassification"](found["config"])
    model = slimmable.slimify(model, (1.0, 0.5, 0.25), example_inputs={"pixel_values": torch.zeros(2, 1, 8, 8)})
    plain = copy.deepcopy(model).train()
    rows, rate = found["rows"][:16], 0.01
    options = found["TrainingArguments"](
        "runs",
        max_steps=1,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=rate,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
    )
    recipe = slimmable.SlimRecipe(model, distill=slimmable.OnlineDistillation())
    found["SlimTrainer"](model, options, recipe=recipe, train_dataset=rows).train()

    x = torch.stack([row["pixel_values"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    distill = slimmable.OnlineDistillation()
    optimizer = torch.optim.SGD(plain.parameters(), lr=rate)
    # Batches are drawn in another order, which the mean over all of them does not show; teachers are per image.
    scores = {w: out.logits for w, out in slimmable.run_widths(plain, pixel_values=x).items()}
    supervised = [functional.cross_entropy(y, labels) for y in scores.values()]
    taught = [distill(y, scores[1.0].detach()) for w, y in scores.items() if w != 1.0]
    slim_loss(supervised, taught, slimmable.losses.width_weights((1.0, 0.5, 0.25))).backward()
    optimizer.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name)


def test_the_two_programs_for_lightning_take_the_same_steps(tmp_path):
    needs("docs/how-to/lightning.md")
    results = []
    for program in afters("docs/how-to/lightning.md"):
        assert "AdamW(self.parameters(), lr=1e-3)" in program  # which makes steps out of rounding
        program = program.replace("AdamW(self.parameters(), lr=1e-3)", "SGD(self.parameters(), lr=0.01)")
        program = program.replace("digits = load_digits()", "torch.manual_seed(0)\ndigits = load_digits()")
        program = re.sub(r"Trainer\(\s*max", "Trainer(precision=64, max", program.replace("float32", "float64"))
        results.append(run(program, tmp_path)["method"].state_dict())
    summed, one_by_one = results
    assert summed.keys() == one_by_one.keys()
    for name, tensor in summed.items():
        torch.testing.assert_close(one_by_one[name], tensor, rtol=1e-6, atol=1e-8, msg=name)


def test_the_task_of_timm_gives_the_loss_of_slimclr(tmp_path):
    needs("docs/how-to/timm-train.md")
    found = run(afters("docs/how-to/timm-train.md")[0], tmp_path)
    task, (x, labels) = found["task"], found["data"].tensors
    task.eval()
    distill, widths = slimmable.OnlineDistillation("kl", 1.0, 1.0), (1.0, 0.75, 0.5, 0.25)
    scores = slimmable.run_widths(task.trainable_module, x)
    losses = [task.criterion(y, labels) for y in scores.values()]
    taught = [distill(scores[width], scores[1.0]) - distill.floor(scores[1.0]) for width in widths[1:]]
    for steps, expected in (0, losses[0]), (4, slim_loss(losses, taught, (2.5, 1.0, 1.0, 1.0))):
        task.recipe.steps_done = steps
        result = task(x, labels)
        torch.testing.assert_close(result["loss"], expected)
        torch.testing.assert_close(result["output"], scores[1.0])


def test_solo_learns_queue_takes_each_key_once_and_momentum_follows(tmp_path):
    needs("docs/how-to/solo-learn.md")
    found = run("\n".join(blocks("docs/how-to/solo-learn.md", "python")), tmp_path)
    method, fresh = found["method"], found["MoCoV2Plus"](found["cfg"])
    assert int(method.queue_ptr) == 2 * 2 * 16 % 64  # epochs, batches, images; the queue holds 64
    for online, momentum in method.momentum_pairs:
        assert [p.shape for p in online.parameters()] == [p.shape for p in momentum.parameters()]
        assert slimmable.width_of(momentum) == 1.0
    seen: list[tuple[float, Tensor]] = []
    keep = fresh._dequeue_and_enqueue
    recipe = slimmable.integrations.solo.slim_recipe(fresh, example_inputs=torch.zeros(2, 3, 32, 32))
    fresh._dequeue_and_enqueue = lambda keys: (
        seen.append((slimmable.width_of(recipe.model), fresh.queue.clone())),
        keep(keys),
    )
    before, keys = fresh.queue.clone(), []
    fresh.momentum_projector[0].register_forward_hook(lambda module, args, output: keys.append(output))
    callback = slimmable.integrations.lightning.SlimCallback(recipe)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    found["Trainer"](max_steps=1, callbacks=[callback], **options).fit(fresh, found["loader"])
    assert [width for width, _ in seen] == [1.0, 0.75, 0.5, 0.25]
    assert all(torch.equal(queue, before) for _, queue in seen)  # no width meets this step's keys
    assert not torch.equal(fresh.queue, before)
    assert len(keys) == 2  # of two views, at the widest width only


def test_a_detector_learns_at_both_widths_and_each_is_a_plain_detector(tmp_path):
    detection = pytest.importorskip("torchvision.models.detection")
    found = run("\n".join(blocks("docs/how-to/detection.md", "python")), tmp_path)
    history: Any = found["history"]
    for width, losses in history.items():
        assert torch.tensor(losses).isfinite().all(), width
        assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), width
    detector, small = found["detector"], found["small"]
    narrow = {name: module for name, module in detector.named_modules() if slimmable.view.state.is_slim(module)}
    places = ("backbone.body", "backbone.fpn", "rpn.head", "roi_heads.box_head", "roi_heads.mask_head")
    assert all(any(name.startswith(place) for name in narrow) for place in places)
    assert type(small) is detection.MaskRCNN
    assert not any(slimmable.view.state.is_slim(module) for module in small.modules())
    assert any(len(each["boxes"]) for each in found["found"])  # there is something to compare
    images, targets = found["images"], found["targets"]
    small.train()
    detector.train()
    with slimmable.at_width(detector, 0.5):
        torch.manual_seed(0)
        ours = detector(images, targets)
    torch.manual_seed(0)
    assert {name: loss.item() for name, loss in small(images, targets).items()} == pytest.approx(
        {name: loss.item() for name, loss in ours.items()}
    )
