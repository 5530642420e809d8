"""What the commands say to input that they cannot use: one message, exit code 2, nothing made or changed."""

import json
import os
import re

import pytest
from torch import nn

from slimmable.__main__ import main
from slimmable.cli.report import logged_rows
from slimmable.errors import CheckpointError

VICREG = ("--method", "vicreg")


def refused(capsys, *arguments):
    """Run a command that must fail, and return what it says."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"slimmable {arguments[0]}: ")
    assert "Traceback" not in output.err
    return output.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "0.5", "0.25"], "--widths: the full width 1.0 is missing"),
        (["--widths", "1", "0.5", "0.5"], "appears twice"),
        (["--widths", "1", "0"], "not in (0, 1]"),
        (["--widths", "1", "nan"], "not in (0, 1]"),
        (["--widths", "1", "1.5"], "not in (0, 1]"),
        (["--model", "resnet5O"], "did you mean resnet50"),
        (["--model", "qqqqqqqqqq"], "timm.list_models()"),
        (["--model", "test_vit", "--image-size", "20"], "choose another --image-size"),
        (["--epochs", "0"], "--epochs must be from 1 to 1,000,000, got 0"),
        (["--batch-size", "1"], "--batch-size must be from 2"),
        (["--image-size", "10"], "--image-size 20 or more"),
        (["--lr", "nan"], "--lr must be from 1e-09"),
        (["--seed", "-1"], "--seed must be"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--data", "/nonexistent/images"], "there is no such folder"),
        (["--num-images", "3"], "--num-images must be from 4 to 1,000,000, got 3"),
        (["--key-parts", "0"], "--key-parts must be from 1"),
        (["--method", "mocov2", "--key-parts", "33"], "--key-parts 33 of --batch-size 64 have fewer than two images"),
        (
            ["--augmentation", "supervised"],
            "--augmentation supervised makes one view of an image, but --method simclr takes two",
        ),
        (["--method", "vicreg", "--distill", "dkd"], "--distill dkd compares logits, which vicreg"),
        (["--universal", "--widths", "1"], "--universal needs a narrowest width"),
        (["--diagnostics", "--widths", "1"], "--diagnostics compares widths"),
        (["--loss-weights", "heavy"], "--loss-weights heavy: unknown mode"),
        (["--loss-weights", "widest_plus_second", "--widths", "1"], "--loss-weights widest_plus_second: mode"),
        (["--warmup-epochs", "1", "--epochs", "1"], "--warmup-epochs 1 leaves none of the 1 epochs"),
        (["--workers", "-1"], "--workers must be from 0 to 256"),
        (["--knn-every", "-1"], "--knn-every must be from 0 to 1,000,000, got -1"),
        ([*VICREG, "--gate-budget", "0"], "must be from 1e-06 to 0.999999, got 0"),
        ([*VICREG, "--gate-budget", "1"], "must be from 1e-06 to 0.999999, got 1"),
        ([*VICREG, "--gate-budget", "nan"], "must be from 1e-06 to 0.999999, got nan"),
        ([*VICREG, "--gate-budget", "0.01"], "--gate-budget 0.01: small_resnet with all gates closed costs 0.0"),
        (
            [*VICREG, "--gate-budget", "0.3", "--widths", "1", "0.5", "--universal"],
            "--gate-budget and --views-per-width are for fixed widths; leave out --universal",
        ),
        (["--views-per-width", "--universal"], "are for fixed widths; leave out --universal"),
        (["--bn-groups", "3"], "--bn-groups 3 of --batch-size 64: they must be equal, of two"),
        (["--bn-groups", "64"], "--bn-groups 64 of --batch-size 64: they must be equal, of two images or more"),
        ([*VICREG, "--gate-budget", "0.3", "--universal"], "--universal needs a narrowest width"),
        (
            [*VICREG, "--gate-budget", "0.3", "--gate-loss-weight", "0"],
            "--gate-loss-weight must be from 1e-09 to 1,000,000, got 0",
        ),
        (
            [*VICREG, "--gate-budget", "0.3", "--gate-lr-scale", "inf"],
            "--gate-lr-scale must be from 1e-09 to 1,000,000, got inf",
        ),
        (
            ["--method", "mocov2", "--gate-budget", "0.3"],
            "--gate-budget is for --method mocov3, simclr, byol, simsiam, vicreg, barlowtwins, not mocov2",
        ),
        (["--log-every", "0"], "--log-every must be from 1"),
        (["--preset", "dino"], "no --preset is called dino, but slimclr-mocov2-imagenet"),
    ],
)
def test_pretrain_refuses(tmp_path, capsys, options, message):
    output = tmp_path / "run"
    assert message in refused(capsys, "pretrain", "--num-images", "64", *options, "--output", str(output))
    assert not output.exists()


def test_a_model_without_anything_to_gate(tmp_path, capsys, monkeypatch):
    def plain(name, settings, image_size):
        first = (nn.Conv2d(settings["in_chans"], 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*first, nn.Linear(8, 4)), settings

    monkeypatch.setattr("slimmable.cli.run.make_timm", plain)
    options = ("--model", "vgg11", *VICREG, "--gate-budget", "0.3", "--num-images", "64")
    message = refused(capsys, "pretrain", *options, "--output", str(tmp_path / "run"))
    assert "--gate-budget needs a --model that can be gated: nothing in this Sequential can be gated" in message
    assert "0 (8): its layer reads the model's input, of which a gate learns little" in message
    assert not (tmp_path / "run").exists()


def test_widths_that_are_no_numbers(tmp_path, capsys):
    message = refused(capsys, "pretrain", "--widths", "1", "half", "--output", str(tmp_path / "run"))
    assert "invalid float value: 'half'" in message
    assert not (tmp_path / "run").exists()


def test_run_folder_that_exists(run, tiny, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    message = refused(capsys, "pretrain", *tiny, "--output", str(run))
    assert "add --resume" in message
    assert "--output" in message
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_a_run_folder_that_cannot_be_made(tmp_path, tiny, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        assert "cannot write into the folder" in refused(capsys, "pretrain", *tiny, "--output", str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_resume_without_a_run(tmp_path, capsys):
    message = refused(capsys, "pretrain", "--resume", "--output", str(tmp_path / "run"))
    assert "is not the folder of a pre-training run" in message
    assert not (tmp_path / "run").exists()


def test_resume_with_other_settings(run, capsys):
    message = refused(capsys, "pretrain", "--resume", "--epochs", "9", "--widths", "1", "0.25", "--output", str(run))
    assert "--epochs: the run has 2, now 9" in message
    assert "--widths: the run has (1.0, 0.5), now (1.0, 0.25)" in message


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]", '{"model": "small_resnet"}', '{"colour": "blue"}', "null", "3", '[["epochs", 2]]'),
        *(
            "[" * 100_000,
            '{"a":' * 100_000,
            '{"epochs": 2, "epochs": 3}',
            "\0",
            "{}" + " " * 2**20,
            '{"\\ud800\\n": 1}',
        ),
    ],
)
def test_damaged_configuration(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refused(capsys, "evaluate", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", "two"), ("batch_size", 16.5), ("seed", None), ("model", 3), ("universal", "no"), ("widths", "abc"),
     ("lr_after_slow_start", "0.1"), ("temperature", []), ("epochs", True), ("universal", 1), ("data", None),
     ("widths", {}), ("precision", ["float32"])],
)  # fmt: skip
def test_configuration_with_a_value_of_another_kind(run, tmp_path, capsys, name, value):
    config = json.loads((run / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"config.json: {name} cannot be {value!r}" in refused(capsys, "evaluate", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 10**12, "--epochs must be from 1 to 1,000,000, got 1000000000000"),
        ("lr", float("nan"), "--lr must be from 1e-09 to 1,000,000, got nan"),
        ("lr", float("inf"), "--lr must be from 1e-09 to 1,000,000, got inf"),
        ("temperature", 1e-300, "--temperature must be from 1e-09 to 1,000,000, got 1e-300"),
        ("weight_decay", 10**400, "--weight-decay must be from 0 to 1,000,000, got 1000"),
        ("image_size", 100_000, "--image-size must be from 8 to 4,096, got 100000"),
        ("widths", [], "--widths: the full width 1.0 is missing from []"),
        ("widths", [1.0, "0.5"], "--widths: width '0.5' in"),
        ("widths", [1.0, 10**400], "is not in (0, 1]"),
        ("widths", [1.0] * 10_000, "--widths: got 10,000 of them; choose at most 100"),
        ("method", "dinov2", "--method cannot be dinov2"),
        ("gate_budget", 0.5, "--gate-budget is for --method"),
        ("model", "hf-hub:timm/resnet18", "timm cannot make the model 'hf-hub:timm/resnet18' with"),
        ("model", "\ud800\n", "timm has no model '\\ud800\\n'"),
        ("data", "a\nb\0", "--data 'a\\nb\\x00': there is no such folder"),
        ("data", "", "--data is empty"),
    ],
)
def test_configuration_with_a_value_without_meaning(run, tmp_path, capsys, name, value, message):
    config = json.loads((run / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoint.safetensors").write_bytes((run / "checkpoint.safetensors").read_bytes())
    for command in (["evaluate", str(tmp_path)], ["pretrain", "--resume", "--output", str(tmp_path)]):
        said = refused(capsys, *command)
        assert message in said
        assert name in ("model", "data") or "config.json: " in said
        assert len(said) < 1000
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "checkpoint.safetensors"}


@pytest.mark.parametrize(
    "text",
    [
        "width,parameters,macs,knn\n1.0,10,20,0.5,7\n",
        "width,parameters,macs,knn\n1.0,10\n",
        "width,parameters,macs,knn\nnan,10,20,0.5\n",
        "width,parameters,macs,knn\n1.0,-10,20,0.5\n",
        "width,parameters,macs,knn\n1.0,10,20,nan\n",
        "width,parameters,macs,knn\n1.0,10,20,7\n",
        "width,parameters,macs,magic\n1.0,10,20,0.5\n",
        "width,parameters,macs,knn\n1.0,10,20,'0.5\n",
        'width,parameters,macs,knn\n"1.0,10,20,0.5\n',
        "width,parameters,macs,knn\n" + "9" * 200_000 + ",10,20,0.5\n",
        "parameters,macs\n1,1\n",
        "\0\n\0\n",
        None,
    ],
)
def test_report_that_is_none(run, tmp_path, capsys, text):
    for name in ("config.json", "checkpoint.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    path = tmp_path / "metrics.csv"
    if text is None:
        os.mkfifo(path)
    else:
        path.write_text(text)
    said = refused(capsys, "export", str(tmp_path), "--width", "0.5", "--output", str(tmp_path / "out"))
    assert f"{path} is not the report of a run (" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["losses.csv", "gradients.csv", "knn.csv"])
@pytest.mark.parametrize("rows", ["2,1\n2,1\n", "2,1\n1,1\n", "-1,1\n", "1\n", "1,x\n", "1,1,1\n", "\0,1\n"])
def test_tables_that_no_run_wrote(tmp_path, name, rows):
    (tmp_path / name).write_text("step,learning_rate\n" + rows)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read .*move it away, then resume"):
        logged_rows(tmp_path / name, 5)


def test_checkpoint_of_other_widths(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text()) | {"widths": [1.0, 0.75, 0.5]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoint.safetensors").write_bytes((run / "checkpoint.safetensors").read_bytes())
    for command in (["evaluate", str(tmp_path)], ["pretrain", "--resume", "--output", str(tmp_path)]):
        message = refused(capsys, *command)
        assert "belongs to another model or other widths" in message
        assert re.search(r"\n  missing: .*narrow\.1\.weight", message)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "checkpoint.safetensors"}


def test_run_without_checkpoint(run, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    assert "there is no file" in refused(capsys, "export", str(tmp_path), "--width", "0.5")


def test_extract_at_an_unknown_width(run, capsys):
    before = set(run.iterdir())
    assert "Nearest is 0.5" in refused(capsys, "export", str(run), "--width", "0.3")
    assert set(run.iterdir()) == before


@pytest.mark.parametrize("command", ["profile", "plan"])
def test_unknown_model(command, capsys):
    assert "--widths: " in refused(capsys, command, "test_resnet", "--widths", "0.5")
    assert "did you mean" in refused(capsys, command, "resnet_18")


def test_missing_package_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    message = refused(capsys, "pretrain", "--output", str(tmp_path / "run"))
    assert 'pip install ".[cli]" (in a clone of slimmable)' in message
    assert not (tmp_path / "run").exists()
