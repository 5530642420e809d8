"""What a checkpoint may hold: the tensors that this training has; anything else changes nothing."""

import pytest
import torch

from slimmable.cli.config import PretrainConfig
from slimmable.cli.data import load_images
from slimmable.cli.pretrain import Training, optimizer_tensors
from slimmable.cli.run import (
    check_alike,
    load_checkpoint,
    new_method,
    save_checkpoint,
    trained_method,
)
from slimmable.errors import CheckpointError

SETTINGS = {"method": "mocov2", "num_images": 64, "batch_size": 16, "epochs": 2, "widths": (1.0, 0.5), "queue_size": 64}


def fresh(**settings):
    config = PretrainConfig(**{**SETTINGS, **settings})
    images = load_images(config)
    return Training(config, new_method(config, images.channels, len(images.classes)), images, torch.device("cpu"))


def after(steps, path, **settings):
    """The checkpoint after so many steps; the slow start of the run ends after 4 of 8."""
    training = fresh(**settings)
    for _ in range(steps):
        training.take_step()
    training.save(path)
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def sixth(tmp_path_factory):
    return after(6, tmp_path_factory.mktemp("sixth") / "checkpoint.safetensors")


@pytest.fixture(scope="module")
def training():
    return fresh()


def state(training):
    return {
        **training.method.state_dict(),
        **optimizer_tensors(training.optimizer),
        "step": torch.tensor(training.step),
    }


def refused(training, tensors, step, message):
    before = {name: tensor.clone() for name, tensor in state(training).items()}
    with pytest.raises(CheckpointError, match=message):
        training.resume(tensors, step)
    now = state(training)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


FIRST = "training.optimizer.0.backbone.conv1.weight"
NARROW = "training.optimizer.0.backbone.bn1.narrow.0.weight"


def without(part):
    return lambda given: {name: tensor for name, tensor in given.items() if part not in name}


def changed(name, change):
    return lambda given: {**given, name: change(given[name])}


def renamed(given):
    """As a checkpoint by number would have it."""
    number = {name.rpartition(".")[0]: str(i) for i, name in enumerate(n for n in given if n.endswith(".step"))}
    return {
        f"training.optimizer.{number[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}"
        if name.startswith("training.optim")
        else name: t
        for name, t in given.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("optimizer."), r"missing: training\.optimizer\.0\.backbone\.bn1\.weight\.step"),
        (without(".exp_avg_sq"), "missing: .*exp_avg_sq"),
        (without(FIRST), f"missing: {FIRST}.step, {FIRST}.exp_avg, "),
        (without(NARROW), f"missing: {NARROW}.step"),
        (renamed, "unknown: "),
        (
            lambda given: {**given, "training.optimizer.0.no.exp_avg": torch.ones(3)},
            r"unknown: .*optimizer\.0\.no\.exp_avg",
        ),
        (lambda given: {**given, f"{FIRST}.momentum_buffer": torch.ones(3)}, "unknown: .*momentum_buffer"),
        (
            changed(f"{FIRST}.exp_avg", lambda t: t[:3]),
            r"another shape: training.*conv1\.weight\.exp_avg \(3, ",
        ),
        (changed(f"{FIRST}.exp_avg", lambda t: t.flatten()), "another shape"),
        (changed(f"{FIRST}.exp_avg", lambda t: t.half()), r"another type: .*float16, expected torch\.float32"),
        (changed(f"{FIRST}.exp_avg", lambda t: t * torch.nan), "infinite or NaN: .*exp_avg"),
        (changed(f"{FIRST}.step", lambda t: t[None]), r"another shape: .*step \(1,\)"),
        (changed(f"{FIRST}.step", lambda t: t.long()), "another type: .*step"),
        (without("method.moco.queue"), r"missing: training\.method\.moco\.queue"),
        (changed("training.method.moco.queue", lambda t: t[:, :-1]), r"another shape: training\.method\.moco\.queue"),
        (
            changed("training.method.moco.position", lambda t: t.float()),
            r"another type: .*moco\.position",
        ),
        (lambda given: {**given, "training.scaler.scale": torch.tensor(2.0)}, r"unknown: training\.scaler\.scale"),
        (lambda given: {**given, "method.encoder.backbone.conv1.weight": torch.ones(1)}, "unknown: method.encoder"),
        (lambda given: {**given, "weights": torch.ones(1)}, "unknown: weights"),
    ],
)
def test_other_state_of_the_training_is_refused(training, sixth, change, message):
    refused(training, change(sixth[0]), sixth[1], message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("conv1"), "missing: backbone.conv1.weight"),
        (changed("backbone.conv1.weight", lambda t: t * torch.inf), r"infinite or NaN: backbone\.conv1\.weight"),
        (changed("backbone.conv1.weight", lambda t: t.double()), r"another type: backbone\.conv1\.weight"),
    ],
)
def test_another_network_is_refused(training, sixth, change, message):
    refused(training, change(sixth[0]), sixth[1], message)


