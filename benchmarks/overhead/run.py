"""What does a slimmable network cost over a plain one? Forward and training step, full and narrow widths.

    python -m benchmarks.overhead.run            # all models, about 12 minutes
    python -m benchmarks.overhead.run --quick    # a smoke run of seconds

At width 1.0 the baseline is the plain timm model, at a narrow width the plain network that `slimmable.extract` gives.
"""

from __future__ import annotations

import argparse
import copy
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
IMAGES = ((1, 224), (16, 224))
"""Batch size and image size."""
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


def measure(name: str, seconds: float, images: tuple[tuple[int, int], ...], least: int) -> list[dict[str, Any]]:
    """Return one row per batch, width and pass."""
    rows = []
    for batch, size in images:
        sized = {"img_size": size} if name.startswith("vit") else {}
        plain = timm.create_model(name, **sized)
        converted = slimmable.slimify(plain, WIDTHS, example_inputs=torch.zeros(2, 3, size, size))
        inputs = torch.randn(batch, 3, size, size)
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
    header = ("model", "batch", "image", "pass", "width", "plain, CPU ms", "slimmable / plain", "95 %", "goal", "noise")
    results = read_results(folder)
    lines = [
        (
            result["name"],
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
    """Measure, write one result file per model, and the table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names")
    parser.add_argument("--seconds", type=float, default=15, help="time per comparison")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="one small model, few repetitions: a smoke run")
    given = parser.parse_args()
    names, seconds, images, least = given.models, given.seconds, IMAGES, 9
    if given.quick:
        names, seconds, images, least = ("resnet10t",), 0, ((2, 32),), 3
    torch.manual_seed(0)
    for name in names:
        write_result(given.out, name, measure(name, seconds, images, least))
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
