"""Does every width of every family leave for another runtime, as small as it is and with the same outputs?

    python -m benchmarks.export.run                  # the smallest model of each of timm's model modules, for hours
    python -m benchmarks.export.run --models resnet vgg --widths 0.5
    python -m benchmarks.export.run --quick          # a smoke run of seconds

Each width is extracted, written by `torch.export` and as ONNX, loaded again and run: by torch, and by onnxruntime. What
is in `results/zoo.csv` already is not done again. Where a width fails, the plain timm model is tried too, as width
`timm`. The last step writes `results/table.md`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from torch import nn
from torch.export import ExportedProgram

import slimmable
from benchmarks.measuring import append_rows, markdown, read_rows
from slimmable import SlimmableError
from slimmable.deploy.onnx import save_onnx, to_onnx
from slimmable.deploy.programs import TOLERANCE, Program, difference, save_pt2, trace

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WIDTHS = (1.0, 0.75, 0.5, 0.25)
PLAIN = "timm"
FIELDS = (
    *("module", "model", "width", "batch", "tensor_bytes"),
    *("pt2_bytes", "pt2_off", "onnx_bytes", "onnx_off", "seconds", "error"),
)
Row = dict[str, str]


def shaken(model: nn.Module) -> nn.Module:
    """Move vectors and tiny parameters away from zero and one, so that no path is without effect on the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or float(parameter.abs().max()) < 1e-3:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def examine(model: nn.Module, images: torch.Tensor) -> Row:
    """Write `model` in both formats, run what was written, and return sizes and largest relative differences."""
    row = {"tensor_bytes": str(sum(tensor.nbytes for tensor in model.state_dict().values()))}
    errors = []
    try:
        program = trace(model, images[:2])
    except SlimmableError as error:
        return row | {"error": str(error)}
    row["batch"] = "any" if program.range_constraints else "1"
    savers: dict[str, Callable[[ExportedProgram, Path], Program]] = {
        "pt2": save_pt2,
        "onnx": lambda program, path: save_onnx(to_onnx(program), path),
    }
    for kind, save in savers.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"program.{kind}"
            try:
                written = save(program, path)
                row[f"{kind}_bytes"] = str(sum(file.stat().st_size for file in path.parent.iterdir()))
                batches = (images[:1], images) if row["batch"] == "any" else (images[:1],)
                row[f"{kind}_off"] = f"{difference(model, written, *batches):.1e}"
            except Exception as error:
                errors.append(f"{kind}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return row | {"error": "; ".join(errors)}


def good(row: Mapping[str, str]) -> bool:
    """Tell whether both programs run and give the outputs of the model."""
    return not row["error"] and all(float(row[f"{kind}_off"]) <= TOLERANCE for kind in ("pt2", "onnx"))


def rows_of(module: str, name: str, widths: list[float], done: set[str]) -> list[Row]:
    """Return the rows of one model that are not done."""
    torch.manual_seed(0)
    plain = shaken(timm.create_model(name).eval())
    images = torch.randn(3, *plain.pretrained_cfg["input_size"])
    slim = slimmable.slimify(plain, WIDTHS)
    rows = []

    def examined(width: str, model: nn.Module) -> None:
        start = time.perf_counter()
        row = dict.fromkeys(FIELDS, "") | {"module": module, "model": name, "width": width} | examine(model, images)
        rows.append(row | {"seconds": f"{time.perf_counter() - start:.1f}"})
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items() if value), flush=True)

    for width in widths:
        examined(str(width), slimmable.extract(slim, width))
    if PLAIN not in done and not all(map(good, rows)):
        examined(PLAIN, plain)
    return rows


def table(rows: list[Row]) -> str:
    """Return one line per model as Markdown."""
    header = (
        *("module", "model", "widths", "images a call", "pt2 off by", "ONNX off by"),
        *("pt2 / weights at narrowest", "ONNX / weights at narrowest", "what fails"),
    )
    lines = []
    for module, name in sorted({(row["module"], row["model"]) for row in rows}):
        of_model = [row for row in rows if row["model"] == name]
        ours = sorted((row for row in of_model if row["width"] != PLAIN), key=lambda row: -float(row["width"]))
        fails = {row["error"] for row in ours if row["error"]}
        if fails and any(row["width"] == PLAIN and not good(row) for row in of_model):
            fails.add("the plain timm model fails too")
        smallest = ours[-1]
        lines.append(
            (
                *(module, name, " ".join(row["width"] for row in ours), " ".join({row["batch"]: 0 for row in ours})),
                *(max((row[f"{kind}_off"] for row in ours), key=lambda text: float(text or 0)) for kind in KINDS),
                *(_ratio(smallest[f"{kind}_bytes"], smallest["tensor_bytes"]) for kind in KINDS),
                "; ".join(sorted(fails)),
            )
        )
    counted = [row for row in rows if row["width"] != PLAIN]
    passed = sum(map(good, counted))
    return markdown(header, lines) + f"\n{passed} of {len(counted)} widths run in both, within {TOLERANCE:g}.\n"


KINDS = ("pt2", "onnx")


def _ratio(size: str, weights: str) -> str:
    return f"{int(size) / int(weights):.2f}" if size else ""


def main() -> None:
    """Do what is not done, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="MODULE", help="modules of timm (default: all)")
    parser.add_argument("--widths", nargs="+", type=float, default=WIDTHS, metavar="W", help="among 1 0.75 0.5 0.25")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one small model at one width: a smoke run")
    given = parser.parse_args()
    zoo: dict[str, str] = json.loads((ROOT / "tests" / "convert" / "zoo.json").read_text())
    modules, widths = given.models or list(zoo), given.widths
    if given.quick:
        modules, widths = ["resnet"], [0.25]
    path = given.out / "zoo.csv"
    for module in modules:
        done = {row["width"] for row in read_rows(path) if row["module"] == module}
        left = [width for width in widths if str(width) not in done]
        rows = rows_of(module, zoo[module], left, done) if left else []
        if rows:
            append_rows(path, FIELDS, rows)
    (given.out / "table.md").write_text(table(read_rows(path)))


if __name__ == "__main__":
    main()
