"""The result files of the sweep: one line a model, appended as soon as it is known; the last line of a name counts."""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch

import slimmable

FOLDER = Path(__file__).parent / "results"
COLUMNS = {
    "fake": ("name", "module", "parameters", "macs", "ratio_50", "ratio_25", "parameters_50", "pinned", "seconds",
             "commit", "error", "cause"),
    "real": ("name", "module", "parameters", "input", "full", "extract", "permute", "magnitude", "zero", "fused",
             "seconds", "commit", "error"),
    "gates": ("name", "module", "parameters", "gates", "units", "least", "refused", "dense", "masked", "counted",
              "seconds", "commit", "error"),
}  # fmt: skip


def path_of(stage: str) -> Path:
    return FOLDER / f"{stage}.csv"


def read(stage: str) -> dict[str, dict[str, str]]:
    """Return the last line of every name."""
    if not path_of(stage).exists():
        return {}
    with path_of(stage).open(newline="") as file:
        rows = [{column: row.get(column) or "" for column in COLUMNS[stage]} for row in csv.DictReader(file)]
    return {row["name"]: row for row in rows}


def append(stage: str, row: dict[str, Any]) -> None:
    """Add one line, and the header to a new file."""
    FOLDER.mkdir(exist_ok=True)
    new = not path_of(stage).exists()
    with path_of(stage).open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS[stage], restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def tidy(stage: str) -> None:
    """Leave one line a name, in the order of the names."""
    rows = read(stage)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS[stage], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    path_of(stage).write_text(text.getvalue())


def note_versions() -> None:
    """Write down what the results were made with, beside them."""
    FOLDER.mkdir(exist_ok=True)
    versions = {
        "slimmable": slimmable.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


def commit() -> str:
    """Return the short name of the commit that is checked out, with a "+" if files differ from it."""
    where = Path(__file__).parent
    name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True).stdout
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "../../slimmable"], cwd=where).returncode
    return name.strip() + ("+" if changed else "")
