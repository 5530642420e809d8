"""The benchmarks run, and their result files say what was measured, how and where."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPARED = {"ratio", "low", "high", "wall_ratio", "baseline_cpu_ms", "rounds"}
ROWS = {
    "overhead": (6, COMPARED | {"batch", "image_size", "width", "pass", "noise", "goal"}),
    "training_step": (4, COMPARED | {"batch", "image_size", "way", "saved_bytes", "saved_ratio", "goals"}),
}


def quick(module, out):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module", params=ROWS)
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    quick(f"{request.param}.run", out)
    return request.param, out


def test_results_have_their_fields(run):
    question, out = run
    result = json.loads(next(out.glob("resnet10t--*.json")).read_text())
    assert result["command"].startswith(f"python -m benchmarks.{question}.run --quick")
    assert set(result["versions"]) == {"slimmable", "torch", "timm", "python"}
    assert set(result["machine"]) == {"cpu", "cores", "threads", "load_average"}
    rows, fields = ROWS[question]
    assert len(result["rows"]) == rows
    for row in result["rows"]:
        assert set(row) == fields
        assert 0 < row["low"] <= row["ratio"] <= row["high"]


def test_the_table_has_a_line_per_row(run):
    question, out = run
    lines = (out / "table.md").read_text().splitlines()
    assert sum(line.startswith("| resnet10t |") for line in lines) == ROWS[question][0]


def test_a_step_of_all_widths_saves_no_more_than_the_widest(run):
    question, out = run
    if question == "training_step":
        saved = {
            row["way"]: row["saved_ratio"]
            for row in json.loads(next(out.glob("resnet10t--*.json")).read_text())["rows"]
        }
        assert saved["recipe.backward"] <= saved["recipe.backward, distilling"] <= 1.05
        assert saved["recipe.widths, distilling"] <= 1.05
        assert saved["recipe.total, distilling"] > 2


def test_the_causes_are_measured_one_by_one(tmp_path):
    quick("overhead.causes", tmp_path)
    result = json.loads(next(tmp_path.glob("resnet10t--*.json")).read_text())
    assert [row["width"] for row in result["rows"]] == [0.5, 0.25]
    for row in result["rows"]:
        assert set(row) == {"width", "image_size", "forward", "train", "read", "copy", "zeros"}
        assert min(row.values()) > 0
    assert (tmp_path / "table.md").read_text().count("| resnet10t |") == 2


def test_a_conversion_is_measured(tmp_path):
    quick("conversion.run", tmp_path)
    [row] = json.loads(next(tmp_path.glob("test_resnet--cpu-*.json")).read_text())["rows"]
    assert row["operations"] > 30
    assert min(row[name] for name in ("seconds", "parameters", "ms_per_operation", "set_width_ms")) > 0
    assert (tmp_path / "table.md").read_text().count("| test_resnet |") == 1


def test_gradient_diagnostics_are_measured(tmp_path):
    quick("diagnostics.run", tmp_path)
    rows = json.loads(next(tmp_path.glob("resnet10t--*.json")).read_text())["rows"]
    assert [row["way"] for row in rows] == ["sampled", "not sampled"]
    assert all(set(row) == COMPARED | {"way", "batch", "image_size"} for row in rows)
    assert (tmp_path / "table.md").read_text().count("| resnet10t |") == 1


@pytest.mark.slow
def test_trajectories_are_drawn(tmp_path):
    quick("trajectory.run", tmp_path)
    assert len(list(tmp_path.glob("imbalance-*.png"))) == len(list(tmp_path.glob("gradients-*.csv"))) == 3
    pictures = {path.name for path in tmp_path.glob("trajectory-*.png")}
    assert pictures == {f"trajectory-{width}.png" for width in (1.0, 0.75, 0.5, 0.25)}
    with (tmp_path / "digits.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        assert 0 < float(row["variance"]) <= 1 + 1e-6
        assert 0 < float(row["straightness"]) <= 1 + 1e-6
        assert (row["cosine"] == "nan") == (row["width"] == "1.0")
    assert (tmp_path / "table.md").read_text().count("| SimCLR |") == 4


@pytest.mark.slow
def test_alternatives_are_measured(tmp_path):
    quick("alternatives.run", tmp_path)
    found = {path.name.partition("--")[0]: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert set(found) == {"graphs", "symbols", "reads", "ddp"}
    assert all(row["slimify"]["recorded"] and row["slimify"]["right"] for row in found["graphs"])
    assert {row["way"] for row in found["reads"]} > {"extracted"}
    assert "right at half width" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_fine_tuning_is_measured_and_goes_on_where_it_stopped(tmp_path):
    quick("fine_tune", tmp_path)
    rows = list(csv.DictReader((tmp_path / "accuracy.csv").open()))
    assert len(rows) == 5 * 2 * 4  # arms, statistics, widths
    before = (tmp_path / "accuracy.csv").read_bytes()
    quick("fine_tune", tmp_path)
    assert (tmp_path / "accuracy.csv").read_bytes() == before
    assert (tmp_path / "table.md").read_text().count("| 1 |") == 6  # the arms, and one without calibrated statistics


def test_the_hub_benchmark_says_what_timm_loads(tmp_path):
    quick("hub.run", tmp_path)
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("hub--*.json"))
    assert {row["model"]: row["loads"] for row in result["rows"]} == {
        "test_vit": "timm",
        "test_efficientnet": "slimmable",
    }
    assert "`embed_dim`" in (tmp_path / "table.md").read_text()


def test_cascades_are_measured_against_fixed_widths(tmp_path):
    quick("runtime", tmp_path)
    rows = list(csv.DictReader((tmp_path / "accuracy.csv").open()))
    assert [row["choice"] for row in rows].count("fixed") == 4
    assert {row["choice"] for row in rows} == {"fixed", *(f"{how}, {of}" for how in ("probability", "margin")
                                                          for of in ("macs", "accuracy"))}  # fmt: skip
    assert all(0 < float(row["share"]) <= 1.6 for row in rows)  # a cascade may run all four widths
    assert (tmp_path / "table.md").read_text().count("| cascade (") == 12


def test_growth_has_a_row_for_each_size(tmp_path):
    quick("growth", tmp_path)
    rows = json.loads(next(tmp_path.glob("growth--*.json")).read_text())["rows"]
    assert [row["size"] for row in rows] == [1, 2, 1, 1, 16]
    assert all(row["seconds"] > 0 and 1 <= row["parameters"] < 1.1 for row in rows)
    assert sum("step" in row for row in rows) == 3
