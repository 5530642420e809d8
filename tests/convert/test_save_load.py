"""What is saved comes back, in another process too; what is no such file is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import slimmable
from slimmable._atomic import write_tensors
from slimmable.errors import CheckpointError, ConversionError
from tests.convert import oracles

WIDTHS = (1.0, 0.5, 0.25)
NETWORKS = {  # caches by shape, indices, tables that are not in the state dict, another size, no classifier
    "test_resnet": {"num_classes": 5, "in_chans": 1},
    "test_vit": {"img_size": 64},
    "test_efficientnet": {},
    "levit_128s": {"num_classes": 0},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "window_size": 7, "depths": (1, 1, 2, 1)},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "convnext_atto": {},
}


@cache
def converted(name: str, universal: bool = False) -> tuple[nn.Module, torch.Tensor, dict]:
    torch.manual_seed(0)
    arguments = NETWORKS[name]
    plain = oracles.randomise(timm.create_model(name, **arguments).eval())
    size = arguments.get("img_size", 224 if name == "levit_128s" else 64)
    x = torch.randn(2, arguments.get("in_chans", 3), size, size)
    model = slimmable.slimify(plain, WIDTHS, example_inputs=x, universal=universal)
    given = arguments if name in ("swin_tiny_patch4_window7_224", "densenet121") else None
    return model, x, {"arguments": given}


def same(first: nn.Module, second: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(oracles.first_output(first(x)), oracles.first_output(second(x)), rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_slimmable_model_comes_back_with_every_width(name, tmp_path):
    model, x, options = converted(name)
    slimmable.save(model, tmp_path / "model.safetensors", **options)
    again = slimmable.load(tmp_path / "model.safetensors")
    assert slimmable.widths_of(again) == WIDTHS
    assert str(again) == str(model)
    for width in WIDTHS:
        with slimmable.at_width(model, width), slimmable.at_width(again, width):
            same(again, model, x)
        same(slimmable.extract(again, width), slimmable.extract(model, width), x)
    assert str(slimmable.plan(again, WIDTHS)) == str(slimmable.plan(model, WIDTHS))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("setting", [0.5, {"*": 0.25, "*0*": 0.6}])
def test_a_sub_network_comes_back_as_small_as_it_is(name, setting, tmp_path):
    model, x, options = converted(name)
    small = slimmable.extract(model, setting)
    path = tmp_path / "small.safetensors"
    slimmable.save(small, path, **options)
    same(slimmable.load(path), small, x)
    tensors = sum(t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers()))
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header - 8 <= tensors


def test_registered_widths_types_and_ties_come_back(tmp_path):
    model, x, _ = converted("test_resnet", universal=True)
    plain, x = slimmable.extract(model, 1.0).double(), x.double()
    model = slimmable.slimify(plain, WIDTHS, example_inputs=x, universal=True)
    counts = slimmable.plan(model, WIDTHS, universal=True).sub_network({"layer2*": 0.5}).counts
    slimmable.calibrate_bn(model, [x], [0.4, counts])
    slimmable.save(model, tmp_path / "model")
    again = slimmable.load(tmp_path / "model")
    for width in (*slimmable.widths_of(model), counts, 0.7):
        with slimmable.at_width(model, width), slimmable.at_width(again, width):
            same(again, model, x)
    assert slimmable.widths_of(again) == (1.0, 0.5, 0.4, 0.25)


def test_in_another_process(tmp_path):
    model, x, _ = converted("test_efficientnet")
    slimmable.save(model, tmp_path / "whole")
    slimmable.save(slimmable.extract(model, 0.5), tmp_path / "half")
    save_file({"x": x}, tmp_path / "x")
    program = f"""
import torch, slimmable
from safetensors.torch import load_file, save_file
x = load_file({str(tmp_path / "x")!r})["x"]
whole, half = (slimmable.load({str(tmp_path)!r} + "/" + name) for name in ("whole", "half"))
with torch.no_grad():
    outputs = {{str(width): y for width, y in slimmable.run_widths(whole, x).items()}} | {{"half": half(x)}}
