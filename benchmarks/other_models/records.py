"""The result file of the sweep: one JSON record a line, added as soon as it is known; the last one of a name counts."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

import slimmable

FOLDER = Path(__file__).parent / "results"


def read() -> dict[str, dict[str, Any]]:
    """Return the last record of every name."""
    path = FOLDER / "models.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {record["name"]: record for record in records}


def append(record: dict[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "models.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def tidy() -> None:
    """Leave one record a name, in the order of the names."""
    records = read()
    text = "".join(json.dumps(records[name]) + "\n" for name in sorted(records))
    (FOLDER / "models.jsonl").write_text(text)


def note_versions(libraries: dict[str, str]) -> None:
    """Write down what the results were made with, beside them."""
    versions = {
        "slimmable": slimmable.__version__,
        "torch": torch.__version__,
        **libraries,
        "python": platform.python_version(),
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
