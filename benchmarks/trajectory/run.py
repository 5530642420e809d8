"""Where do the parameters of each width move in a training, and on what kind of loss?

    python -m benchmarks.trajectory.run            # three trainings, some minutes
    python -m benchmarks.trajectory.run --quick    # a smoke run of seconds

A small slimmable network learns scikit-learn's handwritten digits: with labels, and by SimCLR without and with the
three techniques of SlimCLR (slow start, distillation, re-weighting). Of each width the parameters that it uses are kept
every few steps; the loss is drawn in the plane of their first two principal directions.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

import slimmable
from benchmarks.diagnostics.plot import plot_imbalance
from benchmarks.importance.run import digits, write
from benchmarks.measuring import markdown, origin
from benchmarks.trajectory.plane import Map, Plane, draw, map_of, plane_of
from benchmarks.trajectory.training import WAYS, WIDTHS, Run, Way, train, view
from slimmable.training import GradientDiagnostics

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
Row = dict[str, Any]


def loss_of_network(way: Way, views: tuple[Tensor, Tensor], labels: Tensor, network: nn.Module) -> Tensor:
    return way.loss(network, views, labels)[0]


@torch.no_grad()
def loss_at(network: nn.Module, parameters: Tensor, loss: Callable[[nn.Module], Tensor]) -> float:
    vector_to_parameters(parameters, network.parameters())
    return loss(network).item()


def mean_of(diagnostics: GradientDiagnostics, column: str) -> float:
    """Return the mean of a column over the second half of the training, when all widths run everywhere."""
    values = [row.get(column, math.nan) for row in diagnostics.rows if 2 * row["step"] >= diagnostics.step]
    return sum(values) / len(values)


def measure(run: Run, width: float, loss: Callable[[nn.Module], Tensor], points: int) -> tuple[Row, Plane, Map]:
    """Return what the path of one width is like, its plane and the loss there."""
    network, snapshots = slimmable.extract(run.model, width).train(), run.snapshots[width]
    plane = plane_of(snapshots)
    found = map_of(plane, network, loss, points)
    row = {
        "width": width,
        "variance": plane.variance,
        "straightness": plane.straightness,
        "start": loss_at(network, snapshots[0], loss),
        "end": loss_at(network, snapshots[-1], loss),
        "least": found.losses.min().item(),
        "cosine": mean_of(run.diagnostics, f"grad_cosine_total/w1.0_w{width}"),
        "rest_ratio": mean_of(run.diagnostics, f"rest_ratio/w{width}"),
    }
    return row, plane, found


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    header = (
        "training",
        "width",
        "variance in the plane",
        "straightness",
        "loss at the start",
        "at the end",
        "least on the map",
        "cosine with 1.0",
        "rest ratio",
    )
    lines = [
        (
            row["training"],
            row["width"],
            f"{100 * row['variance']:.0f} %",
            *(f"{row[name]:.2f}" for name in ("straightness", "start", "end", "least")),
            *("–" if math.isnan(row[name]) else f"{row[name]:.2f}" for name in ("cosine", "rest_ratio")),
        )
        for row in rows
    ]
    return markdown(header, lines)


def main() -> None:
    """Train, draw each width's paths and each training's gradients, and write the numbers and their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=320, help="of each training")
    parser.add_argument("--points", type=int, default=15, help="of the map along each side")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the pictures")
    parser.add_argument("--quick", action="store_true", help="a few steps and places, pictures in --out: a smoke run")
    given = parser.parse_args()
    steps, points, pictures = (4, 3, given.out) if given.quick else (given.steps, given.points, given.images)
    data = digits(0)
    images, labels = data.train, data.train_labels
    torch.manual_seed(1)
    fixed = (view(images[:256]), view(images[:256]))

    runs = {name: train(way, images, labels, steps, max(1, steps // 40)) for name, way in WAYS.items()}
    rows = []
    given.out.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        panels = {}
        for name, way in WAYS.items():
            loss = functools.partial(loss_of_network, way, fixed, labels[:256])
            row, *panels[name] = measure(runs[name], width, loss, points)
            rows.append({"training": name, **row})
        draw(panels, f"width {width}", pictures / f"trajectory-{width}.png")
        print(table(rows[-len(WAYS) :]), flush=True)
    for name, run in runs.items():
        called = name.replace(",", "").replace(" ", "-").lower()
        run.diagnostics.to_csv(given.out / f"gradients-{called}.csv")
        plot_imbalance(run.diagnostics.rows, pictures / f"imbalance-{called}.png", title=name)
    made = write(given.out, "digits", tuple(rows[0]), rows)
    (given.out / "table.md").write_text(f"{table(rows)}\n{origin(made)}\n")


if __name__ == "__main__":
    main()