save_file(outputs, {str(tmp_path / "y")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(slimmable.__file__).parents[1])
    outputs = load_file(tmp_path / "y")
    with torch.no_grad():
        expected = {str(width): y for width, y in slimmable.run_widths(model, x).items()}
    for key, y in outputs.items():
        torch.testing.assert_close(y, expected["0.5" if key == "half" else key], rtol=1e-6, atol=1e-6)


class Tied(nn.Module):
    """No timm model; two layers share a weight, and a number follows the width."""

    def __init__(self, units: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, units), nn.Linear(units, units), nn.Linear(units, 3)
        self.third = nn.Linear(units, units)
        self.third.weight = self.second.weight
        self.shape = (2, units // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.third(self.second(self.first(x)).relu()).relu()
        return self.last(y.reshape(-1, *self.shape).flatten(1))


def test_a_network_of_the_users_own_needs_the_plain_network(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = slimmable.slimify(Tied(), WIDTHS, example_inputs=x)
    for network in (model, slimmable.extract(model, 0.5)):
        slimmable.save(network, tmp_path / "own")
        fresh = Tied()
        before = fresh.second.weight.clone()
        again = slimmable.load(tmp_path / "own", fresh)
        same(again, network, x)
        assert again.second.weight is again.third.weight
        assert torch.equal(fresh.second.weight, before)
        with pytest.raises(CheckpointError, match="model="):
            slimmable.load(tmp_path / "own")
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            slimmable.load(tmp_path / "own", Tied(10) if network is model else Tied(2))


@pytest.mark.parametrize("gated", [False, True])
def test_a_loaded_model_takes_other_widths_and_keeps_what_its_own_have_learned(gated, tmp_path):
    model, x, _ = converted("test_resnet")
    model = oracles.randomise(slimmable.slimify(slimmable.extract(model, 1.0), WIDTHS, example_inputs=x)).eval()
    file = slimmable.gating.gate(model, example_inputs=x) if gated else model
    slimmable.save(file, tmp_path / "model")
    again = slimmable.load(tmp_path / "model")
    if gated:
        with pytest.raises(ConversionError, match="gates, which are made for its widths"):
            slimmable.slimify(again, (1.0, 0.75, 0.5), example_inputs=x)
        again = slimmable.gating.ungate(again)
    other = slimmable.slimify(again, (1.0, 0.75, 0.5), example_inputs=x)
    for width in (1.0, 0.5):
        with slimmable.at_width(other, width), slimmable.at_width(model, width):
            same(other, model, x)
    slimmable.save(other, tmp_path / "model")
    assert slimmable.widths_of(slimmable.load(tmp_path / "model")) == (1.0, 0.75, 0.5)


class WithHiddenTable(nn.Module):
    """Holds a buffer per channel, and one of the whole, which are not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.ones(8), persistent=False)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) * self.table) * self.scale


@pytest.mark.parametrize("width", [None, 1.0, 0.5])
def test_buffers_that_are_not_in_the_state_dict_come_back_with_their_contents(width, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = slimmable.slimify(WithHiddenTable(), WIDTHS, example_inputs=x)
    model._buffers["table"].copy_(torch.arange(8.0))
    model.scale.fill_(7)
    network = model if width is None else slimmable.extract(model, width)
    slimmable.save(network, tmp_path / "model")
    again = slimmable.load(tmp_path / "model", WithHiddenTable())
    assert torch.equal(again._buffers["table"], network._buffers["table"])
    assert again.scale == 7
    same(again, network, x)
    if width is None:
        for each in WIDTHS:
            with slimmable.at_width(again, each), slimmable.at_width(model, each):
                same(again, model, x)


def test_what_cannot_be_saved_is_refused_and_the_file_stays(tmp_path):
    model, _, _ = converted("test_resnet")
    path = tmp_path / "model"
    path.write_text("before")
    with pytest.raises(CheckpointError, match="arguments"):
        slimmable.save(model, path, arguments={"num_classes": 7})
    with pytest.raises(CheckpointError, match="wrapper"):
        slimmable.save(nn.Sequential(model), path)
    with pytest.raises(CheckpointError, match="cannot make"):
        slimmable.save(model, path, arguments={"nonsense": 1})
    assert path.read_text() == "before"
    with pytest.raises(CheckpointError, match="cannot write"):
        slimmable.save(model, tmp_path / "missing" / "model")


# -- files that are something else
@cache
def contents(kind: str) -> tuple[dict, dict, bytes]:
    """The tensors, the metadata and the bytes of a good file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        model = converted("test_resnet")[0]
        slimmable.save(model if kind == "whole" else slimmable.extract(model, 0.5), path)
        with safe_open(path, framework="pt") as file:
            return load_file(path), json.loads(json.loads(file.metadata()["slimmable"])["model"]), path.read_bytes()


def written(folder: Path, tensors: dict, data: dict, kind: str = "slimmable 2") -> Path:
    write_tensors(folder / "file", tensors, {"format": kind, "model": json.dumps(data)})
    return folder / "file"


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.9999), kind=st.sampled_from(["whole", "half"]))
def test_truncated_files(share, kind, tmp_path):
    whole = contents(kind)[2]
    (tmp_path / "file").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="damaged"):
        slimmable.load(tmp_path / "file")


