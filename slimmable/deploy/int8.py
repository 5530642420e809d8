"""Programs of ONNX that compute in int8: weights with a scale for each output channel, calibrated on batches."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from slimmable._inputs import Arguments, tensors
from slimmable.deploy.onnx import to_onnx
from slimmable.deploy.programs import Names, quiet
from slimmable.errors import explained, require

LARGEST = 0.25  # difference from the model's outputs, relative to the largest, from which int8 has failed
_LAYERS = ("Conv", "Gemm", "MatMul")
_BETWEEN = ("Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool", "AveragePool", "Concat")  # of convolutions


def quantized(program: ExportedProgram, names: Names, batches: Sequence[Arguments]) -> Any:
    """Return `program` in int8, as torch's `ONNXProgram`; the ranges of its activations are those on `batches`.

    Products of two activations, as in attention, stay in float. So does all but the layers where these are mostly
    matrix products: the residual stream, the norms and the softmax of a transformer lose most in int8.
    """
    ir = require("onnx_ir", "onnxscript", extra="onnx")
    tool = require("onnxruntime.quantization", "onnxruntime", extra="onnx")
    with tempfile.TemporaryDirectory() as folder, quiet(), explained("onnxruntime cannot quantize the model"):
        plain, ready, done = (Path(folder, f"{name}.onnx") for name in ("plain", "ready", "done"))
        written = to_onnx(program, names)
        written.save(plain)
        tool.shape_inference.quant_pre_process(plain, ready, skip_symbolic_shape=True)  # folds norms into convolutions
        graph = ir.load(ready).graph
        layers = [node for node in graph if node.op_type in _LAYERS]
        products = [node.name for node in layers if node.inputs[1].const_value is None]
        mostly = sum(node.op_type == "Conv" for node in layers) * 2 > len(layers)
        inputs = [value.name for value in graph.inputs]
        feeds = [dict(zip(inputs, (each.numpy() for each in tensors(batch)), strict=True)) for batch in batches]
        left = iter(feeds)
        reader = type("Reader", (tool.CalibrationDataReader,), {"get_next": lambda _: next(left, None)})()
        kinds = _LAYERS + (_BETWEEN if mostly else ())
        tool.quantize_static(
            ready, done, reader, per_channel=True, op_types_to_quantize=kinds, nodes_to_exclude=products
        )
        written.model = ir.load(done)
        for value in written.model.graph.initializers.values():  # in memory: the file goes
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return written
