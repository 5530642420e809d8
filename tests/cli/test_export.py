"""`slimmable export` of timm models: every written file is as small as its width and gives the model's outputs."""

import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn

import slimmable
from slimmable.__main__ import main
from slimmable.cli.export import Source, export
from tests.convert import oracles

NAME, WIDTHS = "test_resnet", (1.0, 0.5, 0.25)
OPTIONS = ("--widths", "1", "0.5", "0.25", "--image-size", "64", "--num-classes", "10")


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(images):
    """A converted model whose widths have BatchNorm statistics of their own."""
    plain = oracles.randomise(timm.create_model(NAME, num_classes=10).eval())
    return oracles.randomise(slimmable.slimify(plain, WIDTHS, example_inputs=images), seed=1)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """What one command writes: all formats at two widths of `model`."""
    here = tmp_path_factory.mktemp("export")
    torch.save({"state_dict": model.state_dict()}, here / "trained.pth")
    formats = [part for kind in ("pt2", "onnx", "safetensors") for part in ("--format", kind)]
    command = ["export", NAME, *OPTIONS, "--checkpoint", str(here / "trained.pth"), "--output", str(here / "out")]
    assert main([*command, "--width", "0.5", "--width", ".25", *formats]) == 0
    return here / "out"


def expected(model, width, images):
    with torch.no_grad(), slimmable.at_width(model, width):
        return model(images)


def test_one_file_a_width_and_format_and_a_card(folder):
    files = {f"width-{width}.{kind}" for width in (0.5, 0.25) for kind in ("pt2", "onnx", "safetensors")}
    assert set(os.listdir(folder)) == files | {"README.md"}


@pytest.mark.parametrize("width", [0.5, 0.25])
def test_pt2_gives_the_outputs_of_the_model(folder, model, images, width):
    program = torch.export.load(folder / f"width-{width}.pt2").module()
    for batch in (images, images[:1]):
        assert oracles.difference(program(batch), expected(model, width, batch)) <= 1e-5


@pytest.mark.parametrize("width", [0.5, 0.25])
def test_onnx_gives_the_outputs_of_the_model(folder, model, images, width):
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / f"width-{width}.onnx")
    for batch in (images, images[:1]):
        (found,) = session.run(None, {"images": batch.numpy()})
        assert oracles.difference(torch.from_numpy(found), expected(model, width, batch)) <= 1e-5


@pytest.mark.parametrize("width", [0.5, 0.25])
def test_weights_load_into_the_extracted_model(folder, model, images, width):
    path = folder / f"width-{width}.safetensors"
    plain = timm.create_model(NAME, num_classes=10).eval()
    small = slimmable.extract(slimmable.slimify(plain, WIDTHS, example_inputs=images), width)
    small.load_state_dict(load_file(path))
    with torch.no_grad():
        assert torch.equal(small(images), slimmable.extract(model, width)(images))
        assert torch.equal(slimmable.load(path)(images), slimmable.extract(model, width)(images))


@pytest.mark.parametrize("kind", ["pt2", "onnx", "safetensors"])
def test_files_are_as_small_as_the_network(folder, model, kind):
    weights = {w: sum(t.nbytes for t in slimmable.extract(model, w).state_dict().values()) for w in (0.5, 0.25)}
    sizes = {width: (folder / f"width-{width}.{kind}").stat().st_size for width in weights}
    for width in weights:  # beside the weights the graph, the same at each width
        assert sizes[width] < weights[width] + {"pt2": 200_000, "onnx": 40_000, "safetensors": 20_000}[kind]
    assert sizes[0.5] - sizes[0.25] == pytest.approx(weights[0.5] - weights[0.25], rel=0.02)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_programs_do_not_name_the_files_of_this_machine(folder, kind):
    assert b"site-packages" not in (folder / f"width-0.5.{kind}").read_bytes()


def test_card_is_one_of_the_hub(folder):
    card = ModelCard.load(folder / "README.md")
    about = card.data.to_dict()
    assert about == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "slimmable"],
    }
    assert "trained.pth" in card.text


def test_card_has_the_numbers_of_every_width(folder, model):
    text = (folder / "README.md").read_text()
    for row in slimmable.profile(model, (3, 64, 64), repeats=0).rows:
        assert f"| {row.width:g} | {row.parameters:,} | {row.macs:,} | {row.activations:,} |\n" in text


def test_examples_of_the_card_run(folder):
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    checks = "assert tuple(output.shape) == (1, 10), output.shape\n"
    loaded = "assert sum(p.numel() for p in small.parameters()) < 150_000\n"
    program = "\n".join([blocks[0], checks, blocks[1], checks, blocks[2], loaded])
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=folder, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )


def test_plain_weights_are_taken_at_every_width(tmp_path, images):
    plain = oracles.randomise(timm.create_model("test_vit", img_size=64).eval())
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    output = tmp_path / "out"
    command = ["export", "test_vit", "--image-size", "64", "--checkpoint", str(tmp_path / "plain.safetensors")]
    assert main([*command, "--width", "all", "--format", "safetensors", "--output", str(output)]) == 0
    assert sorted(os.listdir(output)) == ["README.md", *(f"width-{w}.safetensors" for w in (0.25, 0.5, 0.75, 1.0))]
    full = load_file(output / "width-1.0.safetensors")
    assert full.keys() == plain.state_dict().keys()
    assert all(torch.equal(full[name], tensor) for name, tensor in plain.state_dict().items())
    assert 'timm.create_model("test_vit", img_size=64)' in (output / "README.md").read_text()