@pytest.mark.parametrize("step", [0, 9, 99999])
def test_a_step_that_the_run_does_not_have_is_refused(training, sixth, step):
    refused(training, sixth[0], step, f"of step {step}, but the run has steps 1 to 8")


@pytest.mark.parametrize("step", ["", "six", "6.0", "1e1", "9" * 5000])
def test_a_step_that_is_no_number_is_refused(tmp_path, step):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, torch.nn.Linear(1, 1).state_dict(), step)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"opt": "sgd"},
        {"opt": "lars"},
        {"opt": "lars", "precision": "float16"},
        {"universal": True, "method": "supervised"},
        {"method": "vicreg", "widths": (1.0,), "gate_budget": 0.5},
        {"method": "byol", "slow_start": 0.0},
        {"method": "mocov3", "slow_start": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [3, 6])
def test_its_own_state_is_taken_and_a_part_of_it_is_not(tmp_path, settings, steps):
    found, done = after(steps, tmp_path / "checkpoint.safetensors", **settings)
    training = fresh(**settings)
    last = next(name for name in found if name.startswith("training.optimizer."))
    refused(training, without(last)(found), done, "missing: ")
    refused(training, without("optimizer.")(found), done, "missing: ")
    training.resume(found, done)
    assert training.step == steps
    training.save(tmp_path / "again.safetensors")
    again, _ = load_checkpoint(tmp_path / "again.safetensors")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], found[name]) for name in again)
    training.take_step()


def test_a_run_in_float16_whose_steps_all_overflowed_goes_on(tmp_path):
    training = fresh(opt="sgd", precision="float16")
    training.scaler = torch.amp.GradScaler("cpu", 2.0**60)
    for _ in range(2):
        training.take_step()
    training.save(tmp_path / "checkpoint.safetensors")
    found, done = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert not any(tensor.any() for name, tensor in found.items() if name.startswith("training.optimizer."))
    again = fresh(opt="sgd", precision="float16")
    again.resume(found, done)
    assert again.scaler.get_scale() == 2.0**58
    wrong = {**found, "training.scaler.growth_factor": torch.tensor(3.0)}
    refused(again, wrong, done, "unknown: training.scaler.growth_factor")


def test_a_kernel_never_sees_a_tensor_of_another_shape():
    """Fused AdamW would write behind the end of the three numbers."""
    parameter = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.AdamW([("0", parameter)], fused=True)
    parameter.grad = torch.ones(1000)
    optimizer.step()
    memory = torch.zeros(1000)
    given = {"0.step": torch.tensor(1.0), "0.exp_avg": memory[:3], "0.exp_avg_sq": torch.zeros(1000)}
    for tensors, message in (
        (given, r"another shape: 0\.exp_avg \(3,\), expected \(1000,\)"),
        ({**given, "0.exp_avg": memory.int()}, r"another type: 0\.exp_avg"),
        ({**given, "7.exp_avg": memory}, r"unknown: 7\.exp_avg"),
        ({"exp_avg": memory}, "unknown: exp_avg"),
        ({"0.exp_avg": memory}, r"missing: 0\.step, 0\.exp_avg_sq"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_alike(optimizer_tensors(optimizer), tensors, "the state")


def test_a_network_that_is_no_number_is_not_evaluated(run, tmp_path):
    found, done = load_checkpoint(run / "checkpoint.safetensors")
    found["backbone.conv1.weight"][0] = torch.nan
    save_checkpoint(tmp_path / "checkpoint.safetensors", found, done)
    config = PretrainConfig(**SETTINGS)
    with pytest.raises(CheckpointError, match=r"infinite or NaN: backbone\.conv1\.weight"):
        trained_method(config, tmp_path, channels=1)
