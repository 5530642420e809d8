"""Settings by method and by preset, the optimizers and the learning rate."""

import math

import pytest
import torch
from torch import nn

from slimmable.cli.config import DISTILLATIONS, METHODS, PRESETS, PretrainConfig, configure, with_preset
from slimmable.cli.data import load_images
from slimmable.cli.pretrain import Training, make_optimizer
from slimmable.cli.run import new_method
from slimmable.errors import UsageError
from slimmable.losses import OnlineDistillation


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_configuration(preset):
    config = configure({}, preset)
    assert config.image_size == (224 if "imagenet" in preset else PRESETS[preset]["image_size"])
    assert config.method == PRESETS[preset]["method"]
    assert config.augmentation != "digits"
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == value


def test_what_is_given_comes_before_the_preset():
    config = configure({"epochs": 3, "widths": (1.0, 0.5)}, "byol-imagenet")
    assert (config.epochs, config.widths, config.ema_momentum) == (3, (1.0, 0.5), 0.996)


@pytest.mark.parametrize(
    ("given", "preset", "message"),
    [
        ({}, "slimclr-imagenet", "no --preset is called slimclr-imagenet, but slimclr-mocov2-imagenet"),
        ({"method": "byol"}, "vicreg-imagenet", "--preset vicreg-imagenet is for --method vicreg, not byol"),
        ({"method": "dinov2"}, None, "--method cannot be dinov2; choose from mocov2"),
        ({"method": "byol", "local_crops": 2}, None, "--local-crops is for --method dino, not byol"),
        ({"distill": "magic"}, None, "--distill cannot be magic; choose from own, none, kl"),
        ({"loss_weights": "heavy"}, None, "unknown mode 'heavy'"),
        ({"ema_momentum": 1.5}, None, r"--ema-momentum must be from 0 to 1, got 1.5"),
        ({"temperature": 0.0}, None, "--temperature must be from 1e-09 to 1,000,000, got 0.0"),
        ({"weight_decay": -1.0}, None, "--weight-decay must be from 0"),
    ],
)
def test_settings_without_meaning_are_refused(given, preset, message):
    with pytest.raises(UsageError, match=message):
        configure(given, preset)


def test_a_run_goes_on_with_its_preset_named_again():
    """Whatever else was given then, and whatever follows from the method."""
    config = configure({"data": "/photos", "epochs": 3}, "byol-imagenet")
    config.check_same(with_preset({"epochs": 3}, "byol-imagenet"))
    with pytest.raises(UsageError, match=r"--epochs: the run has 3, now 1000$"):
        config.check_same(with_preset({}, "byol-imagenet"))
    with pytest.raises(UsageError, match="--preset vicreg-imagenet is for --method vicreg, not byol"):
        with_preset({"method": "byol"}, "vicreg-imagenet")


def of(method):
    """Return the settings that a method needs."""
    return {"method": method} | ({"teacher": "test_resnet"} if method == "distillation" else {})


@pytest.mark.parametrize("method", METHODS)
def test_folders_get_the_views_of_their_method(method):
    config = configure({**of(method), "data": "/some/folder"})
    own = {"mocov2": "mocov2", "simclr": "simclr", "simsiam": "mocov2"} | dict.fromkeys(
        ("supervised", "distillation"), "supervised"
    )
    assert config.augmentation == own.get(method, "byol")
    assert config.image_size == 64
    assert configure(of(method)).augmentation == "digits"


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_norms_and_biases_do_not_decay(optimizer):
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    config = PretrainConfig(opt=optimizer, lr=0.1, weight_decay=0.5)
    steps = make_optimizer(config, network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        steps.step()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter.ndim == 1), name


@pytest.fixture(scope="module")
def images():
    return load_images(PretrainConfig(num_images=64))


def training(images, **settings):
    given = {"method": "mocov2", "num_images": 64, "batch_size": 16, "widths": (1.0,), "queue_size": 16, **settings}
    config = PretrainConfig(**given)
    return Training(config, new_method(config, 1, 10), images, torch.device("cpu"))


