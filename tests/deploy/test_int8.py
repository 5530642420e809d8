"""ONNX files in int8: each width of the joined file is that of a file of its own, near the model in float, and all
widths share the integers of the full one.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import slimmable
from slimmable.deploy.onnx import _part
from slimmable.errors import DataError, SlimmableError, UsageError
from tests.convert import oracles

WIDTHS = (1.0, 0.5)


def mlp():
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)), (6,)


def resnet():
    return timm.create_model("test_resnet", num_classes=10), (3, 64, 64)


def vit():
    return timm.create_model("test_vit", num_classes=10, img_size=64, depth=2), (3, 64, 64)


def made(make):
    torch.manual_seed(0)
    plain, size = make()
    slim = slimmable.slimify(oracles.randomise(plain.eval()), WIDTHS, example_inputs=torch.zeros(2, *size))
    return slim.eval(), [(torch.randn(8, *size), torch.zeros(8)) for _ in range(2)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function that exports a network once: all widths in one file, and each in one of its own."""
    pytest.importorskip("onnxruntime")

    @cache
    def files(make):
        folder, (slim, batches) = tmp_path_factory.mktemp(make.__name__), made(make)
        slimmable.export(slim, folder / "all.onnx", calibration=batches)
        for width in WIDTHS:
            slimmable.export(slim, folder / f"{width}.onnx", width=width, calibration=batches)
        return slim, batches[0][0], folder

    return files


@pytest.mark.parametrize("make", [mlp, resnet, vit])
def test_each_width_is_that_of_its_own_file(make, written, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    slim, x, folder = written(make)
    joined = runtime.InferenceSession(folder / "all.onnx")
    for position, width in enumerate(WIDTHS):
        single = runtime.InferenceSession(folder / f"{width}.onnx")
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
        assert (folder / "all.onnx").stat().st_size < 0.6 * (tmp_path / "float.onnx").stat().st_size


class Concatenated(nn.Module):
    """A convolution of what two others give, one in groups, and a parameter that is added."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(3, 24, 3)
        self.norm, self.last = nn.BatchNorm2d(40), nn.Conv2d(40, 32, 1)
        self.groups, self.head = nn.Conv2d(32, 64, 3, groups=4), nn.Linear(64, 10)
        self.places = nn.Parameter(torch.randn(32, 1, 1))

    def forward(self, x):
        both = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.head(self.groups(self.last(both).relu() + self.places).relu().mean((2, 3)))


def concatenated():
    return Concatenated(), (3, 16, 16)


def integers(path):
    """Return how many weights a file holds in int8."""
    stored = pytest.importorskip("onnx").load(path).graph.initializer
    return sum(int(np.prod(each.dims)) for each in stored if each.data_type == 3 and len(each.dims) > 1)


@pytest.mark.parametrize(("make", "more"), [(mlp, 0), (resnet, 0), (vit, 0), (concatenated, 16)])
def test_all_widths_share_their_integers(make, more, written):
    """Those of layers: the parameter that one network adds has some of its own."""
    _, _, folder = written(make)
    assert integers(folder / "all.onnx") == integers(folder / "1.0.onnx") + more > more


@pytest.mark.parametrize(("factor", "more"), [(-1, 0), (0, 8 * 27)])
def test_a_norm_may_turn_a_channel_but_not_end_it(factor, more, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    slim, batches = made(resnet)
    with torch.no_grad():
        slim.conv1[1].narrow[0].weight[3] *= factor
    slimmable.export(slim, tmp_path / "all.onnx", calibration=batches)
    slimmable.export(slim, tmp_path / "full.onnx", width=1.0, calibration=batches)
    assert integers(tmp_path / "all.onnx") == integers(tmp_path / "full.onnx") + more
    feed = {"images": batches[0][0].numpy(), "width": np.array(1)}
    (found,) = runtime.InferenceSession(tmp_path / "all.onnx").run(None, feed)
    with torch.no_grad(), slimmable.at_width(slim, 0.5):
        expected = slim(batches[0][0]).numpy()
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@settings(deadline=None)
@given(st.integers(0, 1), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 6), st.data())
def test_a_part_of_weights_is_found(axis, blocks, kept, cut, inputs, data):
    """Its channels are the first of equal blocks, its inputs any, as after a concatenation."""
    rows = (np.arange(blocks * (kept + cut)).reshape(blocks, -1)[:, :kept]).ravel()
    columns = sorted({0} | data.draw(st.sets(st.integers(0, inputs - 1))))
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    whole = random.normal(size=(blocks * (kept + cut), inputs, 3, 3)).astype(np.float32)
    factors = (random.uniform(0.1, 10, size=len(rows)) * random.choice([-1, 1], len(rows))).astype(np.float32)
    scales = random.uniform(size=len(whole)).astype(np.float32)
    part = whole[np.ix_(rows, columns)] * factors[:, None, None, None]
    places = [[*rows], columns]
    if axis:
        whole, part, places = whole.swapaxes(0, 1), part.swapaxes(0, 1), places[::-1]
    found, own = _part(part, whole, axis, scales)
    assert found == places
    assert {(each["axis"], each["zero_point"]) for each in own} == {(axis, 0)}
    np.testing.assert_allclose([each["scale"] for each in own], scales[rows] * factors, rtol=1e-5)
    assert _part(part[:, :1, 0, 0], whole, axis, scales) is None  # of other axes
    assert _part(whole, part, axis, scales) is None or whole.shape == part.shape  # a larger one
    assert _part(np.abs(part) + 1, whole, axis, scales) is None  # others


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
