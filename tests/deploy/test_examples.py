"""The programs of docs/examples run on an exported file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import slimmable
from slimmable.__main__ import main

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    slim = slimmable.slimify(net.eval(), (1.0, 0.5, 0.25), example_inputs=torch.zeros(2, 3, 16, 16))
    path = tmp_path_factory.mktemp("examples") / "net.onnx"
    slimmable.export(slim, path, example_inputs=torch.zeros(2, 3, 16, 16))
    return path


def test_the_python_example_switches_widths(exported):
    command = [sys.executable, EXAMPLES / "switch_widths.py", exported]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split(":")[0] for line in said] == ["width 1", "width 0.5", "width 0.25"]
    assert all(float(line.split()[2]) > 0 for line in said)


def test_the_cpp_example_switches_widths(exported, tmp_path):
    """Where a compiler is and ONNXRUNTIME, a folder with `include` and `lib`."""
    compiler, runtime = shutil.which("g++"), os.environ.get("ONNXRUNTIME")
    if not compiler or not runtime:
        pytest.skip("needs g++, and the folder of onnxruntime's headers and library in ONNXRUNTIME")
    places = [f"-I{runtime}/include", f"-L{runtime}/lib", f"-Wl,-rpath,{runtime}/lib", "-lonnxruntime"]
    program = tmp_path / "switch_widths"
    subprocess.run([compiler, "-std=c++17", EXAMPLES / "switch_widths.cpp", *places, "-o", program], check=True)
    said = subprocess.run([program, exported], check=True, capture_output=True, text=True).stdout.splitlines()
    assert said[0] == "widths [1.0, 0.5, 0.25]"
    assert {line.split(":")[0] for line in said[1:]} == {"position 0", "position 1", "position 2"}


def test_the_command_writes_all_widths_into_one_file(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    options = ["--widths", "1", "0.5", "--image-size", "32", "--num-classes", "3", "--output", str(tmp_path)]
    formats = ["--format", "onnx", "--format", "pt2", "--format", "safetensors"]
    assert main(["export", "test_resnet", "--all-widths", *options, *formats]) == 0
    names = {"README.md", "all-widths.onnx", "all-widths.pt2", "all-widths.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    session = runtime.InferenceSession(tmp_path / "all-widths.onnx")
    assert [each.name for each in session.get_inputs()] == ["images", "width"]
    card = (tmp_path / "README.md").read_text()
    assert "| all-widths.onnx | all |" in card
    for block in card.split("```python\n")[1:]:
        program = block.split("```")[0]
        subprocess.run(
            [sys.executable, "-c", program], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}
        )


def test_one_width_and_all_are_not_asked_together(tmp_path, capsys):
    options = ["--all-widths", "--width", "0.5", "--output", str(tmp_path / "out")]
    assert main(["export", "test_resnet", *options]) == 2
    assert "each say what to write; give one of them" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