def test_the_learning_rate_rises_and_falls_as_published(images):
    """Linear warm-up, then a cosine to 0, per step (SlimCLR's scheduler); the peak may change at the slow start."""
    run = training(images, epochs=5, warmup_epochs=1.0, slow_start=0.5, lr=0.1, lr_after_slow_start=0.3)
    for step in range(20):
        run.step = step
        run.take_step()
        peak = 0.1 if step < 10 else 0.3
        share = step / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        assert run.learning_rate == pytest.approx(peak * share, abs=1e-12)
    assert {group["lr"] for group in run.optimizer.param_groups} == {run.learning_rate}


def test_norms_and_biases_can_learn_more_slowly(images):
    run = training(images, epochs=5, warmup_epochs=0.0, norm_lr_scale=0.024, lr=0.5)
    run.take_step()
    rates = {p.ndim > 1: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates == {True: pytest.approx(0.5), False: pytest.approx(0.012)}
    assert run.learning_rate == pytest.approx(0.5)


def test_a_warm_up_that_never_ends_is_refused(images):
    with pytest.raises(UsageError, match=r"--warmup-epochs 2.5 leaves none of the 2 epochs"):
        training(images, epochs=2, warmup_epochs=2.5)
    assert training(images, epochs=20).schedule.warmup_t == 4  # a twentieth, of four steps each


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(method):
    config = configure({**of(method), "num_images": 32, "batch_size": 16, "widths": (1.0, 0.5)})
    images = load_images(config)
    teacher = None if config.teacher is None else nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 7))
    made = new_method(config, 1, len(images.classes), teacher=teacher)
    run = Training(config, made, images, torch.device("cpu"))
    run.step = run.steps - 1
    assert list(run.take_step()) == [1.0, 0.5]


@pytest.mark.parametrize("method", METHODS)
def test_kinds_of_distillation_are_refused_where_a_step_could_not_take_them(method, images):
    settings = {**of(method), "widths": (1.0, 0.5), "warmup_epochs": 0.0}
    refused = {"kl", "dkd", "atkd"} if method in ("byol", "simsiam", "vicreg", "barlowtwins") else set()
    for kind in refused:
        with pytest.raises(UsageError, match=f"--distill {kind} compares logits, which {method} does not"):
            PretrainConfig(method=method, distill=kind)
        run = training(images, **settings)
        run.recipe.distill = OnlineDistillation(kind)
        with pytest.raises(UsageError, match="has no logits"):
            run.take_step()
    for kind in set(DISTILLATIONS) - refused:
        run = training(images, **settings, distill=kind)
        run.step = run.steps - 1
        assert list(run.take_step()) == [1.0, 0.5]


def test_key_parts_that_processes_cannot_share_are_refused(images, monkeypatch):
    monkeypatch.setattr("slimmable.cli.pretrain.world_size", lambda: 2)
    for settings in ({"key_parts": 3}, {"batch_size": 10, "key_parts": 4}):
        with pytest.raises(UsageError, match=r"--key-parts . of --batch-size 1. cannot be shared by 2 processes"):
            training(images, **settings)


def test_moco_v3_freezes_the_patches_of_a_vision_transformer():
    config = configure(
        {"method": "mocov3", "model": "test_vit", "image_size": 32, "proj_dim": 8, "proj_hidden_dim": 16}
    )
    method = new_method(config, 3, 10)
    frozen = {name for name, parameter in method.encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    assert len([module for module in method.encoder.projector if isinstance(module, nn.Linear)]) == 3


@pytest.mark.parametrize("preset", ["slimclr-mocov2-imagenet", "mocov3-vit-imagenet", "vicreg-imagenet"])
def test_the_networks_of_presets_have_the_published_sizes(preset):
    config = configure({"model": "test_resnet" if "vit" not in preset else "test_vit", "image_size": 160}, preset)
    method = new_method(config, 3, 1000)
    with torch.no_grad():
        assert method.encoder.eval()(torch.zeros(1, 3, 160, 160)).shape == (1, config.proj_dim)
