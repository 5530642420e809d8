"""The sweep over exported programs goes on where it was left, and its table says what fails."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.export.run import FIELDS, good, table
from benchmarks.measuring import read_rows

ROOT = Path(__file__).parents[2]


def row(**values):
    sizes = {"batch": "any", "tensor_bytes": "100", "pt2_bytes": "150", "onnx_bytes": "110"}
    found = {"module": "resnet", "model": "test_resnet", "width": "0.25", "pt2_off": "0.0e+00", "onnx_off": "2.0e-07"}
    return dict.fromkeys(FIELDS, "") | sizes | found | values


def quick(out):
    command = [sys.executable, "-m", "benchmarks.export.run", "--quick", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)


def test_what_is_done_is_not_done_again(tmp_path):
    with (tmp_path / "zoo.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerow(row(onnx_bytes="123"))
    quick(tmp_path)
    assert [done["onnx_bytes"] for done in read_rows(tmp_path / "zoo.csv")] == ["123"]
    assert (
        "| resnet | test_resnet | 0.25 | any | 0.0e+00 | 2.0e-07 | 1.50 | 1.23 |  |\n"
        in (tmp_path / "table.md").read_text()
    )


@pytest.mark.slow
def test_a_width_is_written_and_compared(tmp_path):
    quick(tmp_path)
    (done,) = read_rows(tmp_path / "zoo.csv")
    assert (done["module"], done["width"], done["batch"]) == ("resnet", "0.25", "any")
    assert good(done)


def test_table_tells_failures_of_the_plain_model_from_ours():
    failed = row(error="onnx: no such operation", onnx_off="")
    off = row(width="0.5", onnx_off="2.0e-03")
    assert not good(failed)
    assert not good(off)
    alone = table([failed, row(width="timm")])
    alike = table([failed, row(width="timm", error="onnx: no such operation")])
    assert "onnx: no such operation |" in alone
    assert "the plain timm model fails too |" in alike
    assert "1 of 3 widths run in both" in table([failed, off, row(width="0.75"), row(width="timm")])
