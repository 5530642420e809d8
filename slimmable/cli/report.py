"""What a run tells: its progress, the metrics of its steps, tables of results, and plots."""

import csv
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, TypeAlias

from tqdm import tqdm

from slimmable._atomic import write_aside
from slimmable._tables import csv_text
from slimmable.cli.config import read_text, say
from slimmable.errors import CheckpointError, explained, require

PART = "@"  # between a probe and the part of the labels that it learns from
TITLES = {"knn": "kNN", "linear": "linear", "slimmable": "slimmable probe", "ridge": "ridge"}
TITLES |= {"classifier": "own classifier", "finetuned": "fine-tuned"}
TITLES |= {"published": "linear on crops", "published_top5": "linear on crops, top 5"}
DENSE, GATED, STATIC = "dense", "gated", "static"  # kinds of networks, the first word of a network's name
MARKERS, LINES = {GATED: "D", STATIC: "s"}, {"alone": "--", "cut": ":"}  # of the curves, by the kind of network
Log: TypeAlias = Callable[[int, Mapping[str, float]], object]  # of a step's metrics by names such as train_loss/w0.5
_COLOURS = {"knn": "tab:orange", "linear": "tab:blue", "slimmable": "tab:green", "ridge": "tab:purple", "alone": "k"}


@dataclass(frozen=True)
class Row:
    """Measurements of one network, the backbone without its head; the first row of a report has all kinds of shares."""

    width: float
    parameters: int
    macs: int
    shares: Mapping[str, float] = field(default_factory=dict)  # accuracies in [0, 1] by name, as `title_of` takes it
    network: str = ""  # in a gated run, as in "dense", "gated 0.3", "gated 0.3/w0.5" or "static 0.5"

    @property
    def kind(self) -> str:
        """The kind of the network, a key of `MARKERS`."""
        return re.split("[ /]", self.network)[0]

    @property
    def name(self) -> str:
        """The name of the network, or its width."""
        return self.network or f"{self.width:g}"


def named_at(name: str, width: float) -> str:
    """Return the name of a gated run's network or number at a width: that of the full width is `name` alone."""
    return name if width == 1 else f"{name}/w{width:g}"


def to_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV text, accuracies with four digits."""
    columns = [*(["network"] if rows[0].network else []), "width", "parameters", "macs", *rows[0].shares]
    return csv_text(columns, [vars(row) | {name: f"{share:.4f}" for name, share in row.shares.items()} for row in rows])


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of `metrics.csv` in `folder`, none without a file; raise CheckpointError if it is no report."""
    path, rows = folder / "metrics.csv", []
    with explained(f"{path} is not the report of a run", "; move it away", CheckpointError):
        for cells in _read_table(path):
            network, width = cells.pop("network", ""), float(cells.pop("width"))
            parameters, macs = int(cells.pop("parameters")), int(cells.pop("macs"))
            shares = {name: float(share) for name, share in cells.items() if title_of(name) and share != ""}
            row = Row(width, parameters, macs, shares, network)
            if not all(0 <= share <= 1 for share in (row.width, *shares.values())) or min(row.parameters, row.macs) < 0:
                raise ValueError(f"a width, a count or an accuracy of {row.name} is out of range")
            rows.append(row)
    return rows


