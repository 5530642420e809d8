"""One width as a program for `torch.export.load` or an ONNX runtime, checked against the model after it is written."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from slimmable._inputs import Inputs, example_of, named_tensors, output_tensors, tensors
from slimmable.errors import SlimmableError, explained, require

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-5  # of the largest output
Program = Callable[..., Any]
Names = tuple[Sequence[str], Sequence[str]]  # of inputs and outputs


def batch_of(model: nn.Module, example_inputs: Any, size: int) -> Inputs:
    """Return `size` of the examples, in turn. A batch axis is a first one as long as that of the first tensor."""
    example = example_of(model, example_inputs)
    length = next((len(tensor) for tensor in tensors(example) if tensor.ndim), 0)

    def resized(tensor: Tensor) -> Tensor:
        return tensor[torch.arange(size) % length] if tensor.ndim and len(tensor) == length else tensor

    args, kwargs = tree_map_only(Tensor, resized, example) if length else example
    return Inputs(*args, **kwargs)


def trace(model: nn.Module, example_inputs: Any) -> ExportedProgram:
    """Return `model`, in evaluation mode, as a program for any number of examples like these, or else for one."""
    one, two = (batch_of(model, example_inputs, size) for size in (1, 2))
    shapes, batch = ShapesCollection(), Dim("batch")  # type: ignore[no-untyped-call]
    for single, pair in zip(tensors((one.args, one.kwargs)), tensors((two.args, two.kwargs)), strict=True):
        if single.shape != pair.shape:
            shapes[pair] = {0: batch}
    with torch.no_grad(), quiet(), explained(f"torch.export cannot follow the forward of {type(model).__name__}"):
        try:
            dynamic = shapes.dynamic_shapes(model, two.args, two.kwargs)  # type: ignore[no-untyped-call]
            program = torch.export.export(model, two.args, two.kwargs, dynamic_shapes=dynamic)
            right = difference(model, program.module(), one) <= TOLERANCE
        except Exception:  # the forward depends on the number of images; torch.export raises many kinds of errors
            right = False
        if not right:
            program = torch.export.export(model, one.args, one.kwargs)
    program.example_inputs = None  # like the stack traces, which name local paths, it would be stored in the file
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def names_of(model: nn.Module, program: ExportedProgram, example_inputs: Any) -> Names:
    """Return the names of a program's inputs and outputs: those of the forward's parameters, and `images` and `output`.

    A model's only input is `images` if it has four axes and no name was given. Several outputs have their names or
    positions: `logits`, `output.0`.
    """
    example = batch_of(model, example_inputs, 1)
    inputs = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]  # others are constants
    if not example.kwargs and [tensor.ndim for tensor in tensors(example.args)] == [4]:
        inputs = ["images"]
    with torch.no_grad():
        found = [name for name, _ in named_tensors(model(*example.args, **example.kwargs))]
    plain = [name if name.isidentifier() and name not in inputs else f"output.{name}".rstrip(".") for name in found]
    return inputs, plain


def save_pt2(program: ExportedProgram, path: Path) -> Program:
    """Write `program` for `torch.export.load`, and return it as loaded from the file."""
    file = io.BytesIO()
    with quiet():
        torch.export.save(program, file)
        path.write_bytes(file.getbuffer())
        return torch.export.load(path).module()


def save_onnx(program: ExportedProgram, path: Path, names: Names | None = None) -> Program:
    """Write `program` as ONNX, and return it as loaded by onnxruntime; weights of 2 GB or more go to `<path>.data`."""
    written = to_onnx(program, names)
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()
    written.save(path)
    return load_onnx(path)


def to_onnx(program: ExportedProgram, names: Names | None = None, optimize: bool = True) -> Any:
    """Return `program` as torch's `ONNXProgram`, whose `model` is one of `onnx_ir`, with these inputs and outputs."""
    inputs, outputs = names or (None, None)
    settings: dict[str, Any] = {"input_names": inputs, "output_names": outputs, "dynamo": True, "verbose": False}
    # without gradients, as in tracing: with them, attention has another memory layout
    with torch.no_grad(), quiet(), explained("torch.onnx cannot translate the model"):
        try:
            return torch.onnx.export(program, (), **settings, optimize=optimize)
        except Exception:  # it supports only one form of attention; decomposed, it is matrix products
            with sdpa_kernel(SDPBackend.MATH):
                return torch.onnx.export(program.run_decompositions(), (), **settings, optimize=optimize)


def load_onnx(path: Path) -> Program:
    """Return an ONNX file as loaded by onnxruntime: a function of the model's inputs that returns a list of outputs."""
    runtime = require("onnxruntime", "onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    with explained("onnxruntime does not load the written program"):
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        arrays = [tensor.detach().numpy() for tensor in tensors((args, kwargs))]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


@torch.no_grad()
def difference(model: nn.Module, program: Program, *batches: Any) -> float:
    """Return the largest difference between the outputs of both, of equal shapes, relative to the model's largest."""
    found = []
    for batch in batches:
        args, kwargs = example_of(model, batch)
        expected = output_tensors(model(*args, **kwargs))
        with explained("the written program does not run"):
            outputs = output_tensors(program(*args, **kwargs))
        if [output.shape for output in outputs] != [output.shape for output in expected]:
            raise SlimmableError(f"the outputs of the written program have shapes other than {type(model).__name__}'s")
        pairs = ((out.double(), got.double()) for out, got in zip(expected, outputs, strict=True))
        found += [(got - out).abs().max() / out.abs().max().clamp(min=1e-12) for out, got in pairs]
    return float(torch.stack(found).max())  # NaN if any is


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and log messages, which are meant for developers of torch."""
    with warnings.catch_warnings(), ExitStack() as after:
        warnings.simplefilter("ignore")
        after.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        yield
