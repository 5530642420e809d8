"""Programs for an ONNX runtime, in float or int8; those of several widths as one, which has the weights once."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimmable._inputs import Arguments, tensors
from slimmable.deploy.programs import Names, Program, quiet
from slimmable.errors import UsageError, explained, require

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SELECTOR = "width"
LARGEST = 0.25  # difference from the model's outputs, relative to the largest, from which int8 has failed
_BETWEEN = ("Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool", "AveragePool", "Concat")  # of convolutions
_PRODUCTS = ("MatMul", "Gemm")
_LAYERS = ("Conv", *_PRODUCTS)
_INT8 = ("QuantizeLinear", "DequantizeLinear")  # a runtime computes in int8 if their scales are the branch's own


def save_onnx(written: Any, path: Path) -> Program:
    """Write an `ONNXProgram`; return it as loaded by onnxruntime, a function that returns a list of outputs."""
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()
    written.save(path)  # weights of 2 GB or more go to `<path>.data`
    runtime = require("onnxruntime", "onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    with explained("onnxruntime does not load the written program"):
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        arrays = [tensor.detach().numpy() for tensor in tensors((args, kwargs))]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def save_joined(written: Sequence[Any], path: Path, names: Names, macs: Mapping[float, int | None]) -> Program:
    """Write the `ONNXProgram`s of the widths in `macs`, taken apart, as one file; return it, called with a `width`."""
    written[0].model = _join([each.model for each in written], names, {"widths": [*macs], "macs": [*macs.values()]})
    run = save_onnx(written[0], path)
    return lambda *args, width, **kwargs: run(*args, kwargs, torch.tensor([*macs].index(width)))


def to_onnx(program: ExportedProgram, names: Names | None = None, optimize: bool = True) -> Any:
    """Return `program` as torch's `ONNXProgram`, whose `model` is one of `onnx_ir`, with these inputs and outputs."""
    settings: dict[str, Any] = dict(zip(("input_names", "output_names"), names or (), strict=False))
    settings |= {"dynamo": True, "verbose": False, "optimize": optimize}
    # without gradients, as in tracing: with them, attention has another memory layout
    with torch.no_grad(), quiet(), explained("torch.onnx cannot translate the model"):
        try:
            written: Any = torch.onnx.export(program, (), **settings)
        except Exception:  # it supports only one form of attention; decomposed, it is matrix products
            with sdpa_kernel(SDPBackend.MATH):
                written = torch.onnx.export(program.run_decompositions(), (), **settings)
    graph = written.model.graph
    for value in [each for node in graph for each in node.inputs if each is not None]:
        if value.producer() is None and value.graph is None:  # a constant that the optimizer forgot to store
            graph.register_initializer(value)
    return written


