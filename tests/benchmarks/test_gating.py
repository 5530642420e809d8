"""The evidence on gating: runs are not repeated, networks cost what they say, tables say what the rows hold."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gating import run, table

ROOT = Path(__file__).parents[2]


def quick(out, *arms):
    command = [sys.executable, "-m", "benchmarks.gating.run", "--quick", "--out", str(out), "--budgets", "0.4"]
    return subprocess.run(
        [*command, "--arms", *arms], cwd=ROOT, check=True, capture_output=True, text=True, timeout=300
    ).stdout


@pytest.mark.slow
def test_rows_and_tables(tmp_path):
    quick(tmp_path, "vanilla", "narrow")
    before = (tmp_path / "digits.csv").read_text()
    said = quick(tmp_path, *run.ARMS)
    assert (tmp_path / "digits.csv").read_text().startswith(before)
    assert "vanilla" not in said
    rows = list(csv.DictReader((tmp_path / "digits.csv").open()))
    found = {(row["arm"], row["network"]): row for row in rows}
    assert len(found) == len(rows) == 2 + 2 * 4 + 6
    for arm, network in (("gated", "gated"), ("gated", "static"), ("narrow", "dense"), ("slimmable", "0.4")):
        assert float(found[arm, network]["share"]) == pytest.approx(0.4, abs=0.05)
    text = table.page(rows, "")
    less = float(found["gated", "gated"]["linear"]) - float(found["narrow", "dense"]["linear"])
    assert f"| gated pass minus narrow, alone |  |  |  | {less:+.1f} |  |" in text
    (entry,) = [json.loads(line) for line in (tmp_path / "digits-activity.jsonl").read_text().splitlines()]
    assert [len(opened) for opened in entry["opened"].values()] == list(run.PLANES)
    table.plot(rows, tmp_path / "digits.png")
    table.plot_channels([entry], tmp_path / "channels.png")
    assert (tmp_path / "digits.png").stat().st_size > 1000
