"""Programs: plain models as files that run without their Python classes, by `torch.export` or as ONNX."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimmable._nested import output_tensors
from slimmable.cli.extras import require
from slimmable.errors import SlimmableError

INPUT, OUTPUT = "images", "output"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-5  # of the largest output
Program = Callable[[Tensor], list[Tensor]]


def trace(model: nn.Module, images: Tensor) -> ExportedProgram:
    """Return `model` as a program for any number of images, or if that is impossible, for one.

    Args:
        model: model in evaluation mode that takes one tensor.
        images: two images, of shape (2, channels, height, width).

    Raises: SlimmableError: if `torch.export` cannot follow the forward.
    """
    try:
        with torch.no_grad(), _quiet():
            program = _trace_any_batch(model, images) or torch.export.export(model, (images[:1],))
    except Exception as error:
        raise SlimmableError(
            f"torch.export cannot follow the forward of {type(model).__name__} ({_first_line(error)})"
        ) from error
    _forget_its_making(program)
    return program


def _trace_any_batch(model: nn.Module, images: Tensor) -> ExportedProgram | None:
    """Return the program for any number of images, or None if the forward depends on their number."""
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
        module = program.module()
        right = difference(model, lambda image: output_tensors(module(image)), images[:1]) <= TOLERANCE
    except Exception:  # torch.export raises many kinds of errors
        return None
    return program if right else None


def takes_any_batch(program: ExportedProgram) -> bool:
    """Return whether `program` runs on any number of images."""
    return bool(program.range_constraints)


def save_pt2(program: ExportedProgram, path: Path) -> Program:
    """Write `program` for `torch.export.load`, and return it as loaded from the file."""
    file = io.BytesIO()
    with _quiet():
        torch.export.save(program, file)
        path.write_bytes(file.getbuffer())
        module = torch.export.load(path).module()
    return lambda images: output_tensors(module(images))


def save_onnx(program: ExportedProgram, path: Path) -> Program:
    """Write `program` as ONNX, and return it as loaded by onnxruntime; weights of 2 GB or more go to `<path>.data`.

    Raises:
        MissingPackageError: if one of `ONNX_PACKAGES` is not installed.
        SlimmableError: if ONNX has no counterpart for an operation of the model, or onnxruntime does not support it.
    """
    *_, runtime = (require(name, name, extra="onnx") for name in ONNX_PACKAGES)
    written = _translate(program)
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()
    written.save(path)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own exceptions
        raise SlimmableError(f"onnxruntime does not load the written program ({_first_line(error)})") from error
    return lambda images: [torch.from_numpy(array) for array in session.run(None, {INPUT: images.numpy()})]


def _translate(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    def translate(program: ExportedProgram) -> torch.onnx.ONNXProgram:
        names = {"input_names": [INPUT], "output_names": [OUTPUT]}
        written = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
        assert written is not None
        return written

    try:
        with torch.no_grad(), _quiet():  # as in tracing: with gradients, attention has another memory layout
            try:
                return translate(program)
            except Exception:  # it supports only one form of attention; decomposed, it is matrix products
                with sdpa_kernel(SDPBackend.MATH):
                    return translate(program.run_decompositions())
    except Exception as error:
        raise SlimmableError(f"torch.onnx cannot translate the model ({_first_line(error)})") from error


@torch.no_grad()
def difference(model: nn.Module, program: Program, *batches: Tensor) -> float:
    """Return the largest difference between the outputs of both, relative to the model's largest output.

    Raises: SlimmableError: if the program does not run, or its outputs differ in number or shape.
    """
    found = []
    for images in batches:
        expected = output_tensors(model(images))
        try:
            outputs = program(images)
        except Exception as error:  # torch and onnxruntime have their own exceptions
            raise SlimmableError(f"the written program does not run ({_first_line(error)})") from error
        if [output.shape for output in outputs] != [output.shape for output in expected]:
            raise SlimmableError(f"the outputs of the written program have shapes other than {type(model).__name__}'s")
        found += [
            (got - out).abs().max() / out.abs().max().clamp(min=1e-12)
            for out, got in zip(expected, outputs, strict=True)
        ]
    return float(torch.stack(found).max())  # NaN if any is


def _forget_its_making(program: ExportedProgram) -> None:
    """Drop the example and the stack traces with local paths, which would be stored in the file."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _first_line(error: Exception) -> str:
    """Return the first line of the original cause of `error`."""
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


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
