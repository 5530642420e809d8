"""What do gradient diagnostics cost a training that samples every 50th step?

    python -m benchmarks.diagnostics.run            # all models, about 5 minutes
    python -m benchmarks.diagnostics.run --quick    # a smoke run of seconds

A step of `SlimRecipe` at four widths with `GradientDiagnostics`, sampled and not sampled, over the same step without.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import slimmable
from benchmarks.measuring import compare, interleaved, markdown, origin, read_results, write_result
from benchmarks.training_step.run import DIMENSION, MODELS, WIDTHS
from slimmable.losses import nt_xent
from slimmable.training import GradientDiagnostics

HERE = Path(__file__).parent
EVERY = 50
GOAL = 0.05  # of the time of a step


def step_of(model: nn.Module, batch: int, size: int, every: int | None) -> Callable[[], None]:
    """Return one step of all widths, the update left out; with diagnostics unless `every` is None."""
    optimizer = torch.optim.SGD(model.parameters())
    recipe = slimmable.SlimRecipe(model)
    diagnostics = None if every is None else GradientDiagnostics(model, every)
    if diagnostics is not None:
        diagnostics.step = 1
    views = (torch.randn(batch, 3, size, size), torch.randn(batch, 3, size, size))

    def step() -> None:
        optimizer.zero_grad()
        for width in recipe.widths(1.0):
            recipe.loss(nt_xent(*map(model, views))).backward()
            if diagnostics is not None:
                diagnostics.after_backward(width)
        if diagnostics is not None:
            diagnostics.after_step()

    return step


def measure(name: str, seconds: float, batch: int, size: int, least: int) -> list[dict[str, Any]]:
    """Return a row for a sampled step and one for another."""
    sized = {"img_size": size} if name.startswith("vit") else {}
    plain = timm.create_model(name, num_classes=DIMENSION, **sized).train()
    model = slimmable.slimify(plain, WIDTHS, example_inputs=torch.zeros(2, 3, size, size))
    ways = {"without": None, "sampled": 1, "not sampled": sys.maxsize}
    times = interleaved({way: step_of(model, batch, size, every) for way, every in ways.items()}, seconds, least)
    rows = []
    for way in ("sampled", "not sampled"):
        rows.append({"way": way, "batch": batch, "image_size": size, **compare(times[way], times["without"])})
        print(f"{name} {rows[-1]}", flush=True)
    return rows


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    header = (
        "model",
        "2 views of batch x image",
        "step, CPU ms",
        "a sampled step",
        "95 %",
        "another step",
        "95 %",
        f"cost, one in {EVERY} sampled",
    )
    results = read_results(folder)
    lines = []
    for result in results:
        sampled, other = result["rows"]
        cost = (sampled["ratio"] - 1) / EVERY
        lines.append(
            (
                result["name"],
                f"{sampled['batch']} x {sampled['image_size']}",
                f"{sampled['baseline_cpu_ms']:.0f}",
                *(text for row in (sampled, other) for text in _ratio(row)),
                f"{100 * cost:.2f} %" + (" (missed)" if cost > GOAL else ""),
            )
        )
    sources = sorted({origin(result) for result in results})
    return markdown(header, lines) + "\n" + "\n".join([f"Goal: at most {100 * GOAL:.0f} %.", *sources]) + "\n"


def _ratio(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['ratio']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}"


def main() -> None:
    """Measure, write one result file per model, and the table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names")
    parser.add_argument("--batch-size", type=int, default=16, help="images per view")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=60, help="time per model")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="one small model, few repetitions: a smoke run")
    given = parser.parse_args()
    names, seconds, batch, size, least = given.models, given.seconds, given.batch_size, given.image_size, 6
    if given.quick:
        names, seconds, batch, size, least = ("resnet10t",), 0, 2, 32, 3
    torch.manual_seed(0)
    for name in names:
        rows = measure(name, seconds, batch, size, least)
        write_result(given.out, name, rows, variant=f"batch{batch}-image{size}")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
