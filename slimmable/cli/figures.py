"""Figures of a training: gradient imbalance and divergence between widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slimmable._atomic import write_aside
from slimmable.cli.extras import require
from slimmable.errors import DataError


def plot_imbalance(rows: Sequence[Mapping[str, float]], path: str | Path, title: str = "") -> None:
    """Draw the rows of `GradientDiagnostics` as a PNG file, after SlimCLR (Zhao et al. 2024, Figure 3).

    Left two ratios over the steps, one colour for each narrow width: solid what the width does not read over what it
    reads (`rest_ratio`), dotted the whole over what it reads (`grad_ratio`). Where the solid line is below 1, a small
    part of the weights has the larger gradient. Right the cosine of each width's own gradient with the full width's.

    Args:
        rows: `GradientDiagnostics.rows`, or rows with these columns.
        path: of the file; it is replaced when the new one is complete.
        title: above the panels.

    Raises: DataError: if there are no rows, or they have no ratios. MissingPackageError: without matplotlib.
        CheckpointError: if the file cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "imbalance.png"
    >>> names = ("grad_ratio/w0.5", "rest_ratio/w0.5", "grad_cosine/w1.0_w0.5")
    >>> plot_imbalance([{"step": step, **dict.fromkeys(names, 0.5)} for step in (0, 50)], path)
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    widths = [name.removeprefix("rest_ratio/w") for name in (rows[0] if rows else {}) if name.startswith("rest_ratio/")]
    if not widths:
        raise DataError(
            f"plot_imbalance: {len(rows)} rows without a column rest_ratio/w...; give the rows of GradientDiagnostics "
            "of a model with two widths or more"
        )
    matplotlib = require("matplotlib", "matplotlib")
    ticker = require("matplotlib.ticker", "matplotlib")
    figure = require("matplotlib.figure", "matplotlib").Figure(figsize=(9.6, 3.6), layout="constrained")
    ratios, cosines = figure.subplots(1, 2, sharex=True)
    steps = [row["step"] for row in rows]
    for number, width in enumerate(widths):
        colour = f"C{number}"
        ratios.plot(steps, [row[f"rest_ratio/w{width}"] for row in rows], color=colour, label=f"width {width}")
        ratios.plot(steps, [row[f"grad_ratio/w{width}"] for row in rows], ":", color=colour)
        cosines.plot(steps, [row[f"grad_cosine/w1.0_w{width}"] for row in rows], color=colour, label=f"width {width}")
    ratios.axhline(1, color="grey", linewidth=1)
    ratios.set_yscale("log")
    ratios.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ratios.yaxis.set_major_formatter("{x:g}")
    ratios.yaxis.set_minor_locator(ticker.NullLocator())
    ratios.set_ylabel("ratio of gradient norms")
    cosines.axhline(0, color="grey", linewidth=1)
    cosines.set_ylim(-1, 1)
    cosines.set_ylabel("cosine with the full width's gradient")
    for axes in (ratios, cosines):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    cosines.legend(loc="lower right", frameon=False)
    figure.suptitle(title)
    with matplotlib.rc_context({"savefig.dpi": 150}):
        write_aside(Path(path), lambda aside: figure.savefig(aside, format="png"))
