"""ONNX files in int8: each width of the joined file is that of a file of its own, and near the model in float."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import slimmable
from slimmable.errors import DataError, SlimmableError, UsageError
from tests.convert import oracles

WIDTHS = (1.0, 0.5)


def mlp():
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)), (6,)


def resnet():
    return timm.create_model("test_resnet", num_classes=10), (3, 64, 64)


def vit():
    return timm.create_model("test_vit", num_classes=10, img_size=64), (3, 64, 64)


def made(make):
    torch.manual_seed(0)
    plain, size = make()
    slim = slimmable.slimify(oracles.randomise(plain.eval()), WIDTHS, example_inputs=torch.zeros(2, *size))
    return slim.eval(), [(torch.randn(8, *size), torch.zeros(8)) for _ in range(2)]


@pytest.mark.parametrize("make", [mlp, resnet, vit])
def test_each_width_is_that_of_its_own_file(make, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    slim, batches = made(make)
    slimmable.export(slim, tmp_path / "all.onnx", calibration=batches)
    joined = runtime.InferenceSession(tmp_path / "all.onnx")
    x = batches[0][0]
    for position, width in enumerate(WIDTHS):
        path = tmp_path / f"{width}.onnx"
        slimmable.export(slim, path, width=width, calibration=batches)
        single = runtime.InferenceSession(path)
        name = single.get_inputs()[0].name
        (alone,) = single.run(None, {name: x.numpy()})
        (found,) = joined.run(None, {name: x.numpy(), "width": np.array(position)})
        with torch.no_grad(), slimmable.at_width(slim, width):
            expected = slim(x).numpy()
        off = np.abs(found - expected).max() / np.abs(expected).max()
        assert 1e-5 < off < 0.15  # not float, and near it
        assert np.abs(found - alone).max() <= 0.02 * np.abs(expected).max()
    slimmable.export(slim, tmp_path / "float.onnx", example_inputs=x)
    if make is not mlp:
        assert (tmp_path / "all.onnx").stat().st_size < 0.6 * (tmp_path / "float.onnx").stat().st_size


@pytest.mark.parametrize(
    ("name", "loader", "kind", "words"),
    [
        ("net.pt2", [torch.zeros(2, 6)], UsageError, "needs a path that ends in .onnx"),
        ("net.safetensors", [torch.zeros(2, 6)], UsageError, "needs a path that ends in .onnx"),
        ("net.onnx", torch.zeros(2, 6), UsageError, "loader must hold batches"),
        ("net.onnx", [], DataError, "calibration: loader is empty"),
        ("net.onnx", [3], DataError, "calibration"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(name, loader, kind, words, tmp_path):
    pytest.importorskip("onnxruntime")
    slim, _ = made(mlp)
    with pytest.raises(kind, match=words):
        slimmable.export(slim, tmp_path / name, calibration=loader)
    assert not [*Path(tmp_path).iterdir()]


def test_a_file_far_from_the_model_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("slimmable.deploy.onnx.LARGEST", 1e-6)
    slim, batches = made(mlp)
    with pytest.raises(SlimmableError, match=r"net.onnx differs from the model by .* \(allowed: 1e-06\)"):
        slimmable.export(slim, tmp_path / "net.onnx", calibration=batches)
    assert not [*Path(tmp_path).iterdir()]
