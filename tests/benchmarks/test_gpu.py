"""The command for a GPU: here its parts run on the CPU at tiny sizes, as far as they can."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.parts import NEED_GPU, PARTS, WIDTHS, Sizes, difference

ROOT = Path(__file__).parents[2]
COMPARED = {"ms", "baseline_ms", "ratio", "low", "high", "rounds"}
FOUND = {  # part -> number of rows and their figures
    "tests": (1, {"passed", "failed", "skipped"}),
    "step": (4, COMPARED | {"first_s"}),
    "forward": (9, COMPARED),
    "processes": (2, {"difference"}),
    "optimizers": (2, COMPARED | {"difference"}),
    "methods": (6, {"reads"}),
    "training": (4, {"first_loss", "last_loss"}),
    "compiled": (2, COMPARED | {"first_s"}),
}


def rows_of(part):
    torch._dynamo.reset()
    return list(PARTS[part][0](Sizes.tiny("cpu")))


def test_every_part_that_needs_no_gpu_is_tried_here():
    assert FOUND.keys() == PARTS.keys() - set(NEED_GPU)


LONG = ("compiled", "training")


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=pytest.mark.slow if part in LONG else ())
        for part in sorted(FOUND.keys() - {"forward", "methods"})
    ],
)
def test_a_part_gives_its_figures(part):
    rows = rows_of(part)
    count, figures = FOUND[part]
    assert len({row["what"] for row in rows}) == len(rows) == count
    for row in rows:
        assert set(row) == figures | {"what"}
        if "ratio" in row:
            assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row.get("failed", 0) == 0
        assert row.get("difference", 0) < 1e-6
        assert row.get("last_loss", 0) < row.get("first_loss", 1)


def test_inference_is_compared_at_every_width_and_switches_are_timed():
    *compared, switch = rows_of("forward")
    count, figures = FOUND["forward"]
    assert len(compared) == len(WIDTHS) * 2 == count - 1
    assert all(set(row) == figures | {"what"} for row in compared)
    assert switch["what"] == "set_width"
    assert switch["ms"] > 0
    assert switch["modules"] > 50


def test_a_step_of_a_method_reads_one_number():
    """Each more would let the CPU wait for a GPU once more. Labels are checked besides, at every width."""
    reads = {row["what"].split()[2].rstrip(","): row["reads"] for row in rows_of("methods")}
    assert reads.pop("Supervised") == 1 + len(WIDTHS)
    assert reads == dict.fromkeys(("SimCLR", "MoCoV2", "MoCoV3", "BYOL", "VICReg"), 1)


def test_a_difference_is_found():
    ones = [torch.ones(3), torch.ones(2)]
    assert difference(ones, ones, 1e-6) == 0
    for other in (1.1, float("nan")):
        with pytest.raises(RuntimeError, match=r"differs by (1\.0e-01|nan), expected at most 1e-06"):
            difference([torch.ones(3), torch.tensor([1.0, other])], ones, 1e-6)


def python(code):
    return [sys.executable, "-c", code]


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    row = json.dumps({"what": "before the end", "ms": 1})
    broken = {
        "step": python(f"print({row!r}); raise ValueError('wrong at all')"),
        "forward": python(f"import os; print({row!r}, flush=True); os.abort()"),
    }
    command_of = gpu.command_of
    monkeypatch.setattr(gpu, "command_of", lambda part, *options: broken.get(part) or command_of(part, *options))
    options = ["--device", "cpu", "--tiny", "--commit", "abc", "--out", str(tmp_path)]
    assert gpu.main([*options, "--only", "step", "forward", "graphs"]) == 1
    [path] = tmp_path.glob("gpu--cpu-tiny-bfloat16-*.json")
    result = json.loads(path.read_text())
    assert result["commit"] == "abc"
    assert {"command", "versions", "machine", "date"} <= set(result)
    step, forward, graphs = result["rows"]
    assert step["state"] == "failed: ValueError: wrong at all"
    assert forward["state"] == "failed: ended with -6"
    assert step["rows"] == forward["rows"] == [{"what": "before the end", "ms": 1}]
    assert graphs["state"] == "works"
    assert graphs["rows"] == [{"what": "", "note": "needs a GPU"}]
    table = capsys.readouterr().out.split("\n\n", 1)[1]
    assert (tmp_path / "table.md").read_text().strip() == table.strip()
    assert "| step |  | **failed: ValueError: wrong at all** |" in table
    assert "commit abc" in table
    assert gpu.main([*options, "--only", "graphs"]) == 0


def test_an_error_within_a_part_is_told_in_one_line():
    code = (
        "import sys; from benchmarks.gpu import parts; from unittest import mock\n"
        "def broken(sizes):\n    yield {'what': 'first'}\n    raise RuntimeError('one line\\nand another')\n"
        "sys.argv[1:] = ['step', '--device', 'cpu', '--tiny']\n"
        "with mock.patch.dict(parts.PARTS, step=(broken, 1)):\n    sys.exit(parts.main())"
    )
    found = gpu.run_part("step", python(code), 100)
    assert found["state"] == "failed: RuntimeError: one line"
    assert found["rows"] == [{"what": "first"}]
    assert any("Traceback" in line for line in found["errors"])


def test_a_part_that_hangs_is_ended_and_what_it_had_is_kept():
    code = 'import time; print(\'{"what": "first"}\', flush=True); time.sleep(100)'
    found = gpu.run_part("step", python(code), 2)
    assert found["state"] == "cut off after 2 s"
    assert found["rows"] == [{"what": "first"}]
    assert 2 <= found["seconds"] < 30


def test_parts_that_no_longer_fit_are_left_out(tmp_path):
    options = ["--device", "cpu", "--tiny", "--minutes", "0.1", "--out", str(tmp_path)]
    assert gpu.main(options) == 1
    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["part"] for row in rows] == list(PARTS)
    assert {row["state"] for row in rows} == {"left out: the time was up"}


def test_without_a_gpu_the_command_says_so(tmp_path):
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    [line] = told.stdout.splitlines()
    assert line.startswith("There is no CUDA device: nothing was measured.")
    assert not list(tmp_path.iterdir())