def quantized(program: ExportedProgram, names: Names, batches: Sequence[Arguments], known: dict[str, Any]) -> Any:
    """Return `program` in int8, as torch's `ONNXProgram`; the ranges of its activations are those on `batches`.

    Products of two activations, as in attention, stay in float. So does all but the layers where these are mostly
    matrix products: the residual stream, the norms and the softmax of a transformer lose most in int8.

    `known` gets the weights by name: in float, the axis and the scales of their channels, and in int8. Weights that are
    a part of those of a wider program, but for a factor of each channel, are cut out of its integers.
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
        feeds = (dict(zip(inputs, (each.numpy() for each in tensors(batch)), strict=True)) for batch in batches)
        reader = type("Reader", (tool.CalibrationDataReader,), {"get_next": lambda _: next(feeds, None)})()
        settings = {"op_types_to_quantize": _LAYERS + (_BETWEEN if mostly else ()), "nodes_to_exclude": products}
        weights = {name: value.const_value.numpy().copy() for name, value in graph.initializers.items()}
        parts = {name: part for name in known if name in weights and (part := _part(weights[name], *known[name][:3]))}
        given = {"TensorQuantOverrides": {name: scales for name, (_, scales) in parts.items()}}
        tool.quantize_static(ready, done, reader, per_channel=True, extra_options=given, **settings)
        written.model = ir.load(done)
        graph = written.model.graph
        for value in graph.initializers.values():  # in memory: the file goes
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    for node in [node for node in graph if node.op_type == "DequantizeLinear" and "axis" in node.attributes]:
        value, axis = node.inputs[0], node.attributes["axis"].as_int()
        name = value.name.removesuffix("_quantized")
        if name not in weights or value.dtype != ir.DataType.INT8:  # a bias
            continue
        own, scales = (each.const_value.numpy() for each in node.inputs[:2])
        *_, whole = known.setdefault(name, (weights[name], axis, scales, own))
        places, _ = parts.get(name, ([], []))
        if places and np.abs(whole[np.ix_(*places)] - own.astype(int)).max() <= 1:  # by rounding
            value.const_value = ir.tensor(whole, name=value.name)
            for axis, place in enumerate(places):
                at = ir.node("Constant", [], {"value_ints": place})
                cut = ir.node("Gather", [value, *at.outputs], {"axis": axis})
                graph.insert_before(node, [at, cut])
                (value,) = cut.outputs
            node.replace_input_with(0, value)
    return written


def _part(weights: Any, whole: Any, axis: int, scales: Any) -> tuple[list[list[int]], list[dict[str, Any]]] | None:
    """Return where `weights` stand on the first two axes of `whole`, and their scales if the integers are the same.

    The channels, along `axis`, are the first ones of equal blocks, each times a factor; the inputs are any.
    """
    if weights.ndim != whole.ndim or np.greater(weights.shape, whole.shape).any():
        return None
    wide, own = (np.moveaxis(each, axis, 0) for each in (whole, weights))
    wide, own = (each.reshape(*each.shape[:2], -1) for each in (wide, own))
    size, count, bound = len(wide), len(own), 1e-5 * np.abs(own).max()
    for blocks in (n for n in range(1, count + 1) if size % n == count % n == 0):
        rows = np.arange(size).reshape(blocks, -1)[:, : count // blocks].ravel().tolist()
        cut, columns = wide[rows], list[int]()
        square = np.square(cut[:, 0]).sum(1)
        factors = np.divide((cut[:, 0] * own[:, 0]).sum(1), square, out=np.ones_like(square), where=square > 0)
        scaled = cut * factors[:, None, None]
        for column in range(wide.shape[1]):
            at = len(columns)
            if at < own.shape[1] and np.abs(scaled[:, column] - own[:, at]).max() <= bound:
                columns.append(column)
        if len(columns) == own.shape[1] and factors.all():
            places = [columns, rows] if axis else [rows, columns]
            return places, [{"axis": axis, "scale": each, "zero_point": 0} for each in scales[rows] * factors]
    return None


def _tidy(model: Any) -> None:
    """Write a program of `onnx_ir` in its shortest form; what its weights go through must stay."""
    needed = ("onnx_ir.passes.common", "onnxscript.optimizer")
    passes, optimizer = (require(name, "onnxscript", extra="onnx") for name in needed)
    passes.InlinePass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=lambda node: False)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateHashedInitializersPass()(model)  # of any size
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def _join(models: Sequence[Any], names: Names, about: Mapping[str, object]) -> Any:
    """Return one `onnx_ir` model of several with the same inputs, one per width, which are taken apart.

    One more input, `width`, is a position in the list of widths. Each program becomes a branch of an `If`, and cuts its
    part out of the shared weights by operations on constants, which a runtime carries out once, when it loads the file.
    For the weights of matrix products, they stand before the `If`, where onnxruntime frees what it lays out anew. Any
    other whole weight passes through a `Reshape`, so that it too becomes a constant *of the branch*: only these does
    onnxruntime lay out for its fastest convolutions.
    """
    ir = require("onnx_ir", "onnxscript", extra="onnx")
    given = zip(names[0], models[0].graph.inputs, strict=True)  # an output may be an input, which has its name
    inputs = [ir.Value(name=name, shape=each.shape, type=each.type) for name, each in given]
    if SELECTOR in names[0]:
        raise UsageError(f"the model has an input named {SELECTOR!r}, as the one that chooses the width; rename it")
    chosen = ir.Value(name=SELECTOR, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    shared = _Shared(ir)
    ends = [[(each.shape, each.type) for each in model.graph.outputs] for model in models]
    branches = [_branch(model, inputs, shared, f"{at}/") for at, model in enumerate(models)]
    place = ir.node("Gather", [shared.integers([*range(len(models))]), chosen])  # refuses positions that there are not
    place.outputs[0].name = "position"
    nodes, outputs = branches.pop()
    while branches:
        same = ir.node("Equal", [place.outputs[0], shared.integers(len(branches) - 1)])
        same.outputs[0].name = f"is {len(branches) - 1}"
        ways = {"then_branch": branches.pop(), "else_branch": (nodes, outputs)}
        graphs = {name: ir.Graph([], own, nodes=of, name=name) for name, (of, own) in ways.items()}
        choice = ir.node("If", same.outputs, graphs, num_outputs=len(outputs))
        nodes, outputs = [same, choice], list(choice.outputs)
        for value, name, *each in zip(outputs, names[1], *ends, strict=True):
            value.name, value.type = f"{name} from {len(branches)}", each[0][1]
            axes = zip(*(shape for shape, _ in each), strict=True)  # those that follow the width have no size
            value.shape = ir.Shape([sizes[0] if len(set(map(str, sizes))) == 1 else None for sizes in axes])
    for value, name in zip(outputs, names[1], strict=True):
        value.name = name
    opsets = {domain: version for model in models for domain, version in model.opset_imports.items()}
    held = {"initializers": list(shared.values.values()), "opset_imports": opsets, "name": "all widths"}
    graph = ir.Graph([*inputs, chosen], outputs, nodes=[*shared.nodes, place, *nodes], **held)
    joined = ir.Model(graph, ir_version=models[0].ir_version)
    joined.metadata_props.update({f"slimmable.{name}": json.dumps(value) for name, value in about.items()})
    return joined


class _Shared:
    """The constants of all branches, each once, and the nodes that stand before the branches."""

    def __init__(self, ir: Any) -> None:
        self.ir, self.values, self.names, self.nodes = ir, dict[object, Any](), set[str](), list[Any]()

    def constant(self, name: str, tensor: Any) -> Any:
        """Return the value that holds these numbers in this shape, of this or another name."""
        key = tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()
        if key not in self.values:
            while name in self.names:
                name += "'"
            self.names.add(name)
            tensor.name, kind = name, self.ir.TensorType(tensor.dtype)
            self.values[key] = self.ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)
        return self.values[key]

    def integers(self, numbers: Any) -> Any:
        return self.constant(f"integers {numbers}", self.ir.tensor(numbers, dtype=self.ir.DataType.INT64))


def _branch(model: Any, inputs: Sequence[Any], shared: _Shared, prefix: str) -> tuple[list[Any], list[Any]]:
    """Return the nodes and outputs of one width, whose constants are shared and whose other names are its own."""
    _tidy(model)
    ir, graph, first = shared.ir, model.graph, list[Any]()
    initializers = list(graph.initializers.values())
    fixed, ends = set(initializers), set(graph.outputs)
    for node in graph:
        known = all(each is None or each in fixed for each in node.inputs)
        if node.inputs and known and node.op_type not in _INT8:
            fixed.update(node.outputs)
    inner = [value for node in graph.all_nodes() for value in node.outputs]
    inner += [value for part in graph.subgraphs() if part is not graph for value in part.inputs]
    for number, value in enumerate(inner):
        value.name = f"{prefix}{number}"
        if value not in ends:
            value.shape = value.type = None  # which every runtime finds by itself
    for number, node in enumerate(graph.all_nodes()):
        node.name = f"{prefix}{node.op_type} {number}"
    ir.convenience.replace_all_uses_with(list(graph.inputs), list(inputs), replace_graph_outputs=True)
    for value in initializers:
        constant = shared.constant(value.name, value.const_value)
        users = [(of, at) for of, at in value.uses() if not (of.op_type in _PRODUCTS or fixed.issuperset(of.outputs))]
        local = constant.shape or any(user.op_type in _INT8 for user, _ in users)
        if users and local and constant.dtype not in (ir.DataType.INT64, ir.DataType.BOOL):
            first.append(ir.node("Reshape", [constant, shared.integers([*constant.shape.numpy()])]))
            first[-1].outputs[0].name = f"{prefix}{constant.name}, whole"
            for user, place in users:
                user.replace_input_with(place, first[-1].outputs[0])
        ir.convenience.replace_all_uses_with([value], [constant], replace_graph_outputs=True)
    outputs, nodes = list(graph.outputs), list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    before = set[Any]()
    for node in reversed(nodes):
        readers = [user for value in node.outputs for user, _ in value.uses()]
        if fixed.issuperset(node.outputs) and any(user in before or user.op_type in _PRODUCTS for user in readers):
            before.add(node)
    shared.nodes += [node for node in nodes if node in before]
    nodes = [node for node in nodes if node not in before]
    for at, value in enumerate(outputs):
        if value.producer() not in nodes or value in outputs[:at]:  # not the branch's own, or not once
            nodes.append(ir.node("Identity", [value]))
            (outputs[at],) = nodes[-1].outputs
            outputs[at].name, outputs[at].shape, outputs[at].type = f"{prefix}out {at}", value.shape, value.type
    return first + nodes, outputs
