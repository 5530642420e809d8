"""The model card of exported files: a README.md in the form of the Hugging Face Hub and timm."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import timm
import torch

import slimmable
from slimmable._profile import Row
from slimmable.cli.programs import INPUT
from slimmable.cli.source import Source


@dataclass(frozen=True)
class File:
    """An exported file.

    Attributes:
        name: of the file; its suffix is the format.
        width: of the network in it.
        size: in bytes.
        off: largest difference to the model's outputs, as a share of the largest output.
        any_batch: whether it takes any number of images, or one a call.
    """

    name: str
    width: float
    size: int
    off: float
    any_batch: bool

    @property
    def kind(self) -> str:
        """The format."""
        return self.name.rpartition(".")[2]


def model_card(source: Source, costs: Sequence[Row], files: Sequence[File]) -> str:
    """Return the card as Markdown; the licence is left to who publishes the files."""
    classes = int(getattr(source.model, "num_classes", 0))
    task = "image-classification" if classes else "image-feature-extraction"
    channels, height, width = source.image
    front = [f"pipeline_tag: {task}", "library_name: timm", "# license: to be added by who publishes the files"]
    front += [] if source.base is None else [f"base_model: {source.base}"]
    widths = [f"{file_width:g}" for file_width in dict.fromkeys(file.width for file in files)]
    lines = [
        *("---", "tags:", *(f"- {tag}" for tag in (task, "timm", "slimmable")), *front, "---"),
        *(f"# Model card for {source.name} at width{'s' * (len(widths) > 1)} {', '.join(widths)}", ""),
        "One set of weights runs at several widths: at width 0.5 every layer uses half of its channels. The files here",
        "hold single widths, as small as these are.",
        *("", "## Model Details"),
        f"- **Model Type:** {f'Image classification, {classes} classes' if classes else 'Feature backbone'}",
        f"- **Image size:** {height} x {width}, {channels} channels, numbers {source.values}",
        f"- **Weights:** {source.weights}",
        f"- **Made with:** slimmable {slimmable.__version__}, timm {timm.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        *("", "## Model Stats", "", *_costs(source, costs)),
        *("", "## Files", "", *_files(files)),
        *("", "## Model Usage", *_usage(source, files)),
    ]
    return "\n".join(lines) + "\n"


def _costs(source: Source, costs: Sequence[Row]) -> Iterator[str]:
    """One line per width, also of those that are not in a file; accuracies where they were measured."""
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
    yield "MACs: multiply-adds of convolutions and matrix products for one image. Activations: their outputs."
    if measured:
        yield "kNN and linear probe: accuracy of classifiers on the features, on held-out images."


def _files(files: Sequence[File]) -> Iterator[str]:
    yield "| file | width | bytes | off by | images a call |"
    yield "|---|---:|---:|---:|---|"
    for file in files:
        images = "any" if file.any_batch else "one"
        yield f"| {file.name} | {file.width:g} | {file.size:,} | {file.off:.1e} | {images} |"
    yield ""
    yield "Off by: largest difference to the outputs of the model that was exported, as a share of the largest output,"
    yield "in float32, on random images."


def _usage(source: Source, files: Sequence[File]) -> Iterator[str]:
    """Python for one file of each format."""
    shape = ", ".join(map(str, (1, *source.image)))
    first = {file.kind: file for file in reversed(files)}
    if "pt2" in first:
        yield from ("", "With torch alone:", "", "```python", "import torch", "")
        yield f'program = torch.export.load("{first["pt2"].name}").module()'
        yield from (f"output = program(torch.rand({shape}))", "```")
    if "onnx" in first:
        yield from ("", "In onnxruntime:", "", "```python", "import numpy", "import onnxruntime", "")
        yield f'session = onnxruntime.InferenceSession("{first["onnx"].name}")'
        yield f'(output,) = session.run(None, {{"{INPUT}": numpy.zeros(({shape}), numpy.float32)}})'
        yield "```"
    if "safetensors" in first:
        file = first["safetensors"]
        yield from ("", "As a model of timm, to train on:", "", "```python", "import slimmable", "import torch")
        yield from ("from safetensors.torch import load_file", *source.recipe)
        yield f"small = slimmable.extract(slim, {file.width})"
        yield from (f'small.load_state_dict(load_file("{file.name}"))', "```")
