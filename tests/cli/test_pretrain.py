"""The main job end to end in a tiny setting: what it writes, and that it can be stopped anywhere."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

import slimmable
from slimmable.__main__ import main
from slimmable._small_resnet import small_resnet
from slimmable.cli.config import METHODS
from slimmable.cli.data import load_images
from slimmable.cli.pretrain import Training
from slimmable.cli.run import load_checkpoint, read_config, save_networks, trained_method


def assert_same_results(folder, other):
    for name in ("metrics.csv", "losses.csv"):
        assert (folder / name).read_text() == (other / name).read_text()
    ours, theirs = (load_file(path / "checkpoint.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_run_folder(run):
    names = {path.name for path in run.iterdir()}
    subnetworks = {"model.safetensors", "width-1.0.safetensors", "width-0.5.safetensors"}
    reports = {"metrics.csv", "metrics.md", "accuracy.png", "neighbours.png"}
    assert names == {"config.json", "checkpoint.safetensors", "losses.csv"} | reports | subnetworks
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["width", "parameters", "macs", "knn", "linear"]
    assert [float(row["width"]) for row in rows] == [1.0, 0.5]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in list(row)[3:])
    assert (run / "metrics.md").read_text().startswith("| width | parameters | MACs |")
    assert (run / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_each_row_of_neighbours_begins_with_a_held_out_image(run):
    """Eight rows of nine images, enlarged to 72 pixels, 6 apart; the narrowest width says which are nearest."""
    picture = pil_to_tensor(Image.open(run / "neighbours.png"))
    assert picture.shape == (3, 8 * 78 + 6, 9 * 78 + 6)
    config = read_config(run)
    images = load_images(config)
    network = slimmable.load(run / "width-0.5.safetensors")
    with torch.no_grad():
        asked, known = (F.normalize(network(part.float() / 255)) for part in (images.test[::2], images.train))
    near = (asked @ known.T).argmax(1)
    for row in range(8):
        shown = [picture[:1, 6 + 78 * row :, 6 + 78 * column :][:, :72:3, :72:3] for column in (0, 1)]
        assert torch.equal(shown[0], images.test[2 * row])
        assert torch.equal(shown[1], images.train[near[row]])


def test_a_batch_larger_than_the_images_is_lowered(tmp_path, capsys):
    options = ("--num-images", "20", "--epochs", "1", "--widths", "1", "0.5", "--device", "cpu", "--workers", "0")
    assert main(["pretrain", *options, "--output", str(tmp_path / "run")]) == 0
    assert "--batch-size 64 is lowered to 20, with 20 images\n" in capsys.readouterr().out
    assert read_config(tmp_path / "run").batch_size == 20


def test_the_configuration_says_what_was_asked_for(run):
    """The queue is a shorter one, as there are 64 images only; that follows from them anew when a run goes on."""
    assert json.loads((run / "config.json").read_text())["queue_size"] == 256
    assert load_checkpoint(run / "checkpoint.safetensors")[0]["training.method.moco.queue"].shape == (64, 16)


def test_subnetworks_are_what_the_checkpoint_extracts(run):
    example = torch.zeros(2, 1, 24, 24)
    backbone = slimmable.slimify(small_resnet(in_chans=1), (1.0, 0.5), example_inputs=example)
    tensors, _ = load_checkpoint(run / "checkpoint.safetensors")
    prefix = "backbone."
    backbone.load_state_dict({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)})
    with open(run / "metrics.csv") as file:
        counts = {float(row["width"]): int(row["parameters"]) for row in csv.DictReader(file)}
    for width in (1.0, 0.5):
        small = slimmable.extract(backbone, width)
        assert sum(parameter.numel() for parameter in small.parameters()) == counts[width]
        small.load_state_dict(load_file(run / f"width-{width}.safetensors"))
        loaded = slimmable.load(run / f"width-{width}.safetensors")
        with torch.no_grad(), slimmable.at_width(backbone.eval(), width):
            torch.testing.assert_close(small.eval()(example + 0.5), backbone(example + 0.5), rtol=0, atol=0)
            assert torch.equal(loaded(example + 0.5), backbone(example + 0.5))


def test_the_model_of_a_run_loads_at_all_widths(run):
    model = slimmable.load(run / "model.safetensors")
    assert slimmable.widths_of(model) == (1.0, 0.5)
    images = torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    for width in (1.0, 0.5):
        with torch.no_grad(), slimmable.at_width(model, width):
            assert torch.equal(model(images), slimmable.load(run / f"width-{width}.safetensors")(images))


def test_the_lines_that_a_run_ends_with_load_it(tiny, tmp_path, capsys):
    assert main(["pretrain", *tiny, "--epochs", "1", "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out.splitlines()
    first = said.index("import slimmable")
    found = {}
    exec("\n".join(said[first : first + 3]), found)
    x = torch.zeros(2, 1, 24, 24)
    with slimmable.at_width(found["model"], 0.5):
        assert torch.equal(found["small"].eval()(x), found["model"](x))


def test_a_backbone_that_keeps_other_channels_without_its_head_is_left_out(run, tmp_path, monkeypatch):
    config = read_config(run)
    method = trained_method(config, run, channels=1)
    other = slimmable.slimify(small_resnet(in_chans=1), (1.0, 0.5), example_inputs=torch.zeros(2, 1, 24, 24), skip="")
    monkeypatch.setattr("slimmable.cli.run._slimmed", lambda config, network, example: other)
    assert save_networks(tmp_path, config, method, 1) == ["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"width-1.0.safetensors", "width-0.5.safetensors"}


def interrupt_after(steps, monkeypatch):
    take_step = Training.take_step

    def counted(self):
        losses = take_step(self)
        if self.step == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return losses

    monkeypatch.setattr(Training, "take_step", counted)


@pytest.mark.parametrize("steps", [3, 4, 6], ids=["slow start", "end of epoch", "all widths"])
def test_interrupted_run_goes_on_to_the_same_numbers(tiny, run, tmp_path, monkeypatch, capsys, steps):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(steps, patch)
        assert main(["pretrain", *tiny, "--output", str(folder)]) == 130
    assert f"continue with: slimmable pretrain --output {folder} --resume" in capsys.readouterr().out
    assert load_checkpoint(folder / "checkpoint.safetensors")[1] == steps
    assert main(["pretrain", "--output", str(folder), "--resume", "--device", "cpu", "--workers", "0"]) == 0
    assert_same_results(folder, run)


def test_killed_run_goes_on_to_the_same_numbers(tiny, run, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "slimmable", "pretrain", *tiny, "--output", str(folder)]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate()
    assert (folder / "checkpoint.safetensors").exists(), errors.decode()
    assert main(["pretrain", *tiny, "--output", str(folder), "--resume"]) == 0
    assert_same_results(folder, run)


def test_run_killed_before_its_first_checkpoint_starts_again(tiny, run, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def die(self):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Training, "take_step", die)
        with pytest.raises(RuntimeError, match="power cut"):
            main(["pretrain", *tiny, "--output", str(folder)])
    assert main(["pretrain", "--output", str(folder), "--resume", "--device", "cpu", "--workers", "0"]) == 0
    assert_same_results(folder, run)


def contents(folder):
    """What is in the files."""
    kinds = (".csv", ".md", ".json", ".safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in kinds}


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    before = contents(run)
    assert main(["pretrain", "--output", str(run), "--resume", "--device", "cpu", "--workers", "0"]) == 0
    assert contents(run) == before


def test_evaluate_gives_the_numbers_of_the_run(run, capsys):
    before = (run / "metrics.csv").read_text()
    assert main(["evaluate", str(run), "--device", "cpu", "--workers", "0"]) == 0
    assert (run / "metrics.md").read_text() in capsys.readouterr().out
    assert (run / "metrics.csv").read_text() == before


def test_another_seed_gives_another_run(tiny, run, tmp_path):
    assert main(["pretrain", *tiny, "--seed", "1", "--output", str(tmp_path / "run")]) == 0
    ours, theirs = (load_file(folder / "width-1.0.safetensors") for folder in (run, tmp_path / "run"))
    name = "layer2.0.conv1.weight"
    assert not torch.equal(ours[name], theirs[name])


def test_timm_model_with_dropout_resumes_to_the_same_numbers(tiny, tmp_path, monkeypatch):
    """A vision transformer with a fixed image size; its random depth draws from the same seeded numbers."""
    options = ("--model", "test_vit", "--image-size", "32", *tiny)
    make = small_network_with_dropout
    monkeypatch.setattr("slimmable.cli.run.make_timm", make)
    assert main(["pretrain", *options, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        assert main(["pretrain", *options, "--output", str(tmp_path / "run")]) == 130
    assert main(["pretrain", "--output", str(tmp_path / "run"), "--resume", "--device", "cpu", "--workers", "0"]) == 0
    assert_same_results(tmp_path / "run", tmp_path / "whole")


def small_network_with_dropout(name, settings, image_size):
    import timm

    settings = {**settings, "img_size": image_size, "proj_drop_rate": 0.2}
    return timm.create_model(name, **settings), settings


def test_a_universal_run_has_statistics_for_all_its_widths(tiny, tmp_path, capsys):
    """Widths between the widest and the narrowest never run as such in the training."""
    folder = tmp_path / "run"
    options = [*tiny, "--widths", "1", "0.5", "0.25", "--universal", "--method", "supervised", "--output", str(folder)]
    assert main(["pretrain", *options]) == 0
    assert "kNN on raw pixels" in capsys.readouterr().out
    tensors, _ = load_checkpoint(folder / "checkpoint.safetensors")
    for place in range(2):
        assert not torch.equal(tensors[f"backbone.bn1.narrow.{place}.running_var"], torch.ones(16 // 2 ** (place + 1)))
    before = (folder / "metrics.csv").read_text()
    assert main(["evaluate", str(folder), "--device", "cpu", "--workers", "0"]) == 0
    assert (folder / "metrics.csv").read_text() == before


@pytest.mark.parametrize("method", [name for name in METHODS if name != "mocov2"])
def test_every_method_resumes_to_the_same_numbers(method, tiny, run, tmp_path, monkeypatch):
    options = [*tiny, "--method", method, *(["--teacher", str(run)] if method == "distillation" else [])]
    assert main(["pretrain", *options, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        assert main(["pretrain", *options, "--output", str(tmp_path / "run")]) == 130
    resume = ["--resume", "--device", "cpu", "--workers", "0"]
    assert main(["pretrain", "--output", str(tmp_path / "run"), *resume]) == 0
    assert_same_results(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("opt", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_run_in_float16_resumes_to_the_same_numbers_and_skips_what_overflows(opt, tiny, tmp_path, monkeypatch):
    """The first steps overflow, so none of their gradients changes a weight; the scale is part of the checkpoint."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device, enabled: scaler(device, 2.0**50, backoff_factor=2.0**-20, growth_interval=2, enabled=enabled),
    )
    options = [*tiny, "--precision", "float16", "--opt", opt, "--lr", "0.001"]
    assert main(["pretrain", *options, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        assert main(["pretrain", *options, "--output", str(tmp_path / "run")]) == 130
    stopped, _ = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert 2.0 < stopped["training.scaler.scale"] < 2.0**50
    assert stopped["training.scaler._growth_tracker"].dtype == torch.int64
    resume = ["--resume", "--device", "cpu", "--workers", "0"]
    assert main(["pretrain", "--output", str(tmp_path / "run"), *resume]) == 0
    assert_same_results(tmp_path / "run", tmp_path / "whole")
    whole, run = (load_checkpoint(tmp_path / name / "checkpoint.safetensors")[0] for name in ("whole", "run"))
    assert all(torch.equal(whole[name], run[name]) for name in whole)


def test_gradients_that_overflow_at_any_scale_have_diverged(tiny, tmp_path, monkeypatch, capsys):
    """They are NaN here; the scale falls step by step, from one near the least, and the run ends at a checkpoint."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**-18, enabled=enabled))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backward(loss * math.inf))
    assert main(["pretrain", *tiny, "--precision", "float16", "--output", str(tmp_path / "run")]) == 2
    assert "gradients are not finite, even of losses scaled by" in capsys.readouterr().err


backward = torch.Tensor.backward


def test_evaluate_takes_every_probe(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    probes = ["--probes", "knn", "linear", "slimmable", "ridge"]
    assert main(["evaluate", str(copy), *probes, "--device", "cpu", "--workers", "0"]) == 0
    assert "| kNN | linear | slimmable probe | ridge |" in capsys.readouterr().out
