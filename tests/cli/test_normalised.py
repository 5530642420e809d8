"""Inputs are normalised as timm's configuration of the model says, in training, evaluation and on the model card."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from slimmable.__main__ import main
from slimmable.cli.config import PretrainConfig, configure
from slimmable.cli.data import Plain, batches_of, load_images, normalisation
from slimmable.cli.evaluation import features_in
from slimmable.cli.pretrain import Training
from slimmable.cli.run import new_method, normalised, read_config, trained_method


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes of ten images."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = generator.integers(0, 256, (24, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def settings(photos, **more):
    return configure(
        {"data": str(photos), "model": "resnet10t", "image_size": 32, "batch_size": 8, "widths": (1.0, 0.5), **more}
    )


def training_of(config):
    images = load_images(config)
    return Training(config, new_method(config, images.channels, len(images.classes)), images, torch.device("cpu"))


def test_a_training_batch_is_that_in_0_to_1_normalised(photos):
    plain = settings(photos)
    own = timm.create_model("resnet10t").pretrained_cfg
    config = normalised(plain, timm.create_model("resnet10t"))
    assert (config.mean, config.std) == (own["mean"], own["std"])
    *views, labels = next(training_of(config)._batches)
    *others, same = next(training_of(plain)._batches)
    mean, std = (torch.tensor(own[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.equal(labels, same)
    for view, other in zip(views, others, strict=True):
        assert other.min() >= 0
        torch.testing.assert_close(view, (other - mean) / std)


def test_features_are_those_of_normalised_images(photos):
    config = settings(photos, mean=(0.1, 0.2, 0.3), std=(2.0,))
    images = load_images(config)
    plain = Plain(images.test, 32, normalisation(config))
    backbone = new_method(config, 3, 2).backbone.eval()
    by_hand = torch.stack([plain[index] for index in range(len(plain))]).float() / 255
    by_hand = (by_hand - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 2
    with torch.no_grad():
        expected = backbone(by_hand)
    from contextlib import nullcontext

    torch.testing.assert_close(features_in({1.0: nullcontext}, backbone, plain)[0][1.0], expected)


@pytest.mark.parametrize("given", [{}, {"mean": (0.25,)}, {"std": (0.5, 0.25, 0.125)}])
def test_given_values_are_kept(photos, given):
    config = normalised(settings(photos, **given), timm.create_model("resnet10t"))
    own = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert {"mean": config.mean, "std": config.std} == own | given


@pytest.mark.parametrize("model", ["small_resnet", "resnet10t"])
def test_digits_stay_as_they_are(model):
    config = PretrainConfig(num_images=16, model=model, image_size=32)
    images = load_images(config)
    recorded = normalised(config, timm.create_model(model, in_chans=1))
    assert (recorded.mean, recorded.std) == ((0.0,), (1.0,))
    before, after = (Plain(images.train, 32, normalisation(each)) for each in (config, recorded))
    expected = images.train.float() / 255
    for plain in (before, after):
        assert torch.equal(torch.cat(list(batches_of(plain))), expected)


@pytest.mark.parametrize("preset", ["slimclr-mocov2-imagenet", "slimclr-simclr-imagenet", "supervised-imagenet"])
def test_presets_take_the_values_of_imagenet(preset):
    config = configure({"data": "photos"}, preset)
    config = normalised(config, timm.create_model(config.model))
    assert config.mean == pytest.approx((0.485, 0.456, 0.406))
    assert config.std == pytest.approx((0.229, 0.224, 0.225))


def test_a_run_keeps_its_values(photos, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    line = [
        *tiny,
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--model",
        "resnet10t",
        "--image-size",
        "32",
        "--data",
        str(photos),
    ]
    assert main(["pretrain", *line, "--output", str(out)]) == 0
    written = json.loads((out / "config.json").read_text())
    assert (written["mean"], written["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    report = (out / "metrics.csv").read_text()
    assert main(["pretrain", "--resume", "--output", str(out), "--device", "cpu", "--workers", "0"]) == 0
    assert main(["evaluate", str(out), "--device", "cpu", "--workers", "0"]) == 0
    assert (out / "metrics.csv").read_text() == report
    assert main(["export", str(out), "--width", "0.5", "--format", "safetensors"]) == 0
    card = (out / "README.md").read_text()
    assert "values in [0, 1], minus the mean (0.485, 0.456, 0.406), divided by the standard deviation" in card

    config = read_config(out)
    images = load_images(config)
    backbone = trained_method(config, out, 3).backbone
    changed = json.dumps(written | {"mean": [0.0], "std": [1.0]})
    assert main(["pretrain", "--resume", "--output", str(out), "--device", "cpu", "--mean", "0.5"]) == 2
    assert "--mean: the run has (0.485, 0.456, 0.406), now (0.5,)" in capsys.readouterr().err
    (out / "config.json").write_text(changed)
    other = normalisation(read_config(out))
    features = [
        backbone(torch.cat(list(batches_of(Plain(images.test, 32, each))))) for each in (normalisation(config), other)
    ]
    assert not torch.allclose(*features)
