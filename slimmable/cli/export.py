"""One width of a run as a program that runs without `slimmable`: `torch.export`, and ONNX."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from slimmable._errors import CheckpointError, SlimmableError
from slimmable.cli.extras import require
from slimmable.cli.files import write_aside
from slimmable.cli.run import load_images, read_config, trained_network
from slimmable.convert import extract

_TOLERANCE = 1e-4  # of the largest feature


def export_run(run: Path, width: float, formats: Sequence[str] | None, output: Path) -> list[Path]:
    """Write the backbone of `run` at `width` into `output`, run each file, and return the paths.

    The programs take images of shape (batch, channels, size, size), floats in [0, 1], and give features.

    Raises: WidthError: if the run does not have this width. SlimmableError: if a written program gives other features
    than the model. MissingPackageError: if ONNX is asked for and not installed.
    """
    config = read_config(run)
    channels = load_images(config).channels if config.data is None else 3
    backbone = extract(trained_network(config, run, channels).backbone, width).eval()
    images = torch.rand(2, channels, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    if formats is None:
        formats = ("pt2", "onnx") if importlib.util.find_spec("onnxscript") else ("pt2",)
    writers: dict[str, Callable[[nn.Module, Tensor, Path], None]] = {"pt2": _write_pt2, "onnx": _write_onnx}
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {output} ({error})") from error
    paths = []
    for kind in dict.fromkeys(formats):
        path = output / f"width-{width}.{kind}"
        write_aside(path, partial(writers[kind], backbone, images))
        paths.append(path)
    return paths


def _write_pt2(backbone: nn.Module, images: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(backbone, (images,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    path.write_bytes(file.getbuffer())
    again = torch.export.load(path).module()
    _check_same(backbone, again, images, path)


def _write_onnx(backbone: nn.Module, images: Tensor, path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        require(name, name, extra="onnx")
    runtime = require("onnxruntime", "onnxruntime", extra="onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            backbone,
            (images,),
            path,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    _check_same(backbone, lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]), images, path)


@torch.no_grad()
def _check_same(backbone: nn.Module, program: Callable[[Tensor], Tensor], images: Tensor, path: Path) -> None:
    """Compare the program's features with the model's, also for another batch size than it was traced with."""
    for batch in (images, torch.cat([images, 1 - images, images])[:5]):
        expected = backbone(batch)
        off = float((program(batch) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if not off <= _TOLERANCE:
            raise SlimmableError(
                f"the program for {path.suffix} gives other features than the model (off by {off:.1e})"
            )
