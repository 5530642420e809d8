"""`slimmable export`: widths of a model as files for other programs, checked against it, with a model card."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
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
    text = Path(__file__).with_name("card.md.jinja").read_text()
    template = jinja2.Template(text, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    classes = int(getattr(source.model, "num_classes", 0))
    made_by = source.name
    if source.arguments is not None:
        given = (f'"{source.name}"', *(f"{key}={value!r}" for key, value in source.arguments.items()))
        made_by = f"timm.create_model({', '.join(given)})"
    card: str = template.render(
        source=source,
        costs=costs,
        files=files,
        classes=classes,
        task="image-classification" if classes else "image-feature-extraction",
        widths=[f"{width:g}" for width in dict.fromkeys(file.width for file in files)],
        made_by=made_by,
        slimmable=slimmable,
        timm=timm,
        torch=torch,
        python=platform.python_version(),
        measured=all(
            row.width in source.accuracy and {"knn", "linear"} <= set(source.accuracy[row.width].shares)
            for row in costs
        ),
        example={Path(file.name).suffix[1:]: file.name for file in reversed(files)},  # one file of each format
        shape=", ".join(map(str, (1, *source.image))),
        input=programs.INPUT,
    )
    return card
