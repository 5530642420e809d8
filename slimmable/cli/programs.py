"""Programs: plain models as files that run without their Python classes, by `torch.export` or as ONNX."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimmable._nested import output_tensors
from slimmable.cli.extras import explained, require
from slimmable.errors import SlimmableError

INPUT, OUTPUT = "images", "output"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-5  # of the largest output
Program = Callable[[Tensor], Any]


def trace(model: nn.Module, images: Tensor) -> ExportedProgram:
    """Return `model`, in evaluation mode, as a program for any number of images, or if that is impossible, for one.

    It is traced with `images`, of shape (2, channels, height, width).
    """
    with torch.no_grad(), _quiet(), explained(f"torch.export cannot follow the forward of {type(model).__name__}"):
        try:
            program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
            right = difference(model, program.module(), images[:1]) <= TOLERANCE
        except Exception:  # the forward depends on the number of images; torch.export raises many kinds of errors
            right = False
        if not right:
            program = torch.export.export(model, (images[:1],))
    program.example_inputs = None  # like the stack traces, which name local paths, it would be stored in the file
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def save_pt2(program: ExportedProgram, path: Path) -> Program:
    """Write `program` for `torch.export.load`, and return it as loaded from the file."""
    file = io.BytesIO()
    with _quiet():
        torch.export.save(program, file)
        path.write_bytes(file.getbuffer())
        return torch.export.load(path).module()


def save_onnx(program: ExportedProgram, path: Path) -> Program:
    """Write `program` as ONNX, and return it as loaded by onnxruntime; weights of 2 GB or more go to `<path>.data`."""
    *_, runtime = (require(name, name, extra="onnx") for name in ONNX_PACKAGES)
    # without gradients, as in tracing: with them, attention has another memory layout
    with torch.no_grad(), _quiet(), explained("torch.onnx cannot translate the model"):
        try:
            written = _translate(program)
        except Exception:  # it supports only one form of attention; decomposed, it is matrix products
            with sdpa_kernel(SDPBackend.MATH):
                written = _translate(program.run_decompositions())
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()
    written.save(path)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    with explained("onnxruntime does not load the written program"):
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(array) for array in session.run(None, {INPUT: images.numpy()})]


def _translate(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    names = {"input_names": [INPUT], "output_names": [OUTPUT]}
    written = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
    assert written is not None
    return written


@torch.no_grad()
def difference(model: nn.Module, program: Program, *batches: Tensor) -> float:
    """Return the largest difference between the outputs of both, of equal shapes, relative to the model's largest."""
    found = []
    for images in batches:
        expected = output_tensors(model(images))
        with explained("the written program does not run"):
            outputs = output_tensors(program(images))
        if [output.shape for output in outputs] != [output.shape for output in expected]:
            raise SlimmableError(f"the outputs of the written program have shapes other than {type(model).__name__}'s")
        found += [
            (got - out).abs().max() / out.abs().max().clamp(min=1e-12)
            for out, got in zip(expected, outputs, strict=True)
        ]
    return float(torch.stack(found).max())  # NaN if any is


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and log messages, which are meant for developers of torch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
