"""Draw what `slimmable pretrain --diagnostics` has measured, like Figure 3 of SlimCLR.

python -m benchmarks.diagnostics.plot runs/pretrain/gradients.csv gradients.png
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def plot_imbalance(rows: Sequence[Mapping[str, float]], path: str | Path, title: str = "") -> None:
    """Draw the rows of `GradientDiagnostics` as a PNG file, after SlimCLR (Zhao et al. 2024, Figure 3).

    Left are `rest_ratio` (solid) and `grad_ratio` (dotted) of each narrow width, right its cosine with the full one's.
    """
    widths = [name.removeprefix("rest_ratio/w") for name in (rows[0] if rows else {}) if name.startswith("rest_ratio/")]
    others = {f"{name}{width}" for name in ("grad_ratio/w", "grad_cosine/w1.0_w") for width in widths}
    if not widths or not others <= rows[0].keys():
        raise ValueError(f"plot_imbalance: {len(rows)} rows, not those of GradientDiagnostics of at least two widths")
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    ratios, cosines = figure.subplots(1, 2, sharex=True)
    steps = [row["step"] for row in rows]
    for number, width in enumerate(widths):
        curves = (ratios, "rest_ratio/w", "-"), (ratios, "grad_ratio/w", ":"), (cosines, "grad_cosine/w1.0_w", "-")
        for axes, name, style in curves:
            axes.plot(steps, [row[name + width] for row in rows], style, color=f"C{number}", label=f"width {width}")
    for axes, level in ((ratios, 1), (cosines, 0)):
        axes.axhline(level, color="grey", linewidth=1)
        axes.grid(alpha=0.3)
    ratios.set_yscale("log", base=2)
    ratios.yaxis.set_major_formatter("{x:g}")
    ratios.set(xlabel="step", ylabel="ratio of gradient norms")
    cosines.set(ylim=(-1, 1), xlabel="step", ylabel="cosine with the full width's gradient")
    cosines.legend(loc="lower right", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=150)


def main() -> None:
    """Draw the rows of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="gradients.csv of a run, or of GradientDiagnostics.to_csv")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    given = parser.parse_args()
    with given.rows.open(newline="") as file:
        rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
    plot_imbalance(rows, given.picture)


if __name__ == "__main__":
    main()
