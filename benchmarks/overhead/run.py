"""What does a slimmable network cost over a plain one? Forward and training step, full and narrow widths.

    python -m benchmarks.overhead.run            # all models, about 12 minutes on a quiet machine
    python -m benchmarks.overhead.run --quick    # a smoke run of seconds

At width 1.0 the baseline is the plain timm model, at a narrow width the plain network that `slimmable.extract` gives.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import slimmable
from benchmarks.measuring import compare, interleaved, markdown, origin, read_results, write_result

HERE = Path(__file__).parent
MODELS = ("resnet18", "resnet50", "vit_tiny_patch16_224")
WIDTHS = (1.0, 0.5, 0.25)
BATCHES = (1, 16)
IMAGE_SIZE = 224
GOALS = {1.0: 1.02, 0.5: 1.05, 0.25: 1.05}


def forward(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Inference: eval mode, no gradients."""
    model.eval()

    def call() -> object:
        with torch.no_grad():
            return model(images)

    return call


def train(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Training: gradients cleared, forward in train mode, backward of a scalar; the optimizer's update is left out."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters())

    def call() -> None:
        optimizer.zero_grad()
        model(images).square().mean().backward()

    return call


def measure(name: str, batch: int, size: int, seconds: float, least: int) -> list[dict[str, Any]]:
    """Return one row per width and pass."""
    sized = {"img_size": size} if name.startswith("vit") else {}
    plain = timm.create_model(name, **sized)
    converted = slimmable.slimify(plain, WIDTHS, example_inputs=torch.zeros(2, 3, size, size))
    inputs = torch.randn(batch, 3, size, size)
    rows = []
    for width in WIDTHS:
        slimmable.set_width(converted, width)
        baseline = plain if width == 1.0 else slimmable.extract(converted, width)
        again = copy.deepcopy(baseline)
        for kind in (forward, train):
            models = {"baseline": baseline, "slimmable": converted, "again": again}
            times = interleaved({key: kind(model, inputs) for key, model in models.items()}, seconds, least)
            for model in models.values():
                model.zero_grad()
            found = compare(times["slimmable"], times["baseline"])
            row = {"batch": batch, "image_size": size, "width": width, "pass": kind.__name__, **found}
            row |= {"noise": compare(times["again"], times["baseline"])["ratio"], "goal": GOALS[width]}
            print(f"{name} {row}", flush=True)
            rows.append(row)
    return rows


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    header = (
        "model",
        "threads",
        "batch",
        "image",
        "pass",
        "width",
        "plain, CPU ms",
        "slimmable / plain",
        "95 %",
        "goal",
        "noise",
    )
    results = read_results(folder)
    lines = [
        (
            result["name"],
            result["machine"]["threads"],
            row["batch"],
            row["image_size"],
            row["pass"],
            row["width"],
            f"{row['baseline_cpu_ms']:.1f}",
            f"{row['ratio']:.3f}" + ("" if row["ratio"] <= row["goal"] else " (missed)"),
            f"{row['low']:.3f} – {row['high']:.3f}",
            row["goal"],
            f"{row['noise']:.3f}",
        )
        for result in results
        for row in result["rows"]
    ]
    sources = sorted({origin(result) for result in results})
    return markdown(header, lines) + "\n" + "\n".join(sources) + "\n"


def main() -> None:
    """Measure, write one result file per model and batch size, and the table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="SIZE", help="images per batch")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE)
    parser.add_argument("--seconds", type=float, default=15, help="time per comparison")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="one small model, few repetitions: a smoke run")
    given = parser.parse_args()
    names, batches, size, seconds, least = given.models, given.batches, given.image_size, given.seconds, 9
    if given.quick:
        names, batches, size, seconds, least = ("resnet10t",), (2,), 32, 0, 3
    torch.manual_seed(0)
    for name, batch in itertools.product(names, batches):
        rows = measure(name, batch, size, seconds, least)
        write_result(given.out, name, rows, variant=f"batch{batch}-image{size}")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
