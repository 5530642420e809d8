"""The reports of several pre-training runs in one table and one plot.

    python -m benchmarks.compare runs/gated-* runs/widths --output runs/compare

The runs must be of the same images, and evaluated by the same probes. In the plot each run has a colour; circles are
dense networks, diamonds gated passes, squares static networks.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from slimmable._atomic import filled_aside
from slimmable.cli.config import PretrainConfig
from slimmable.cli.report import MARKERS, Row, read_rows, title_of
from slimmable.cli.run import read_config
from slimmable.errors import CheckpointError, SlimmableError, UsageError, require

Reports: TypeAlias = "Mapping[str, Sequence[Row]]"


def compare(runs: Sequence[Path], output: Path) -> str:
    """Write `compare.csv`, `compare.md` and `compare.png` into the folder `output`; return the table as Markdown.

    Raises:
        CheckpointError: if a folder holds no run or no report, or the files cannot be written.
        UsageError: if the runs are of different images, or were evaluated by different probes.
    """
    require("matplotlib", "matplotlib")
    folders = list(dict.fromkeys(runs))
    _check_same_images({folder: read_config(folder) for folder in folders})
    short = len({folder.name for folder in folders}) == len(folders)
    reports = {folder.name if short else str(folder): _report(folder) for folder in folders}
    probes = _same_probes(reports)
    table = _markdown(reports, probes)
    with filled_aside(output) as folder:
        _write_csv(reports, probes, folder / "compare.csv")
        (folder / "compare.md").write_text(table)
        _plot(reports, probes, folder / "compare.png")
    return table


def _report(folder: Path) -> list[Row]:
    rows = read_rows(folder)
    if not rows:
        raise CheckpointError(
            f"{folder} has no report yet: let the run end, or make one with: slimmable evaluate {folder}"
        )
    return rows


def _check_same_images(configs: Mapping[Path, PretrainConfig]) -> None:
    """Refuse accuracies on different held-out images."""
    known = {}
    for folder, config in configs.items():
        own = Path(config.data).resolve() if config.data != "digits" else f"{config.num_images} {config.data}"
        known[folder] = f"{own} at {config.image_size} pixels"
    if len(set(known.values())) > 1:
        shown = "; ".join(f"{folder}: {images}" for folder, images in known.items())
        raise UsageError(f"these runs are of different images, so their accuracies do not compare ({shown})")


def _same_probes(reports: Reports) -> list[str]:
    """Return the probes of all reports."""
    known = {run: list(rows[0].shares) for run, rows in reports.items()}
    first = next(iter(known.values()))
    if any(set(probes) != set(first) for probes in known.values()):
        shown = "; ".join(f"{run}: {', '.join(probes)}" for run, probes in known.items())
        raise UsageError(f"these runs were evaluated by different probes ({shown}); evaluate them by the same ones")
    return first


def _markdown(reports: Reports, probes: Sequence[str]) -> str:
    lines = [
        f"| run | network | MACs | {' | '.join(title_of(probe) for probe in probes)} |",
        "|---|---|" + "---:|" * (1 + len(probes)),
    ]
    for run, rows in reports.items():
        for row in rows:
            shares = " | ".join(f"{100 * row.shares[probe]:.1f}" if probe in row.shares else "" for probe in probes)
            lines.append(f"| {run} | {_network(row)} | {row.macs:,} | {shares} |")
    return "\n".join([*lines, "", "Accuracy on held-out images in %.", ""])


def _network(row: Row) -> str:
    return row.network or f"width {row.width:g}"


def _write_csv(reports: Reports, probes: Sequence[str], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "network", "width", "parameters", "macs", *probes])
        for run, rows in reports.items():
            for row in rows:
                shares = [f"{row.shares[probe]:.4f}" if probe in row.shares else "" for probe in probes]
                writer.writerow([run, _network(row), row.width, row.parameters, row.macs, *shares])


def _plot(reports: Reports, probes: Sequence[str], path: Path) -> None:
    """Draw accuracy against MACs, a panel for each probe, a colour for each run and a marker for each kind."""
    size = (4.0 * len(probes) + 2.4, 4.0)
    figure = require("matplotlib.figure", "matplotlib").Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(probes), sharex=True, squeeze=False)[0]
    for axes, probe in zip(panels, probes, strict=True):
        for number, (run, rows) in enumerate(reports.items()):
            for kind in dict.fromkeys(row.kind for row in rows if probe in row.shares):
                own = [row for row in rows if row.kind == kind and probe in row.shares]
                points = [row.macs / 1e6 for row in own], [100 * row.shares[probe] for row in own]
                label = f"{run}, {kind}" if kind else run
                axes.plot(*points, marker=MARKERS.get(kind, "o"), color=f"C{number}", label=label)
        axes.set_xlabel("million multiply-accumulates per image")
        axes.set_ylabel(f"{title_of(probe)}: accuracy on held-out images (%)")
        axes.grid(alpha=0.3)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, format="png", dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Join the reports; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a pre-training run")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder for the files")
    given = parser.parse_args(argv)
    try:
        print(compare(given.runs, given.output))
    except SlimmableError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(f"wrote compare.csv, compare.md and compare.png to {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
