"""A file loads into the network that it was saved from and into no other, and takes no more memory than it holds."""

from __future__ import annotations

import copy
import enum
import json
import os
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import slimmable
from benchmarks.fuzz.__main__ import attempt
from slimmable._atomic import write_tensors
from slimmable.errors import CheckpointError
from slimmable.files.description import describe

WIDTHS = (1.0, 0.5)
ROOT = Path(slimmable.__file__).parents[1]


NORM = partial(F.normalize, dim=1)


class Mode(enum.Enum):
    MEAN, MAX = "mean", "max"


class Net(nn.Module):
    """Settings of all kinds, which decide what it computes, and some that do not."""

    def __init__(self, act=F.relu, norm=NORM, mode=Mode.MEAN, name="relu", **settings):
        super().__init__()
        conv = {"padding": 1, "stride": 2, **settings}
        self.conv, self.bn, self.drop = nn.Conv2d(3, 8, 3, **conv), nn.BatchNorm2d(8), nn.Dropout(0.1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
        self.act, self.norm, self.mode, self.activation, self._floor = act, norm, mode, name, 0.0
        self.calls, self.seen, self.note, self.device = 0, None, "a network", torch.device("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls, self.seen = self.calls + 1, tuple(x.shape)
        y = self.drop(self.second(self.act(self.depthwise(self.bn(self.conv(x))))))
        y = getattr(torch, self.activation)(y).clamp(min=self._floor)
        return self.last(self.norm(y.amax((2, 3)) if self.mode is Mode.MAX else y.mean((2, 3))))


X = torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12)


def trained() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(X)
    return net.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The files of a converted network and of one extracted from it, with the models."""
    folder = tmp_path_factory.mktemp("saved")
    whole = slimmable.slimify(trained(), WIDTHS, example_inputs=X)
    models = {"whole": whole, "half": slimmable.extract(whole, 0.5)}
    for name, model in models.items():
        slimmable.save(model, folder / name)
    return folder, models


@pytest.mark.parametrize("kind", ["whole", "half"])
def test_a_network_that_was_used_otherwise_is_the_same(kind, saved):
    folder, models = saved
    other = Net()
    other.drop.p, other.bn.momentum, other.calls, other.note, other.seen = 0.7, None, 12, "another", (1, 2)
    other.device, other.epoch = torch.device("meta"), 3
    again = slimmable.load(folder / kind, nn.SyncBatchNorm.convert_sync_batchnorm(other))
    assert torch.equal(again(X), models[kind](X))
    assert (again.drop.p, other.drop.p) == (0.1, 0.7)
    assert other.note == "another"


EDITS = {
    "stride": lambda net: setattr(net.conv, "stride", (1, 1)),
    "padding": lambda net: setattr(net.conv, "padding", (0, 0)),
    "dilation": lambda net: setattr(net.conv, "dilation", (2, 2)),
    "padding_mode": lambda net: setattr(net.conv, "padding_mode", "circular"),
    "conv.groups": lambda net: setattr(net.conv, "groups", 3),
    "depthwise.groups": lambda net: setattr(net.depthwise, "groups", 1),
    "eps": lambda net: setattr(net.bn, "eps", 1e-3),
    "act is 'relu' in the file, 'gelu' here": lambda net: setattr(net, "act", F.gelu),
    "norm": lambda net: setattr(net, "norm", partial(F.normalize, dim=1, p=1.0)),
    "mode is 'Mode.MEAN' in the file, 'Mode.MAX' here": lambda net: setattr(net, "mode", Mode.MAX),
    "activation": lambda net: setattr(net, "activation", "tanh"),
    "_floor": lambda net: setattr(net, "_floor", -1.0),
    "drop is Dropout in the file, Identity here": lambda net: setattr(net, "drop", nn.Identity()),
    "second.0 is missing in the file, Conv2d here": lambda net: setattr(net, "second", nn.Sequential(net.second)),
}


@pytest.mark.parametrize("kind", ["whole", "half"])
@pytest.mark.parametrize("place", EDITS)
def test_another_network_is_refused_with_the_difference(kind, place, saved):
    edited = Net()
    EDITS[place](edited)
    with pytest.raises(CheckpointError, match=f"of another network(.|\n)*{place}"):
        slimmable.load(saved[0] / kind, edited)


@pytest.mark.parametrize("kind", ["whole", "half"])
@pytest.mark.parametrize(
    ("path", "name", "value"),
    [("conv", "stride", [1, 1]), ("conv", "padding", [0, 0]), ("depthwise", "groups", 2), ("", "activation", "tanh")],
)
def test_an_edited_file_is_refused_with_the_difference(kind, path, name, value, saved, tmp_path):
    with safe_open(saved[0] / kind, framework="pt") as file:
        data = json.loads(json.loads(file.metadata()["slimmable"])["model"])
    settings = next(settings for each, _, settings in data["modules"] if each == path)
    assert settings[name] != value
    settings[name] = value
    write_tensors(tmp_path / "file", load_file(saved[0] / kind), {"format": "slimmable 2", "model": json.dumps(data)})
    place = f"{path}.{name}".lstrip(".")
    with pytest.raises(CheckpointError, match=rf"other settings: {place} is .* in the file, .* here"):
        slimmable.load(tmp_path / "file", Net())


def test_many_differences_are_counted(saved):
    with pytest.raises(
        CheckpointError, match=r"other modules: .* is missing in the file, Linear here, .* and \d+ more"
    ):
        slimmable.load(saved[0] / "whole", nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("given", [{"act_layer": "silu"}, {"global_pool": "max"}, {"output_stride": 16}])
def test_a_timm_with_other_defaults_is_refused(given, tmp_path, monkeypatch):
    slim = slimmable.slimify(timm.create_model("test_resnet", num_classes=3), WIDTHS)
    for number, model in enumerate((slim, slimmable.extract(slim, 0.5))):
        slimmable.save(model, tmp_path / f"{number}")
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **settings: real(*args, **settings, **given))
    monkeypatch.setattr("slimmable.files.model.version", lambda package: "99.9")
    for number in range(2):
        with pytest.raises(
            CheckpointError, match=r"of another network(.|\n)* here(.|\n)*written with timm .*, here timm 99.9"
        ):
            slimmable.load(tmp_path / f"{number}")


@pytest.mark.parametrize("settings", [{"drop_rate": 0.2}, {"num_classes": 7, "drop_rate": 0.3}])
def test_numbers_that_timm_was_given_are_read_off(settings, tmp_path):
    model = timm.create_model("test_resnet", **settings).eval()
    model.set_grad_checkpointing()
    slimmable.save(slimmable.slimify(model, WIDTHS), tmp_path / "file")
    again = slimmable.load(tmp_path / "file")
    assert (again.drop_rate, again.num_classes) == (settings["drop_rate"], settings.get("num_classes", 1000))
    assert again.grad_checkpointing


def test_what_was_edited_in_a_timm_model_needs_the_edited_network(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    model.conv1[0].stride = (1, 1)
    slim = slimmable.slimify(model, WIDTHS)
    with pytest.warns(UserWarning, match="makes a network unlike this one") as told:
        slimmable.save(slim, tmp_path / "file")
    assert told[0].filename == __file__
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(slimmable.load(tmp_path / "file", model)(x), slim.eval()(x))
    with pytest.raises(CheckpointError, match=r"conv1\.0\.stride is \[1, 1\] in the file, \[2, 2\] here"):
        slimmable.load(tmp_path / "file", timm.create_model("test_resnet", num_classes=3))


# -- bytes
def test_a_change_of_any_part_is_noticed(saved, tmp_path):
    whole = (saved[0] / "half").read_bytes()
    for at in (len(whole) - 1, len(whole) // 2, whole.index(b"BatchNorm") + 1, whole.index(b"F32") + 1):
        (tmp_path / "file").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            slimmable.load(tmp_path / "file", Net())
    with safe_open(saved[0] / "half", framework="pt") as file:
        texts = {name: said for name, said in json.loads(file.metadata()["slimmable"]).items() if name != "checksum"}
    save_file(load_file(saved[0] / "half"), tmp_path / "file", {"slimmable": json.dumps(texts)})
    with pytest.raises(CheckpointError, match="checksum is missing"):
        slimmable.load(tmp_path / "file", Net())
    for texts in ("[]", "3", '"text"', "{", "null"):
        save_file(load_file(saved[0] / "half"), tmp_path / "file", {"slimmable": texts})
        with pytest.raises(CheckpointError, match=r"cannot be read; it is damaged|was not written by"):
            slimmable.load(tmp_path / "file", Net())


def test_the_same_content_is_the_same_bytes(tmp_path):
    program = """
import sys, torch, timm, slimmable
torch.manual_seed(0)
x = torch.zeros(2, 3, 64, 64)
model = slimmable.slimify(timm.create_model("test_resnet", num_classes=3), (1.0, 0.5), example_inputs=x)
slimmable.save(slimmable.gating.gate(model, example_inputs=x), sys.argv[1])
"""
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, tmp_path / seed], check=True, cwd=ROOT, env=environment)
    first = (tmp_path / "1").read_bytes()
    assert first == (tmp_path / "2").read_bytes()
    for number in range(8):  # safetensors itself draws an order of the metadata for each file
        write_tensors(tmp_path / f"b{number}", {"x": X}, dict.fromkeys("abcdefgh", 'é\n\x01"'))
    assert len({(tmp_path / f"b{number}").read_bytes() for number in range(8)}) == 1
    with safe_open(tmp_path / "b0", framework="pt") as file:
        assert json.loads(file.metadata()["slimmable"]).keys() == {*"abcdefgh", "checksum"}
        assert torch.equal(file.get_tensor("x"), X)


def test_a_link_is_replaced_and_what_it_points_to_stays(saved, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("before")
    for name, target in {"link": kept, "dangling": tmp_path / "nothing"}.items():
        (tmp_path / name).symlink_to(target)
        slimmable.save(saved[1]["half"], tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert kept.read_text() == "before"
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "link to a file").symlink_to(tmp_path / "link")
    assert torch.equal(slimmable.load(tmp_path / "link to a file", Net())(X), saved[1]["half"](X))


# -- memory
@cache
def small_files() -> dict[str, tuple[dict, dict]]:
    """The tensors and descriptions of a small timm network, converted and extracted."""
    found = {}
    slim = slimmable.slimify(timm.create_model("test_resnet", num_classes=3), WIDTHS)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in {"whole": slim, "half": slimmable.extract(slim, 0.5)}.items():
            slimmable.save(model, f"{folder}/file")
            with safe_open(f"{folder}/file", framework="pt") as file:
                found[name] = load_file(f"{folder}/file"), json.loads(json.loads(file.metadata()["slimmable"])["model"])
    return found


def hostile(kind: str, path: Path) -> None:
    """Write a small file, with a right checksum, that asks for a large network."""
    tensors, data = copy.deepcopy(small_files()["whole" if kind == "many widths" else "half"])
    if kind == "another model":
        data["recipe"] = {"timm": "vit_giant_patch14_224", "arguments": {}}
    elif kind == "all its names":
        data["recipe"] = {"timm": "vit_giant_patch14_224", "arguments": {}}
        with torch.device("meta"):
            large = timm.create_model("vit_giant_patch14_224")
        data["modules"] = describe(large)
        tensors = {name: torch.zeros([1] * tensor.ndim) for name, tensor in large.state_dict().items()}
    elif kind == "no elements":
        data["recipe"]["arguments"] = {"num_classes": 10**9}
        tensors |= {"fc.weight": torch.zeros(0, 10**9), "fc.bias": torch.zeros(0)}
    elif kind == "many widths":
        data["plan"]["counts"] += data["plan"]["counts"][-1:] * 5_000
        data["plan"]["widths"] += [0.5 - number / 20_000 for number in range(1, 5_001)]
    else:
        data["recipe"] = {"timm": "test_vit", "arguments": json.loads(kind)}
    write_tensors(path, tensors, {"format": "slimmable 2", "model": json.dumps(data)})


@pytest.mark.parametrize(
    "kind",
    [
        "another model",
        "all its names",
        "no elements",
        "many widths",
        '{"depth": 1000000000}',
        '{"embed_dim": 1000000000}',
        '{"img_size": [100000, 100000]}',
        '{"num_classes": 1e300}',
        '{"num_heads": [[[[2000000000]]]]}',
    ],
)
def test_a_small_file_claims_little_memory(kind):
    def reader(draw, folder):
        hostile(kind, folder / "file")
        assert (folder / "file").stat().st_size < 2_000_000
        return (lambda: slimmable.load(folder / "file")), kind

    found = attempt(kind, reader, 0, 0)
    assert found.kind in ("refused", "answered") if kind == "all its names" else found.kind == "refused", found.said
    assert found.bytes < 100 * 2**20
