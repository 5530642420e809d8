"""Several ONNX programs, one per width, as one with an input that chooses: weights stand once, at full size."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from slimmable.errors import UsageError, require

SELECTOR = "width"


def tidy(model: Any) -> None:
    """Drop what a program of `onnx_ir` computes twice, and nothing else: what its weights go through must stay."""
    passes = require("onnx_ir.passes.common", "onnxscript", extra="onnx")
    passes.InlinePass()(model)
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
    for model in models:
        tidy(model)
    shared = _Shared(ir)
    names = [each.name for each in models[0].graph.outputs]
    ends = list(zip(*(model.graph.outputs for model in models), strict=True))  # of each output, that of every width
    shapes = [_common_shape(ir, [each.shape for each in same]) for same in ends]
    types = [same[0].type for same in ends]
    branches = [_branch(model.graph, inputs, shared, f"{at}/") for at, model in enumerate(models)]
    place = ir.node("Gather", [shared.integers(range(len(models))), chosen])  # refuses positions that there are not
    place.outputs[0].name = "position"
    rest = branches.pop()
    while branches:
        at = len(branches) - 1
        same = ir.node("Equal", [place.outputs[0], shared.integers(at)])
        same.outputs[0].name = f"is {at}"
        both = {"then_branch": branches.pop(), "else_branch": rest}
        choice = ir.node("If", same.outputs, both, num_outputs=len(names))
        for value, name, shape, kind in zip(choice.outputs, names, shapes, types, strict=True):
            value.name, value.shape, value.type = f"from {at}/{name}", shape, kind
        rest = ir.Graph([], choice.outputs, nodes=[same, choice], name=f"from {at}")
    nodes, outputs = list(rest), list(rest.outputs)
    rest.outputs.clear()
    rest.remove(nodes)
    for value, name in zip(outputs, names, strict=True):
        value.name = name
    opsets = {domain: version for model in models for domain, version in model.opset_imports.items()}
    held = {"initializers": shared.values, "opset_imports": opsets, "name": "all widths"}
    joined = ir.Model(
        ir.Graph([*inputs, chosen], outputs, nodes=[place, *nodes], **held), ir_version=models[0].ir_version
    )
    for name, value in {"widths": list(widths), **about}.items():
        joined.metadata_props[f"slimmable.{name}"] = json.dumps(value)
    return joined


class _Shared:
    """The constants of all branches, each once."""

    def __init__(self, ir: Any) -> None:
        self.ir, self.values = ir, list[Any]()
        self._known = dict[object, Any]()
        self._names = set[str]()

    def constant(self, name: str, tensor: Any) -> Any:
        """Return the value that holds these numbers in this shape, of this or another name."""
        key = tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()
        if key not in self._known:
            while name in self._names:
                name += "'"
            self._names.add(name)
            kind = self.ir.TensorType(tensor.dtype)
            tensor.name = name
            value = self.ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)
            self._known[key] = value
            self.values.append(value)
        return self._known[key]

    def integers(self, numbers: Any) -> Any:
        """Return the value that holds one integer or several."""
        numbers = numbers if isinstance(numbers, int) else list(numbers)
        return self.constant(f"integers {numbers}", self.ir.tensor(numbers, dtype=self.ir.DataType.INT64))


def _branch(graph: Any, inputs: Sequence[Any], shared: _Shared, prefix: str) -> Any:
    """Return the graph of one width as a branch, whose constants are shared and whose other names are its own."""
    ir, initializers = shared.ir, list(graph.initializers.values())
    fixed, first = set(initializers), list[Any]()
    for node in graph:
        if node.op_type == "Constant" or (node.inputs and all(each is None or each in fixed for each in node.inputs)):
            fixed.update(node.outputs)
    inner = [value for node in graph.all_nodes() for value in node.outputs]
    inner += [value for part in graph.subgraphs() if part is not graph for value in part.inputs]
    ends = set(graph.outputs)
    for number, value in enumerate(inner):
        value.name = f"{prefix}{number}"
        if value not in ends:
            value.shape = value.type = None  # which every runtime finds by itself
    for number, node in enumerate(graph.all_nodes()):
        node.name = f"{prefix}{node.op_type} {number}"
        node.metadata_props.clear()
    ir.convenience.replace_all_uses_with(list(graph.inputs), list(inputs), replace_graph_outputs=True)
    whole = ir.DataType.INT64, ir.DataType.BOOL
    for value in initializers:
        constant, own = shared.constant(value.name, value.const_value), None
        for user, place in value.uses():
            if constant.dtype in whole or not constant.shape or fixed.issuperset(user.outputs):
                user.replace_input_with(place, constant)
                continue
            if own is None:
                first.append(ir.node("Reshape", [constant, shared.integers(constant.shape.numpy())]))
                (own,) = first[-1].outputs
                own.name = f"{prefix}{value.name}"
            user.replace_input_with(place, own)
    outputs, nodes = list(graph.outputs), list(graph)
    graph.initializers.clear()
    graph.outputs.clear()
    graph.remove(nodes)
    for at, value in enumerate(outputs):
        if value.producer() is None:  # an input or a constant, which a branch cannot give as it is
            nodes.append(ir.node("Identity", [value]))
            (outputs[at],) = nodes[-1].outputs
            outputs[at].name, outputs[at].shape, outputs[at].type = f"{prefix}{at}", value.shape, value.type
    return ir.Graph([], outputs, nodes=[*first, *nodes], name=prefix)


def _common_shape(ir: Any, shapes: Sequence[Any]) -> Any:
    """Return the shape of an output whose sizes may follow the width; axes that do have no size in it."""
    if any(shape is None or len(shape) != len(shapes[0]) for shape in shapes):
        return None
    return ir.Shape(
        [sizes[0] if len({str(size) for size in sizes}) == 1 else None for sizes in zip(*shapes, strict=True)]
    )
