"""What the networks of a run are worth after fine-tuning: a column more in the report of the run."""

import csv
import shutil

import pytest

from benchmarks.finetuned import main
from slimmable.__main__ import main as slimmable
from tests.cli.conftest import OPTIONS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert slimmable(["pretrain", *OPTIONS, "--output", str(folder)]) == 0
    return folder


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_width_is_fine_tuned(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert main([str(copy), "--probes", "knn", "linear", "slimmable", "ridge", "--epochs", "1"]) == 0
    assert "| kNN | linear | slimmable probe | ridge | fine-tuned |" in capsys.readouterr().out
    assert all(0 <= float(row["finetuned"]) <= 1 for row in read(copy / "metrics.csv"))
    assert slimmable(["export", str(copy), "--width", "0.5", "--format", "safetensors"]) == 0


def test_plain_networks_of_a_gated_run_are_fine_tuned(tmp_path):
    folder = tmp_path / "run"
    gated = ("--widths", "1", "--method", "vicreg", "--gate-budget", "0.3")
    assert slimmable(["pretrain", *OPTIONS, *gated, "--output", str(folder)]) == 0
    assert main([str(folder), "--probes", "knn", "ridge", "slimmable", "--epochs", "1"]) == 0
    dense, gated, *static = read(folder / "metrics.csv")
    assert list(dense)[4:8] == ["knn", "ridge", "slimmable", "finetuned"]
    assert gated["finetuned"] == ""
    assert all(0 <= float(row["finetuned"]) <= 1 for row in (dense, *static))


def test_less_than_one_epoch_is_refused(run, capsys):
    before = (run / "metrics.csv").read_text()
    assert main([str(run), "--epochs", "-1"]) == 2
    assert "--epochs must be at least 1, got -1" in capsys.readouterr().err
    assert (run / "metrics.csv").read_text() == before
