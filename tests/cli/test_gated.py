"""Runs with a gate budget: what they write, that it is what was trained, and that kNN on the way changes nothing."""

import csv
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import slimmable
from slimmable.__main__ import main
from slimmable.cli.config import configure
from slimmable.cli.data import load_images
from slimmable.cli.pretrain import Training, Watch
from slimmable.cli.run import new_method
from slimmable.evaluation import knn_accuracy
from tests.cli.test_pretrain import assert_same_results, interrupt_after

GATED = ("--widths", "1", "--method", "vicreg", "--gate-budget", "0.3")
ON_CPU = ("--device", "cpu", "--workers", "0")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def gated_run(tiny, tmp_path_factory):
    """The folder of a tiny gated run that went through without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "gated"
    assert main(["pretrain", *tiny, *GATED, "--output", str(folder)]) == 0
    return folder


def features(backbone, images):
    with torch.no_grad():
        return backbone(images.float() / 255)


def in_gated_pass(backbone, images):
    """The features of the gated pass, and the multiply-adds of each image."""
    with slimmable.gating.gated(backbone) as run:
        found = features(backbone, images)
    return found, run.macs()


def test_the_run_tells_what_its_gates_cost(gated_run, capsys, images, backbone):
    """Resuming a finished run ends it again."""
    assert main(["pretrain", "--output", str(gated_run), "--resume", *ON_CPU]) == 0
    _, macs = in_gated_pass(backbone, images.train)
    share = float(macs.mean()) / int(read(gated_run / "metrics.csv")[0]["macs"])
    assert f"the gates are set to {share:.3f} of the multiply-adds; the budget is 0.3\n" in capsys.readouterr().out


def test_run_folder(gated_run):
    names = {path.name for path in gated_run.iterdir()}
    reports = {"metrics.csv", "metrics.md", "accuracy.png", "neighbours.png", "losses.csv", "knn.csv"}
    assert names == {"config.json", "checkpoint.safetensors", "model.safetensors", "width-1.0.safetensors"} | reports
    (row,) = read(gated_run / "losses.csv")
    assert list(row) == ["step", "learning_rate", "train_loss/w1", "gated_share"]
    assert 0 < float(row["gated_share"]) < 1
    rows = read(gated_run / "knn.csv")
    assert list(rows[0]) == ["step", "knn/dense", "knn/gated", "gated_share"]
    assert [row["step"] for row in rows] == ["4", "8"]  # a tenth of the epochs is less than one


def test_the_gated_row_is_the_gated_pass_at_the_budget(gated_run, images, backbone):
    dense, gated = read(gated_run / "metrics.csv")[:2]
    assert (dense["network"], gated["network"]) == ("dense", "gated 0.3")
    known, macs = in_gated_pass(backbone, images.train)
    assert float(macs.mean()) == pytest.approx(0.3 * int(dense["macs"]), rel=0.02)
    asked, macs = in_gated_pass(backbone, images.test)
    assert int(gated["macs"]) == pytest.approx(float(macs.mean()), abs=1)
    share = knn_accuracy(known, images.train_labels, asked, images.test_labels)
    assert float(gated["knn"]) == pytest.approx(share, abs=1e-4)
    share = knn_accuracy(
        features(backbone, images.train), images.train_labels, features(backbone, images.test), images.test_labels
    )
    assert float(dense["knn"]) == pytest.approx(share, abs=1e-4)


def test_static_networks_cost_what_they_are_named_after(gated_run):
    dense, _, *static = read(gated_run / "metrics.csv")
    budgets = [float(row["network"].removeprefix("static ")) for row in static]
    assert budgets == [0.5, 0.4, 0.3, 0.2, 0.1]
    for budget, row in zip(budgets, static, strict=True):
        assert 0.7 * budget * int(dense["macs"]) < int(row["macs"]) <= budget * int(dense["macs"])
        assert int(row["parameters"]) < int(dense["parameters"])


def test_knn_on_the_way_is_that_of_the_weights_and_thresholds_then(gated_run, images, backbone):
    last = read(gated_run / "knn.csv")[-1]
    assert float(last["knn/dense"]) == pytest.approx(float(read(gated_run / "metrics.csv")[0]["knn"]), abs=1e-4)
    for module in backbone.modules():
        if isinstance(module, slimmable.gating.ChannelGate):
            module.threshold.zero_()
    known, _ = in_gated_pass(backbone, images.train)
    asked, macs = in_gated_pass(backbone, images.test)
    dense = slimmable.profile(backbone, (1, 24, 24), repeats=0).rows[0].macs
    assert float(last["gated_share"]) == pytest.approx(float(macs.mean()) / dense, rel=1e-5)
    share = knn_accuracy(known, images.train_labels, asked, images.test_labels)
    assert float(last["knn/gated"]) == pytest.approx(share, abs=1e-5)


def test_knn_on_the_way_changes_nothing(gated_run, tiny, tmp_path):
    assert main(["pretrain", *tiny, *GATED, "--knn-every", "0", "--output", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "knn.csv").exists()
    assert_same_results(tmp_path / "run", gated_run)


def test_knn_of_widths(run, tiny, tmp_path, capsys):
    assert not (run / "knn.csv").exists()
    assert main(["pretrain", *tiny, "--knn-every", "2", "--output", str(tmp_path / "run")]) == 0
    assert_same_results(tmp_path / "run", run)
    (row,) = read(tmp_path / "run" / "knn.csv")
    metrics = read(run / "metrics.csv")
    assert list(row) == ["step", "knn/w1", "knn/w0.5"]
    assert [float(share) for share in row.values()] == [
        8,
        *(pytest.approx(float(each["knn"]), abs=1e-4) for each in metrics),
    ]
    shown = "  ".join(f"{width}: {100 * float(row[f'knn/w{width}']):.1f}" for width in ("1", "0.5"))
    assert f"kNN accuracy in %  {shown}\n" in capsys.readouterr().out


def test_knn_of_a_universal_run_is_of_the_widths_that_train_in_every_step(tmp_path):
    config = configure(
        {"num_images": 32, "batch_size": 16, "widths": (1.0, 0.75, 0.5), "universal": True, "warmup_epochs": 0.0}
    )
    training = Training(config, new_method(config, 1, 10), load_images(config), torch.device("cpu"))

    training.step = 3
    line = Watch(training, tmp_path).look()
    (row,) = read(tmp_path / "knn.csv")
    assert list(row) == ["step", "knn/w1", "knn/w0.5"]
    assert row["step"] == "3"
    assert line == f"kNN accuracy in %  1: {100 * float(row['knn/w1']):.1f}  0.5: {100 * float(row['knn/w0.5']):.1f}"


def test_a_run_goes_on_to_the_same_numbers(gated_run, tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        assert main(["pretrain", *tiny, *GATED, "--output", str(folder)]) == 130
    assert [row["step"] for row in read(folder / "knn.csv")] == ["4"]
    assert main(["pretrain", "--output", str(folder), "--resume", *ON_CPU]) == 0
    assert_same_results(folder, gated_run)
    assert (folder / "knn.csv").read_text() == (gated_run / "knn.csv").read_text()


@pytest.mark.parametrize("method", ["simclr", "byol", "mocov3"])
def test_other_methods_go_on_to_the_same_numbers(method, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("slimmable.cli.pretrain.rows_of_run", lambda *args, **kwargs: [])
    monkeypatch.setattr("slimmable.cli.pretrain.report_run", lambda *args, **kwargs: "")
    options = [*tiny, *GATED, "--method", method, "--knn-every", "0"]
    assert main(["pretrain", *options, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        assert main(["pretrain", *options, "--output", str(tmp_path / "run")]) == 130
    assert main(["pretrain", "--output", str(tmp_path / "run"), "--resume", "--knn-every", "0", *ON_CPU]) == 0
    whole, ours = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "run"))
    assert whole.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items())
    thresholds = {
        tensor.item() for name, tensor in whole.items() if name[:9] == "backbone." and name.endswith("threshold")
    }
    assert len(thresholds) == 1  # one for all gates, by the calibration
    assert thresholds != {0.0}


def test_evaluate_gives_the_numbers_of_the_run(gated_run, capsys):
    before = {path.name: path.read_bytes() for path in gated_run.iterdir() if path.suffix != ".png"}
    assert main(["evaluate", str(gated_run), *ON_CPU]) == 0
    assert {path.name: path.read_bytes() for path in gated_run.iterdir() if path.suffix != ".png"} == before
    assert (gated_run / "metrics.md").read_text() in capsys.readouterr().out


def test_export_writes_the_dense_network(gated_run, backbone, tmp_path):
    formats = ["--format", "pt2", "--format", "safetensors"]
    assert main(["export", str(gated_run), "--width", "1", *formats, "--output", str(tmp_path)]) == 0
    images = torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    program = torch.export.load(tmp_path / "width-1.0.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(images), backbone(images))
        with slimmable.gating.gated(backbone):
            assert not torch.allclose(program(images), backbone(images))
    weights = load_file(tmp_path / "width-1.0.safetensors")
    assert not any("gate" in name for name in weights)
    dense = read(gated_run / "metrics.csv")[0]
    shares = " | ".join(f"{100 * float(dense[name]):.1f}" for name in ("knn", "linear"))
    assert f"| {shares} |" in (tmp_path / "README.md").read_text()


def test_the_model_of_the_run_loads_with_its_gates(gated_run, backbone):
    model = slimmable.load(gated_run / "model.safetensors")
    images = torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(images), backbone(images))
        with slimmable.gating.gated(model), slimmable.gating.gated(backbone):
            assert torch.equal(model(images), backbone(images))


def test_two_processes_make_one_run(tiny, tmp_path, monkeypatch):
    """Their gates draw noise of their own, so the numbers are not those of one process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "slimmable")
    options = ("pretrain", *tiny, *GATED, "--knn-every", "1", "--output", str(tmp_path / "run"))
    process = subprocess.run([*launch, *options], capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("the results are in") == 1
    assert process.stdout.count("kNN accuracy") == 2
    assert [row["step"] for row in read(tmp_path / "run" / "knn.csv")] == ["4", "8"]
    before = (tmp_path / "run" / "metrics.csv").read_text()
    assert main(["evaluate", str(tmp_path / "run"), *ON_CPU]) == 0
    assert (tmp_path / "run" / "metrics.csv").read_text() == before
