"""`slimmable export`: widths of a model as files that other programs run, each checked against the model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from slimmable._atomic import fill_aside
from slimmable._convert import extract
from slimmable._nested import output_tensors
from slimmable._profile import profile
from slimmable._widths import width_index
from slimmable.cli.card import File, model_card
from slimmable.cli.checkpoint import load_exactly, save_weights
from slimmable.cli.extras import require
from slimmable.cli.programs import (
    ONNX_PACKAGES,
    TOLERANCE,
    Program,
    difference,
    save_onnx,
    save_pt2,
    takes_any_batch,
    trace,
)
from slimmable.cli.source import Source
from slimmable.errors import SlimmableError


def export(source: Source, widths: Sequence[float], formats: Sequence[str] | None, output: Path) -> list[File]:
    """Write `source` at `widths` into the folder `output`, run each file, and add a model card; all of it or nothing.

    Args:
        source: what to export.
        widths: some of those of `source`.
        formats: "pt2", "onnx", "safetensors"; by default pt2, and onnx where it is installed.
        output: made where it does not exist.

    Raises:
        WidthError: if `source` does not have a width.
        MissingPackageError: if a format needs a package that is not installed.
        SlimmableError: if the model cannot be written in a format, or a file gives other outputs than the model.
        CheckpointError: if a file cannot be written.
    """
    chosen = [source.widths[width_index(width, source.widths)] for width in dict.fromkeys(widths)]
    if formats is None:
        formats = ("pt2", "onnx") if importlib.util.find_spec("onnxscript") else ("pt2",)
    for package in ONNX_PACKAGES if "onnx" in formats else ():
        require(package, package, extra="onnx")
    if "safetensors" in formats:
        require("safetensors", "safetensors")
    files: list[File] = []

    def write(folder: Path) -> None:
        again = source.again() if "safetensors" in formats else None
        for width in chosen:
            files.extend(_write(source, width, tuple(dict.fromkeys(formats)), again, folder))
        costs = profile(source.model, example_inputs=source.example()[:1], repeats=0)
        (folder / "README.md").write_text(model_card(source, costs.rows, files))

    fill_aside(output, write)
    return files


def _write(source: Source, width: float, formats: Sequence[str], again: nn.Module | None, folder: Path) -> list[File]:
    """Write one width in each format."""
    model = extract(source.model, width).eval()
    images = torch.rand(3, *source.image, generator=torch.Generator().manual_seed(0))
    program = trace(model, images[:2]) if {"pt2", "onnx"} & set(formats) else None
    files = []
    for kind in formats:
        path = folder / f"width-{width}.{kind}"
        any_batch = True
        if program is not None and kind != "safetensors":
            written = (save_pt2 if kind == "pt2" else save_onnx)(program, path)
            any_batch = takes_any_batch(program)
        else:
            assert again is not None
            save_weights(path, model, model=source.name, width=str(width), widths=" ".join(map(str, source.widths)))
            written = _load_weights(path, extract(again, width))
        off = difference(model, written, images[:1], *([images] if any_batch else []))
        if not off <= TOLERANCE:
            raise SlimmableError(
                f"{path.name} gives other outputs than the model, off by {off:.1e} of the largest "
                f"(allowed: {TOLERANCE:g}); no file was written"
            )
        size = sum(part.stat().st_size for part in folder.glob(f"{path.name}*"))
        files.append(File(path.name, width, size, off, any_batch))
    return files


def _load_weights(path: Path, model: nn.Module) -> Program:
    load_exactly(model, require("safetensors.torch", "safetensors").load_file(path), path.name)
    return lambda images: output_tensors(model(images))
