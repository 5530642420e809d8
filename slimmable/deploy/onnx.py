"""Several ONNX programs, one per width, as one with an input that chooses: weights stand once, at full size."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from slimmable.errors import UsageError, require

SELECTOR = "width"


def tidy(model: Any) -> None:
    """Drop what a program of `onnx_ir` computes twice; what its weights go through must stay.

    The bias that a convolution lacks is zeros cast to the type of its input: constant, but no runtime sees it.
    """
    ir, passes = (require(name, "onnxscript", extra="onnx") for name in ("onnx_ir", "onnx_ir.passes.common"))
    passes.InlinePass()(model)
    for node in list(model.graph):
        if node.op_type == "CastLike" and node.inputs[1].dtype is not None:
            cast = ir.node("Cast", node.inputs[:1], {"to": node.inputs[1].dtype})
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [cast], node.outputs, cast.outputs)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def join(models: Sequence[Any], widths: Sequence[float], **about: Any) -> Any:
    """Return one `onnx_ir` model of several with the same inputs, one per width, which are taken apart.

    It has one input more, `width`, an int64 scalar: the position in the list of widths in its metadata, which are
    `slimmable.widths` and what else is said `about` them, as JSON. Each program becomes a branch of an `If`. A branch
    cuts its part out of the shared weights by operations on constants, which a runtime carries out once, when it loads
    the file. A whole weight passes through a `Reshape`, so that it too becomes a constant *of the branch*: only these
    does onnxruntime lay out for its fastest convolutions.

    Raises: UsageError: if the model has an input of that name.
    """
    ir = require("onnx_ir", "onnxscript", extra="onnx")
    inputs = [ir.Value(name=each.name, shape=each.shape, type=each.type) for each in models[0].graph.inputs]
    if any(each.name == SELECTOR for each in inputs):
        raise UsageError(f"the model has an input named {SELECTOR!r}, as the one that chooses the width; rename it")
    chosen = ir.Value(name=SELECTOR, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    shared = _Shared(ir)
    ends = [[(each.name, each.shape, each.type) for each in model.graph.outputs] for model in models]
    branches = [_branch(model, inputs, shared, f"{at}/") for at, model in enumerate(models)]
    place = ir.node("Gather", [shared.integers(range(len(models))), chosen])  # refuses positions that there are not
    place.outputs[0].name = "position"
    nodes, outputs = branches.pop()
    while branches:
        same = ir.node("Equal", [place.outputs[0], shared.integers(len(branches) - 1)])
        same.outputs[0].name = f"is {len(branches) - 1}"
        ways = {"then_branch": branches.pop(), "else_branch": (nodes, outputs)}
        graphs = {name: ir.Graph([], own, nodes=of, name=name) for name, (of, own) in ways.items()}
        choice = ir.node("If", same.outputs, graphs, num_outputs=len(outputs))
        nodes, outputs = [same, choice], list(choice.outputs)
        for value, *each in zip(outputs, *ends, strict=True):
            value.name, value.type = f"{each[0][0]} from {len(branches)}", each[0][2]
            value.shape = _common_shape(ir, [shape for _, shape, _ in each])
    for value, (name, *_) in zip(outputs, ends[0], strict=True):
        value.name = name
    opsets = {domain: version for model in models for domain, version in model.opset_imports.items()}
    held = {"initializers": list(shared.values.values()), "opset_imports": opsets, "name": "all widths"}
    graph = ir.Graph([*inputs, chosen], outputs, nodes=[place, *nodes], **held)
    joined = ir.Model(graph, ir_version=models[0].ir_version)
    for name, value in {"widths": list(widths), **about}.items():
        joined.metadata_props[f"slimmable.{name}"] = json.dumps(value)
    return joined


class _Shared:
    """The constants of all branches, each once."""

    def __init__(self, ir: Any) -> None:
        self.ir, self.values, self.names = ir, dict[object, Any](), set[str]()

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
        """Return the value that holds one integer or several."""
        numbers = numbers if isinstance(numbers, int) else list(numbers)
        return self.constant(f"integers {numbers}", self.ir.tensor(numbers, dtype=self.ir.DataType.INT64))


def _branch(model: Any, inputs: Sequence[Any], shared: _Shared, prefix: str) -> tuple[list[Any], list[Any]]:
    """Return the nodes and outputs of one width, whose constants are shared and whose other names are its own."""
    tidy(model)
    ir, graph, first = shared.ir, model.graph, list[Any]()
    initializers = list(graph.initializers.values())
    fixed, ends = set(initializers), set(graph.outputs)
    for node in graph:
        if node.inputs and all(each is None or each in fixed for each in node.inputs):
            fixed.update(node.outputs)
    inner = [value for node in graph.all_nodes() for value in node.outputs]
    inner += [value for part in graph.subgraphs() if part is not graph for value in part.inputs]
    for number, value in enumerate(inner):
        value.name = f"{prefix}{number}"
        if value not in ends:
            value.shape = value.type = None  # which every runtime finds by itself
    for number, node in enumerate(graph.all_nodes()):
        node.name = f"{prefix}{node.op_type} {number}"
        node.metadata_props.clear()
    ir.convenience.replace_all_uses_with(list(graph.inputs), list(inputs), replace_graph_outputs=True)
    for value in initializers:
        constant = shared.constant(value.name, value.const_value)
        users = [(user, place) for user, place in value.uses() if not fixed.issuperset(user.outputs)]
        if users and constant.shape and constant.dtype not in (ir.DataType.INT64, ir.DataType.BOOL):
            first.append(ir.node("Reshape", [constant, shared.integers(constant.shape.numpy())]))
            first[-1].outputs[0].name = f"{prefix}{constant.name}, whole"
            for user, place in users:
                user.replace_input_with(place, first[-1].outputs[0])
        ir.convenience.replace_all_uses_with([value], [constant], replace_graph_outputs=True)
    outputs, nodes = list(graph.outputs), list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    for at, value in enumerate(outputs):
        if value.producer() is None or value in outputs[:at]:  # not the branch's own, or not once
            nodes.append(ir.node("Identity", [value]))
            (outputs[at],) = nodes[-1].outputs
            outputs[at].name, outputs[at].shape, outputs[at].type = f"{prefix}out {at}", value.shape, value.type
    return first + nodes, outputs


def _common_shape(ir: Any, shapes: Sequence[Any]) -> Any:
    """Return the shape of an output whose sizes may follow the width; axes that do have no size in it."""
    axes = zip(*shapes, strict=True)
    return ir.Shape([sizes[0] if len({str(size) for size in sizes}) == 1 else None for sizes in axes])
