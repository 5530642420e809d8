"""A small ONNX file with widths, as a device has it: its scores are the images times a number for each width."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

WIDTHS = (1.0, 0.5, 0.25)
SCALES = (5.0, 2.0, 1.0)
MACS = (100, 30, 10)


def write(path: Path, **metadata: object) -> Path:
    onnx = pytest.importorskip("onnx")
    help = onnx.helper
    number = onnx.TensorProto.FLOAT
    nodes = [
        help.make_node("Gather", ["scales", "width"], ["scale"]),
        help.make_node("Mul", ["images", "scale"], ["y"]),
    ]
    scales = onnx.numpy_helper.from_array(np.array(SCALES, np.float32), "scales")
    inputs = [help.make_tensor_value_info("images", number, ["batch", 3]),
              help.make_tensor_value_info("width", onnx.TensorProto.INT64, [])]  # fmt: skip
    graph = help.make_graph(nodes, "all", inputs, [help.make_tensor_value_info("y", number, ["batch", 3])], [scales])
    model = help.make_model(graph, opset_imports=[help.make_opsetid("", 17)], ir_version=8)
    help.set_model_props(model, {f"slimmable.{name}": json.dumps(value) for name, value in metadata.items()})
    onnx.save(model, path)
    return path