def test_foreign_files(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match="there is no file"):
        slimmable.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not written by"):
        slimmable.load(path)
    path.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(CheckpointError, match="damaged"):
        slimmable.load(path)
    tensors, data, _ = contents("whole")
    with pytest.raises(CheckpointError, match="not written by"):
        slimmable.load(written(tmp_path, tensors, data, "slimmable 9"))


@pytest.mark.parametrize(
    "recipe",
    [
        {"timm": "hf-hub:somebody/something", "arguments": {}},
        {"timm": "test_resnet", "arguments": {"pretrained": True}},
        {"timm": "test_resnet", "arguments": {"checkpoint_path": "/etc/passwd"}},
        {"timm": "test_resnet", "arguments": {"num_classes": {"a": 1}}},
        {"timm": ["test_resnet"], "arguments": {}},
        {"timm": "test_vit", "arguments": {}},
        {"other": 1},
        7,
    ],
)
def test_hostile_recipes(recipe, tmp_path):
    tensors, data, _ = contents("whole")
    with pytest.raises(CheckpointError):
        slimmable.load(written(tmp_path, tensors, {**data, "recipe": recipe}))


def leaves(data, path=()):
    """Yield the path of everything inside nested lists and dicts."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


JUNK = [None, -1, 10**12, 0.5, "weight", [], {}, [[1]], "__class__", True]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data(), kind=st.sampled_from(["whole", "half"]), junk=st.sampled_from(JUNK))
def test_files_with_anything_in_the_place_of_anything_load_as_they_are_or_are_refused(draw, kind, junk, tmp_path):
    tensors, data, _ = contents(kind)
    data = json.loads(json.dumps(data))
    top = draw.draw(st.sampled_from(sorted(data)))
    below = draw.draw(st.sampled_from([(top,), *((top, *path) for path in leaves(data[top]))]))
    place = data
    for key in below[:-1]:
        place = place[key]
    place[below[-1]] = junk
    try:
        model = slimmable.load(written(tmp_path, tensors, data))
    except CheckpointError:
        return
    ours = {"SwitchableNorm", "ModuleList"} if kind == "whole" else set()
    plain = {type(module).__name__ for module in slimmable.extract(converted("test_resnet")[0], 1.0).modules()}
    assert {type(module).__name__ for module in model.modules()} == plain | ours


def test_hostile_plans(tmp_path):
    tensors, data, _ = contents("whole")
    for change in (
        {"units": [10**10]},
        {"counts": [[10**9] * len(data["plan"]["units"])] * 3},
        {"originals": [["", "forward", 3], *data["plan"]["originals"]]},
        {"caches": [["", "forward"]]},
        {"caches": [["", "_modules"]]},
        {"widths": [1.0, 2.0, 3.0]},
    ):
        with pytest.raises(CheckpointError):
            slimmable.load(written(tmp_path, tensors, {**data, "plan": {**data["plan"], **change}}))
    with pytest.raises(CheckpointError):
        slimmable.load(written(tmp_path, {**tensors, "slimmable/units": torch.zeros(3, dtype=torch.int32)}, data))
    with pytest.raises(CheckpointError, match=r"conv1\.0\.weight"):
        slimmable.load(written(tmp_path, {**tensors, "conv1.0.weight": torch.zeros(3)}, data))


@pytest.mark.parametrize("settings", [{"global_pool": "max"}, {"act_layer": "gelu"}, {"output_stride": 16}])
def test_what_timm_does_not_make_so_needs_arguments_or_the_plain_network(settings, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    plain = oracles.randomise(timm.create_model("resnet10t", num_classes=3, **settings).eval())
    model = slimmable.slimify(plain, WIDTHS, example_inputs=x)
    with pytest.warns(UserWarning, match="if arguments make it, pass them"):
        slimmable.save(model, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="ResNet and no recipe for timm"):
        slimmable.load(tmp_path / "model.safetensors")
    same(slimmable.load(tmp_path / "model.safetensors", plain), model, x)
    slimmable.save(model, tmp_path / "model.safetensors", arguments={"num_classes": 3, **settings})
    same(slimmable.load(tmp_path / "model.safetensors"), model, x)


def test_numbers_that_tensors_do_not_show_come_back(tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_heads=1).eval()
    x = torch.randn(2, *plain.pretrained_cfg["input_size"])
    model = slimmable.slimify(plain, (1.0, 0.5))
    slimmable.save(model, tmp_path / "model.safetensors")
    same(slimmable.load(tmp_path / "model.safetensors"), model, x)


def test_attributes_that_a_forward_fills_do_not_matter(tmp_path):
    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(4, 2), None

        def forward(self, x):
            self.seen = tuple(x.shape)
            return self.layer(x)

    net = Seeing()
    net(torch.zeros(2, 4))
    slimmable.save(net, tmp_path / "net.safetensors")
    again = slimmable.load(tmp_path / "net.safetensors", Seeing())
    assert torch.equal(again.layer.weight, net.layer.weight)


def test_what_no_file_can_hold_is_named(tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"count": 1}

        def set_extra_state(self, state): ...

    wide = nn.Linear(2, 2, dtype=torch.complex128)
    meta = nn.Linear(2, 2, device="meta")
    for net, said in (
        (nn.Sequential(Counting(2, 2)), "0._extra_state is dict"),
        (meta, "weight is .* meta"),
        (wide, "complex128"),
    ):
        with pytest.raises(CheckpointError, match=f"{said}.* cannot be saved"):
            slimmable.save(net, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_that_is_gone_is_named_and_converting_again_heals(tmp_path):
    model = slimmable.slimify(timm.create_model("test_resnet", num_classes=5), (1.0, 0.5))
    model.reset_classifier(0)
    with pytest.raises(CheckpointError, match=r"fc.weight, fc.bias: gone from this ResNet .* convert it again"):
        slimmable.save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
    slimmable.save(slimmable.slimify(model, (1.0, 0.5)), tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 32, 32)
    again = slimmable.load(tmp_path / "model.safetensors")
    for width in (1.0, 0.5):
        with slimmable.at_width(model.eval(), width), slimmable.at_width(again, width):
            assert torch.equal(again(images), model(images))
