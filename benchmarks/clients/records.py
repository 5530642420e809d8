"""The results: one file per client, and the table of all of them for the docs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.clients.client import STAGES
from benchmarks.measuring import markdown

FOLDER = Path(__file__).parent / "results"
Record = Mapping[str, Any]


def path_of(name: str, folder: Path = FOLDER) -> Path:
    return folder / f"{name.replace('/', '_')}.json"


def write(record: Record, folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path_of(record["name"], folder).write_text(json.dumps(record, indent=1) + "\n")


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def holds(record: Record) -> bool:
    return not record.get("error") and all(record[stage] == "yes" for stage in STAGES)


def table(found: Sequence[Record]) -> str:
    """Return one line for each client."""
    header = ["client", "lines added, removed", "re-indented", *STAGES, "what it still needs, and why"]
    lines = []
    for record in found:
        if record.get("error"):
            lines.append([record["name"], *[""] * (len(header) - 2), record["error"]])
        else:
            changed = f"{record['added']}, {record['removed']}"
            stages = [str(record[stage]).replace("|", "\\|") for stage in STAGES]
            lines.append([record["name"], changed, record["indented"], *stages, record["needs"]])
    return markdown(header, lines)
