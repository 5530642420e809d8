"""The results of a run: a CSV file, the same as a Markdown table, and a plot of accuracy against MACs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from slimmable._errors import CheckpointError
from slimmable._files import write_aside
from slimmable.cli.extras import require


@dataclass(frozen=True)
class Row:
    """What was measured at one width: of the backbone without its head; accuracies on the held-out images in [0, 1]."""

    width: float
    parameters: int
    macs: int
    knn: float
    linear: float
    untrained_knn: float
    untrained_linear: float


def to_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV text, accuracies with four digits.

    >>> print(to_csv([Row(0.5, 1000, 20000, 0.75, 0.8, 0.1, 0.15)]).strip())
    width,parameters,macs,knn,linear,untrained_knn,untrained_linear
    0.5,1000,20000,0.7500,0.8000,0.1000,0.1500
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for row in rows:
        writer.writerow([row.width, row.parameters, row.macs, *(f"{share:.4f}" for share in astuple(row)[3:])])
    return text.getvalue()


def read_report(folder: Path) -> dict[float, Row]:
    """Return the rows of `metrics.csv` in `folder` by width; none if there is no such file.

    Raises: CheckpointError: if it is another file.
    """
    path = folder / "metrics.csv"
    if not path.exists():
        return {}
    try:
        with path.open(newline="") as file:
            cells = list(csv.DictReader(file))
        shares = [name.name for name in fields(Row)][3:]
        rows = [
            Row(float(row["width"]), int(row["parameters"]), int(row["macs"]), *(float(row[name]) for name in shares))
            for row in cells
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not the report of a run ({error})") from error
    return {row.width: row for row in rows}


def to_markdown(rows: Sequence[Row], pixels_knn: float) -> str:
    """Return the rows as a Markdown table with a line on what they mean.

    >>> print(to_markdown([Row(0.5, 1000, 20000, 0.75, 0.8, 0.1, 0.15)], pixels_knn=0.5))
    | width | parameters | MACs | kNN | linear | untrained kNN | untrained linear |
    |---:|---:|---:|---:|---:|---:|---:|
    | 0.5 | 1,000 | 20,000 | 75.0 | 80.0 | 10.0 | 15.0 |
    <BLANKLINE>
    Accuracy on held-out images in %; "untrained" is the same network before training. kNN on raw pixels: 50.0.
    <BLANKLINE>
    """
    lines = [
        "| width | parameters | MACs | kNN | linear | untrained kNN | untrained linear |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        shares = " | ".join(f"{100 * share:.1f}" for share in astuple(row)[3:])
        lines.append(f"| {row.width:g} | {row.parameters:,} | {row.macs:,} | {shares} |")
    note = 'Accuracy on held-out images in %; "untrained" is the same network before training.'
    return "\n".join([*lines, "", f"{note} kNN on raw pixels: {100 * pixels_knn:.1f}.", ""])


def plot(rows: Sequence[Row], pixels_knn: float, title: str, path: Path) -> None:
    """Draw accuracy against MACs, trained and untrained, as a PNG file at `path`."""
    matplotlib = require("matplotlib", "matplotlib")
    figure = require("matplotlib.figure", "matplotlib").Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    macs = [row.macs / 1e6 for row in rows]
    for name, colour, trained, untrained in (
        ("linear probe", "tab:blue", [row.linear for row in rows], [row.untrained_linear for row in rows]),
        ("kNN", "tab:orange", [row.knn for row in rows], [row.untrained_knn for row in rows]),
    ):
        axes.plot(macs, [100 * share for share in trained], "o-", color=colour, label=name)
        axes.plot(macs, [100 * share for share in untrained], "o:", color=colour, alpha=0.6, label=f"{name}, untrained")
    axes.axhline(100 * pixels_knn, color="grey", linestyle="--", linewidth=1, label="kNN on raw pixels")
    for row in rows:
        best = 100 * max(row.knn, row.linear)
        axes.annotate(f"{row.width:g}", (row.macs / 1e6, best), (0, 6), textcoords="offset points", ha="center")
    axes.set_xlabel("million multiply-accumulates per image")
    axes.set_ylabel("accuracy on held-out images (%)")
    axes.set_title(title)
    axes.set_ylim(0, 100)
    axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    with matplotlib.rc_context({"savefig.dpi": 150}):
        write_aside(path, lambda aside: figure.savefig(aside))


def write_report(folder: Path, rows: Sequence[Row], pixels_knn: float, title: str) -> None:
    """Write `metrics.csv`, `metrics.md` and `accuracy.png` into `folder`; each replaces the previous when complete."""
    write_aside(folder / "metrics.csv", lambda path: path.write_text(to_csv(rows)))
    write_aside(folder / "metrics.md", lambda path: path.write_text(to_markdown(rows, pixels_knn)))
    plot(rows, pixels_knn, title, folder / "accuracy.png")
