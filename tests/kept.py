"""What tests keep in a file of what small models of timm gave when somebody last looked at it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm

MADE_WITH = "1.0.31"


def kept(path: Path, name: str) -> Any:
    """Return what the file keeps of a model; skip the test with a timm of another version, whose models may differ."""
    if timm.__version__ != MADE_WITH:
        pytest.skip(f"{path.name} is of the models of timm {MADE_WITH}")
    return json.loads(path.read_text())[name]


def keep(path: Path, found: Mapping[str, Any]) -> None:
    """Write the file anew, with a line for each model."""
    lines = (f"{json.dumps(name)}: {json.dumps(summary)}" for name, summary in found.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
