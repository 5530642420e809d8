"""`slimmable export`: widths of a model as files for other programs, checked against it, with a model card."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

import slimmable
from slimmable._atomic import fill_aside
from slimmable._convert import extract
from slimmable._profile import Row, profile
from slimmable._widths import width_index
from slimmable.cli import programs
from slimmable.cli.extras import require
from slimmable.cli.source import Source
from slimmable.errors import SlimmableError
from slimmable.files.model import load, save


@dataclass(frozen=True)
class File:
    """An exported file with the network of one width."""

    name: str  # its suffix is the format
    width: float
    size: int  # in bytes
    off: float  # largest difference from the model's outputs, relative to the largest output
    any_batch: bool  # whether it takes any number of images, or only one per call


def export(source: Source, widths: Sequence[float], formats: Sequence[str] | None, output: Path) -> list[File]:
    """Write `source` at `widths` into the folder `output`, checking each file, with a model card; all or nothing.

    The formats are "pt2", "onnx" and "safetensors"; by default pt2, and onnx if it is installed.

    Raises: SlimmableError: if the model cannot be written in a format, or a file's outputs differ from the model's.
    """
    chosen = [source.widths[width_index(width, source.widths)] for width in dict.fromkeys(widths)]
    if formats is None:
        formats = ("pt2", "onnx") if importlib.util.find_spec("onnxscript") else ("pt2",)
    for package in programs.ONNX_PACKAGES if "onnx" in formats else ():
        require(package, package, extra="onnx")
    files: list[File] = []

    def write(folder: Path) -> None:
        for width in chosen:
            files.extend(_write(source, width, tuple(dict.fromkeys(formats)), folder))
        costs = profile(source.model, example_inputs=torch.zeros(1, *source.image), repeats=0)
        (folder / "README.md").write_text(model_card(source, costs.rows, files))

    fill_aside(output, write)
    return files


def _write(source: Source, width: float, formats: Sequence[str], folder: Path) -> list[File]:
    """Write one width in each format."""
    model = extract(source.model, width).eval()
    images = torch.rand(3, *source.image, generator=torch.Generator().manual_seed(0))
    program = programs.trace(model, images[:2]) if {"pt2", "onnx"} & set(formats) else None
    files = []
    for kind in formats:
        path = folder / f"width-{width}.{kind}"
        any_batch = True
        if program is None or kind == "safetensors":
            save(model, path, arguments=source.arguments)
            written: programs.Program = load(path)
        else:
            written = (programs.save_pt2 if kind == "pt2" else programs.save_onnx)(program, path)
            any_batch = programs.takes_any_batch(program)
        off = programs.difference(model, written, images[:1], *([images] if any_batch else []))
        if not off <= programs.TOLERANCE:
            raise SlimmableError(
                f"{path.name} differs from the model by {off:.1e} of the largest output "
                f"(allowed: {programs.TOLERANCE:g}); no file was written"
            )
        size = sum(part.stat().st_size for part in folder.glob(f"{path.name}*"))
        files.append(File(path.name, width, size, off, any_batch))
    return files


def model_card(source: Source, costs: Sequence[Row], files: Sequence[File]) -> str:
    """Return the model card as Markdown; whoever publishes the files must add the licence."""
    classes = int(getattr(source.model, "num_classes", 0))
    task = "image-classification" if classes else "image-feature-extraction"
    channels, height, width = source.image
    front = [f"pipeline_tag: {task}", "library_name: timm", "# license: add yours before publishing"]
    front += [] if source.base is None else [f"base_model: {source.base}"]
    made_by = source.name
    if source.arguments is not None:
        given = (f'"{source.name}"', *(f"{key}={value!r}" for key, value in source.arguments.items()))
        made_by = f"timm.create_model({', '.join(given)})"
    widths = [f"{file_width:g}" for file_width in dict.fromkeys(file.width for file in files)]
    lines = [
        *("---", "tags:", *(f"- {tag}" for tag in (task, "timm", "slimmable")), *front, "---"),
        *(f"# Model card for {source.name} at width{'s' * (len(widths) > 1)} {', '.join(widths)}", ""),
        "One set of weights runs at several widths: at width 0.5 every layer uses half of its channels. The files here",
        "hold one width each, with only the weights of that width.",
        *("", "## Model Details"),
        f"- **Model Type:** {f'Image classification, {classes} classes' if classes else 'Feature backbone'}",
        f"- **Image size:** {height} x {width}, {channels} channels, values {source.values}",
        f"- **Full network:** `{made_by}`",
        f"- **Weights:** {source.weights}",
        f"- **Made with:** slimmable {slimmable.__version__}, timm {timm.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        *("", "## Model Stats", "", *_costs(source, costs)),
        *("", "## Files", "", *_files(files)),
        *("", "## Model Usage", *_usage(source, files)),
    ]
    return "\n".join(lines) + "\n"


def _costs(source: Source, costs: Sequence[Row]) -> Iterator[str]:
    """Yield a table of all widths, including those not exported, with accuracies if they were measured."""
    reports = [source.accuracy[row.width].shares for row in costs if row.width in source.accuracy]
    measured = len(reports) == len(costs) and all({"knn", "linear"} <= set(shares) for shares in reports)
    yield "| width | parameters | MACs | activations |" + (" kNN, % | linear probe, % |" if measured else "")
    yield "|---:|---:|---:|---:|" + ("---:|---:|" if measured else "")
    for row in costs:
        line = f"| {row.width:g} | {row.parameters:,} | {row.macs:,} | {row.activations:,} |"
        if measured:
            shares = source.accuracy[row.width].shares
            line += f" {100 * shares['knn']:.1f} | {100 * shares['linear']:.1f} |"
        yield line
    yield ""
    yield "MACs: multiply-adds of convolutions and matrix products for one image. Activations: numbers they output."
    if measured:
        yield "kNN and linear probe: accuracy of classifiers on the features of held-out images."


def _files(files: Sequence[File]) -> Iterator[str]:
    yield "| file | width | bytes | off by | images per call |"
    yield "|---|---:|---:|---:|---|"
    for file in files:
        images = "any" if file.any_batch else "one"
        yield f"| {file.name} | {file.width:g} | {file.size:,} | {file.off:.1e} | {images} |"
    yield ""
    yield "Off by: largest difference from the outputs of the exported model, relative to the largest output, in"
    yield "float32, on random images."


def _usage(source: Source, files: Sequence[File]) -> Iterator[str]:
    """Yield Python examples for one file of each format."""
    shape = ", ".join(map(str, (1, *source.image)))
    names = {Path(file.name).suffix: file.name for file in reversed(files)}
    if ".pt2" in names:
        yield from ("", "With torch alone:", "", "```python", "import torch", "")
        yield f'program = torch.export.load("{names[".pt2"]}").module()'
        yield from (f"output = program(torch.rand({shape}))", "```")
    if ".onnx" in names:
        yield from ("", "In onnxruntime:", "", "```python", "import numpy", "import onnxruntime", "")
        yield f'session = onnxruntime.InferenceSession("{names[".onnx"]}")'
        yield f'(output,) = session.run(None, {{"{programs.INPUT}": numpy.zeros(({shape}), numpy.float32)}})'
        yield "```"
    if ".safetensors" in names:
        yield from ("", "As a timm model, for further training:", "", "```python", "import slimmable", "")
        yield from (f'small = slimmable.load("{names[".safetensors"]}")', "```")