def _read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none without a file, and without a last line that a full disk cut short."""
    text = read_text(path, 2**28) if os.path.lexists(path) else ""
    return list(csv.DictReader(text.split("\n")[:-1], strict=True))


def to_markdown(rows: Sequence[Row], pixels_knn: float, images: int) -> str:
    """Return the rows, measured on so many images, as a Markdown table, followed by a line of explanation."""
    first = "network" if rows[0].network else "width"
    lines = []
    for part in dict.fromkeys(name.partition(PART)[2] for name in rows[0].shares):  # a table for each
        names = [name for name in rows[0].shares if name.partition(PART)[2] == part]
        titles = " | ".join(map(title_of, names))
        lines += [f"| {first} | parameters | MACs | {titles} |", "|" + "---:|" * (3 + len(names))]
        for row in rows:
            found = [row.shares.get(name) for name in names]
            cells = ("" if x is None else f"{100 * x:.1f} ± {196 * (x * (1 - x) / images) ** 0.5:.1f}" for x in found)
            lines.append(f"| {row.name} | {row.parameters:,} | {row.macs:,} | {' | '.join(cells)} |")
        lines.append("")
    note = f"Accuracy on {images:,} held-out images in %, ± 95 % for their number."
    return "\n".join([*lines, f"{note} kNN on raw pixels: {100 * pixels_knn:.1f}.", ""])


def plot(rows: Sequence[Row], pixels_knn: float, title: str, path: Path) -> None:
    """Draw accuracy against MACs as a PNG file at `path`, with means and deviations of rows that differ by the seed."""
    figure = require("matplotlib.figure", "matplotlib").Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, kind in product(rows[0].shares, dict.fromkeys(row.kind for row in rows)):
        found: dict[float, list[float]] = {}  # by cost, of each seed
        for row in (row for row in rows if row.kind == kind and name in row.shares and PART not in name):
            found.setdefault(row.macs / 1e6, []).append(100 * row.shares[name])
        colour = _COLOURS.get(kind if kind in LINES else name, "tab:red")
        style = {"color": colour, "marker": MARKERS.get(kind, "o"), "label": title_of(name)}
        style |= {"label": f"{title_of(name)}, {kind}", "linestyle": LINES.get(kind, "-")} if kind else {}
        if found:
            axes.errorbar([*found], [*map(fmean, found.values())], [*map(pstdev, found.values())], capsize=3, **style)
    axes.axhline(100 * pixels_knn, color="grey", linestyle="--", linewidth=1, label="kNN on raw pixels")
    for row in (row for row in rows if row.kind in ("", DENSE, GATED)):  # others are too close together for labels
        axes.annotate(row.name, (row.macs / 1e6, 1), (0, -12), ("data", "axes fraction"), "offset points", ha="center")
    axes.set(xlabel="million multiply-accumulates per image", ylabel="accuracy on held-out images (%)")
    axes.set(title=title, xmargin=0.1, ymargin=0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    write_aside(path, lambda aside: figure.savefig(aside, dpi=150))


def title_of(name: str) -> str:
    """Return the title of an accuracy: "kNN" for "knn", "kNN, 1 % of labels" for "knn@0.01"."""
    probe, _, fraction = name.partition(PART)
    return TITLES[probe] + (f", {100 * float(fraction):g} % of labels" if fraction else "")


def write_report(folder: Path, rows: Sequence[Row], pixels_knn: float, images: int, title: str, *others: Row) -> str:
    """Write `metrics.csv`, `metrics.md` and `accuracy.png`, each replaced only when complete; return the second."""
    table = to_markdown(rows, pixels_knn, images)
    write_aside(folder / "metrics.csv", lambda path: path.write_text(to_csv(rows)))
    write_aside(folder / "metrics.md", lambda path: path.write_text(table))
    plot([*rows, *others], pixels_knn, title, folder / "accuracy.png")
    return table


def csv_log(path: Path, columns: Sequence[str], done: int) -> Log:
    """Return a log in a file with a line for each step; a resumed run keeps the lines of the steps that are done."""
    names = ("step", *columns)
    kept = logged_rows(path, done)
    if kept and tuple(kept[0]) != names:
        raise CheckpointError(f"{path} has columns other than {', '.join(names)}; move it away, then resume")
    write_aside(path, lambda aside: aside.write_text(csv_text(names, kept)))

    def log(step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **{name: f"{value:.6g}" for name, value in values.items()}}
        with explained(f"cannot write {path}", kind=CheckpointError), path.open("a") as file:
            file.write(csv_text(names, [row]).partition("\n")[2])  # the cell of a width that did not run stays empty

    return log


def logged_rows(path: Path, last: int) -> list[dict[str, str]]:
    """Return the rows of a CSV file up to the step `last`, none without a file; refuse incomplete or other rows."""
    with explained(f"{path} cannot be read", "; move it away, then resume", CheckpointError):
        rows = [row for row in _read_table(path) if int(row["step"]) <= last]
        for row in rows:
            [float(cell) for cell in row.values() if cell != ""]  # fails on missing or extra cells, too
        if any(earlier >= later for earlier, later in pairwise([-1, *(int(row["step"]) for row in rows)])):
            raise ValueError("its steps do not ascend")
    return rows


class Progress:
    """Progress of a run: on a terminal a `bar`, closed by a `with` block, and otherwise a line after each epoch."""

    def __init__(self, steps: int, done: int, steps_per_epoch: int, quiet: bool = False) -> None:
        self.steps, self.done, self.steps_per_epoch, self.quiet = steps, done, steps_per_epoch, quiet
        self.since = time.monotonic()  # the start of the epoch
        self.bar: Any = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, disable=quiet or None)

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if not self.quiet:
            say(text) if self.bar.disable else self.bar.write(text)

    def advance(self, losses: dict[float, float]) -> None:
        """Count one step and show its loss at each width."""
        self.done += 1
        shown = "  ".join(f"{width:g}: {loss:.3f}" for width, loss in losses.items())
        self.bar.set_postfix_str(f"loss at {shown}", refresh=False)
        self.bar.update()
        if self.bar.disable and not self.quiet and self.done % self.steps_per_epoch == 0:
            epoch, epochs = self.done // self.steps_per_epoch, self.steps // self.steps_per_epoch
            left, self.since = (time.monotonic() - self.since) * (epochs - epoch), time.monotonic()
            say(f"epoch {epoch}/{epochs}  loss at {shown}  ({left:.0f} s left)")
