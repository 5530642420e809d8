"""A user's script keeps the static types of its model: type checkers know its attributes after a conversion."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed")

SCRIPT = """
import torch
from torch import nn

import slimmable


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.classes = 10


net = Net()
slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 8))
small = slimmable.extract(slim, 0.5)
loaded = slimmable.load("model.safetensors", model=net)
anything = slimmable.load("model.safetensors")
for model in (slim, small, loaded):
    reveal_type(model)
reveal_type(anything)
reveal_type(slim.classes)
reveal_type(small.body)
slimmable.slimify("resnet18")
slimmable.extract(slim)
slim.classes + "ten"
"""


def test_a_model_keeps_its_type_and_wrong_calls_are_reported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", "--no-error-summary"]
    checked = subprocess.run(
        [*command, f"--cache-dir={tmp_path}", str(script)], cwd=root, capture_output=True, text=True, check=False
    )
    number = {line: count for count, line in enumerate(SCRIPT.splitlines(), 1)}
    found = {}
    for line in checked.stdout.splitlines():
        _, at, text = line.split(":", 2)
        found.setdefault(int(at), []).append(text.strip())
    expected = {
        "    reveal_type(model)": 'Revealed type is "script.Net"',
        "reveal_type(anything)": 'Revealed type is "torch.nn.modules.module.Module"',
        "reveal_type(slim.classes)": 'Revealed type is "int"',
        "reveal_type(small.body)": 'Revealed type is "torch.nn.modules.linear.Linear"',
        'slimmable.slimify("resnet18")': '"slimify" cannot be "str"',
        "slimmable.extract(slim)": 'Missing positional argument "width"',
        'slim.classes + "ten"': "Unsupported operand types",
    }
    assert set(found) == {number[line] for line in expected}, checked.stdout + checked.stderr
    for line, text in expected.items():
        assert any(text in report.replace("builtins.", "") for report in found[number[line]]), (line, found)
