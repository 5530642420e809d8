"""What `slimmable export` refuses: one message, exit code 2, no file and no folder made."""

import json
import os

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import slimmable
from slimmable.__main__ import main
from slimmable._atomic import filled_aside
from slimmable.errors import CheckpointError

NAME = "test_resnet"


def refused(capsys, *arguments):
    """Run an export that must fail, and return what it says."""
    assert main(["export", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("slimmable export: ")
    assert "Traceback" not in output.err
    return output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["resnet_18", "--width", "1"],
            "resnet_18 is neither a folder with config.json nor a file, and timm has no",
        ),
        (["resnet_18", "--width", "1"], "did you mean resnet18"),
        (["runs/none", "--width", "1"], "runs/none is neither a folder with config.json nor a file"),
        ([NAME, "--width", "0.3"], "--width 0.3 is not one of --widths (1.0, 0.75, 0.5, 0.25)"),
        ([NAME, "--width", "nan"], "--width nan is not one of"),
        ([NAME, "--width", "1", "--widths", "0.5", "0.25"], "full width 1.0 is missing"),
        ([NAME, "--width", "1", "--checkpoint", "none.pth"], "there is no file none.pth"),
        ([NAME, "--width", "1", "--num-classes", "-1"], "--num-classes must be from 0 to 1,000,000, got -1"),
        ([NAME, "--width", "1", "--image-size", "0"], "--image-size must be from 1 to 4,096, got 0"),
        (["test_vit", "--width", "1", "--image-size", "20"], "Input height (20) should be divisible by patch size"),
        (["vit_base_patch16_18x2_224", "--width", "1", "--pretrained"], "timm has no pretrained weights"),
        ([NAME, "--width", "1", "--pretrained", "--checkpoint", "x"], "--pretrained is not allowed with --checkpoint"),
    ],
)
def test_arguments_without_meaning(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments, "--output", "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "1", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["--width", "half"], "argument --width: invalid width value: 'half'"),
        ([], "--width, --all-widths and --budget or --latency each say what to write; give one of them"),
    ],
)
def test_arguments_that_cannot_be_read(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, NAME, *arguments, "--output", tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("truncated", "it is damaged"),
        ("foreign", "was not written by slimmable.save"),
        ("narrow", "holds a single narrow network"),
        ("stranger", "holds a network that timm cannot make"),
    ],
)
def test_files_that_hold_no_converted_timm_model(tmp_path, capsys, content, message):
    path = tmp_path / "model.safetensors"
    slim = slimmable.slimify(timm.create_model(NAME, num_classes=3), (1.0, 0.5))
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    if content == "foreign":
        save_file(slim.state_dict(), path)
    elif content == "stranger":
        slimmable.save(slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(1, 4)), path)
    else:
        slimmable.save(slimmable.extract(slim, 0.5) if content == "narrow" else slim, path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    assert message in refused(capsys, path, "--width", "0.5", "--output", tmp_path / "out")
    assert os.listdir(tmp_path) == [path.name]


def test_options_that_a_saved_model_settles(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    slimmable.save(slimmable.slimify(timm.create_model(NAME, num_classes=3), (1.0, 0.5)), path)
    said = refused(capsys, path, "--width", "0.5", "--num-classes", "4", "--output", tmp_path / "out")
    assert "is a saved model, which already determines --num-classes; leave it out" in said


def test_image_sizes_that_a_saved_model_does_not_take(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    settings = {"img_size": 64, "dynamic_img_size": False}
    slim = slimmable.slimify(timm.create_model("test_vit", **settings), (1.0, 0.5))
    slimmable.save(slim, path, arguments=settings)
    for size, message in ((0, "must be from 1 to 4,096, got 0"), (96, "does not accept images of 96 x 96 pixels")):
        said = refused(capsys, path, "--width", "0.5", "--image-size", size, "--output", tmp_path / "out")
        assert message in said


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_names_the_extra(tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    options = ["--width", "1", "--format", "pt2", "--format", "onnx"]
    message = refused(capsys, NAME, *options, "--output", tmp_path / "out")
    assert f"needs {package}" in message
    assert 'pip install ".[onnx]" (in a clone of slimmable)' in message
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    options = ["--width", "1", "--format", "safetensors"]
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"cannot write into the folder {output}" in refused(capsys, NAME, *options, "--output", output)
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_that_is_no_run(tmp_path, capsys):
    assert "is neither a folder with config.json nor a file" in refused(capsys, tmp_path, "--width", "1")
    (tmp_path / "config.json").write_text("{}")
    assert "config.json was written by another version" in refused(capsys, tmp_path, "--width", "1")
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize(
    "option",
    [("--checkpoint", "x"), ("--pretrained",), ("--num-classes", "0"), ("--image-size", "32"), ("--widths", "1")],
)
def test_options_that_a_run_settles(run, capsys, option):
    before = set(run.iterdir())
    assert f"which already determines {option[0]}; leave it out" in refused(capsys, run, "--width", "1", *option)
    assert set(run.iterdir()) == before


def test_width_that_a_run_does_not_have(run, capsys):
    before = set(run.iterdir())
    assert "Nearest is 0.5" in refused(capsys, run, "--width", "0.3")
    assert set(run.iterdir()) == before


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x10\0\0\0\0\0\0\0{}"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damaged_weights(tmp_path, capsys, content, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    message = refused(capsys, NAME, "--width", "1", "--checkpoint", path, "--output", tmp_path / "out")
    assert f"{path} is not a file of weights" in message
    assert os.listdir(tmp_path) == [path.name]


class Opens:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("opened", "w")


def test_weights_that_run_code_are_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Opens()}, "hostile.pth")
    assert "is not a file of weights" in refused(capsys, NAME, "--width", "1", "--checkpoint", "hostile.pth")
    assert os.listdir(tmp_path) == ["hostile.pth"]


def test_weights_of_another_model(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(NAME, num_classes=10).state_dict(), path)
    message = refused(capsys, NAME, "--width", "1", "--checkpoint", path, "--output", tmp_path / "out")
    assert "of another shape: fc.weight (10, 96), expected (1000, 96)" in message
    assert os.listdir(tmp_path) == ["weights.pth"]


def test_pretrained_weights_that_cannot_be_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", fails)
    message = refused(capsys, NAME, "--width", "1", "--pretrained", "--output", tmp_path / "out")
    assert "timm cannot make the model 'test_resnet' with pretrained=True (OSError: no route" in message
    assert "--checkpoint" in message
    assert os.listdir(tmp_path) == []


def fails(*_, **__):
    raise OSError("no route to the Hub")


def test_an_error_half_way_leaves_what_was_there(tmp_path):
    (tmp_path / "width-1.0.pt2").write_text("old")
    with pytest.raises(CheckpointError, match=f"cannot write into the folder {tmp_path} .*No space left"):
        half_filled(tmp_path, OSError(28, "No space left on device"))
    assert os.listdir(tmp_path) == ["width-1.0.pt2"]
    assert (tmp_path / "width-1.0.pt2").read_text() == "old"
    with pytest.raises(KeyboardInterrupt):
        half_filled(tmp_path, KeyboardInterrupt())
    assert os.listdir(tmp_path) == ["width-1.0.pt2"]


def half_filled(folder, error):
    with filled_aside(folder) as aside:
        (aside / "width-1.0.pt2").write_text("half")
        raise error


def test_the_card_of_a_run_has_its_report(run, tmp_path):
    output = tmp_path / "out"
    assert main(["export", str(run), "--width", "0.5", "--format", "safetensors", "--output", str(output)]) == 0
    text = (output / "README.md").read_text()
    lines = (run / "metrics.csv").read_text().splitlines()[1:]
    for line in lines:
        width, parameters, macs, knn, linear, *_ = line.split(",")
        shares = f"{100 * float(knn):.1f} | {100 * float(linear):.1f}"
        assert f"| {float(width):g} | {int(parameters):,} | {int(macs):,} |" in text
        assert f"| {shares} |\n" in text
    assert len(lines) == 2
    assert "2 epochs of mocov2" in text
    assert json.loads((run / "config.json").read_text())["epochs"] == 2