def test_a_saved_model_is_exported(tmp_path, monkeypatch, model, images):
    monkeypatch.chdir(tmp_path)
    slimmable.save(model, "trained.safetensors")
    options = ("--image-size", "64", "--format", "pt2", "--format", "safetensors")
    assert main(["export", "trained.safetensors", "--width", "0.5", *options]) == 0
    folder = tmp_path / "runs" / "export" / "trained"
    program = torch.export.load(folder / "width-0.5.pt2").module()
    assert oracles.difference(program(images), expected(model, 0.5, images)) <= 1e-5
    small = slimmable.extract(model, 0.5).state_dict()
    assert all(torch.equal(small[name], tensor) for name, tensor in load_file(folder / "width-0.5.safetensors").items())
    card = (folder / "README.md").read_text()
    assert 'small = slimmable.load("width-0.5.safetensors")' in card


def test_a_saved_model_need_not_be_converted_by_default_arguments(tmp_path, images):
    plain = timm.create_model(NAME, num_classes=10)
    options = {"example_inputs": images, "skip": "layer1*", "round_to": 3}
    slimmable.save(slimmable.slimify(plain, (1.0, 0.5), **options), tmp_path / "model.safetensors")
    command = ["export", str(tmp_path / "model.safetensors"), "--image-size", "64", "--width", "0.5"]
    assert main([*command, "--format", "safetensors", "--output", str(tmp_path / "out")]) == 0


def test_a_saved_model_of_other_images_is_exported(tmp_path):
    plain = timm.create_model("test_vit", img_size=64, in_chans=1, num_classes=0)
    slimmable.save(slimmable.slimify(plain, (1.0, 0.5), universal=True), tmp_path / "model.safetensors")
    command = ["export", str(tmp_path / "model.safetensors"), "--width", "all", "--format", "safetensors"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert "64 x 64, 1 channels" in (tmp_path / "out" / "README.md").read_text()


def test_random_weights_are_the_same_each_time_and_said_to_be_random(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["export", NAME, *OPTIONS, "--width", "0.25", "--format", "safetensors"]
    assert main(command) == 0
    assert main([*command, "--output", "other"]) == 0
    one, other = (load_file(f"{folder}/width-0.25.safetensors") for folder in (f"runs/export/{NAME}", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "Weights:** Random" in (tmp_path / "other" / "README.md").read_text()


def test_pretrained_weights_are_named_in_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)  # tests do not fetch files
    options = ["--width", "0.25", "--format", "safetensors", "--pretrained", "--output", str(tmp_path)]
    assert main(["export", NAME, *OPTIONS, *options]) == 0
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "timm/test_resnet.r160_in1k"
    assert "narrower widths are untrained" in card.text


class Mean(nn.Module):
    """Takes another way for one image, so that a program for any number of them cannot be made."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.conv, self.head, self.noise = nn.Conv2d(1, 8, 3), nn.Linear(8, 3), noise

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        x = x if x.shape[0] == 1 else x * 2
        return self.head(x) + self.noise * torch.rand(3)


def source_of(module):
    example = torch.zeros(2, 1, 8, 8)
    slim = slimmable.slimify(module.eval(), (1.0, 0.5), example_inputs=example)
    return Source("mean", slim, (1.0, 0.5), (1, 8, 8), None, "Random", (0.0,), (1.0,))


def test_a_model_that_counts_its_images_takes_one_a_call(tmp_path):
    source = source_of(Mean())
    files = export(source, [0.5], ["pt2", "onnx"], tmp_path)
    assert not any(file.any_batch for file in files)
    assert "| one |" in (tmp_path / "README.md").read_text()
    image = torch.rand(1, 1, 8, 8)
    program = torch.export.load(tmp_path / "width-0.5.pt2").module()
    assert oracles.difference(program(image), expected(source.model, 0.5, image)) <= 1e-5


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_program_that_gives_other_outputs_is_refused(tmp_path, kind):
    message = rf"width-0.5.{kind} differs from the model .* no file was written"
    with pytest.raises(slimmable.SlimmableError, match=message):
        export(source_of(Mean(noise=1.0)), [0.5], [kind], tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_large_weights_go_beside_the_program(tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100)
    source = source_of(Mean())
    (file,) = export(source, [1.0], ["onnx"], tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "width-1.0.onnx", "width-1.0.onnx.data"]
    assert file.size == sum((tmp_path / name).stat().st_size for name in ("width-1.0.onnx", "width-1.0.onnx.data"))
    image = torch.rand(1, 1, 8, 8)
    (found,) = runtime.InferenceSession(tmp_path / "width-1.0.onnx").run(None, {"images": image.numpy()})
    assert oracles.difference(torch.from_numpy(found), expected(source.model, 1.0, image)) <= 1e-5
