"""The tables of `benchmarks.slimclr`: means over the seeds with 95 % intervals.

python -m benchmarks.slimclr.table
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.intervals import interval, shown
from benchmarks.measuring import markdown, origin, read_rows
from benchmarks.slimclr.run import ALONE, GRADIENTS, HERE, SETS, WIDTHS, arms_of

Row = dict[str, str]
PROBES = {"linear": "switchable linear probe", "knn": "kNN", "few": "switchable linear probe, 10 labels of each class"}
NARROW = WIDTHS[1:]


def values_of(rows: Sequence[Row], arm: str, width: float, column: str) -> dict[str, float]:
    """Return seed -> value."""
    return {
        row["seed"]: float(row[column])
        for row in rows
        if row["arm"] == arm and float(row["width"]) == width and row[column]
    }


def accuracies(rows: Sequence[Row], arms: Sequence[str], column: str) -> str:
    header = ("arm", "seeds", *(f"{width:g}" for width in WIDTHS))
    lines = []
    for arm in arms:
        found = [values_of(rows, arm, width, column) for width in WIDTHS]
        lines.append((arm, len(found[0]), *(shown(list(values.values())) for values in found)))
    return markdown(header, lines)


def differences(rows: Sequence[Row], arms: Sequence[str], column: str, base: str) -> str:
    """Return what each arm has more than `base`, seed by seed."""
    header = (f"minus {base}", *(f"{width:g}" for width in WIDTHS))
    lines = []
    for arm in arms:
        cells = []
        for width in WIDTHS:
            ours, theirs = values_of(rows, arm, width, column), values_of(rows, base, width, column)
            cells.append(shown([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()], sign="+"))
        lines.append((arm, *cells))
    return markdown(header, lines)


def probes(rows: Sequence[Row], arm: str) -> str:
    """Return the classifiers side by side for one arm."""
    names = {
        "linear": "switchable probe",
        "slimmable": "slimmable probe",
        "ridge": "ridge classifier per width",
        "knn": "kNN",
    }
    lines = [
        (name, *(shown(list(values_of(rows, arm, width, column).values())) for width in WIDTHS))
        for column, name in names.items()
    ]
    return markdown((f"classifier, arm “{arm}”", *(f"{width:g}" for width in WIDTHS)), lines)


def costs(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """Return what one set of all widths takes to train: of networks that stand alone, the sum over four trainings."""
    lines = []
    base: list[float] = []
    for arm in arms:
        per_width = WIDTHS if arm in ("alone", "two stages") else WIDTHS[:1]
        macs, seconds = (
            [sum(values) for values in zip(*(values_of(rows, arm, w, c).values() for w in per_width), strict=True)]
            for c in ("gmacs", "seconds")
        )
        base = base or macs
        lines.append((arm, f"{fmean(macs):,.0f}", f"{fmean(macs) / fmean(base):.2f}", f"{fmean(seconds):,.0f}"))
    return markdown(("arm", "multiply-adds, billions", "ratio to alone", "processor seconds"), lines)


def gradients(rows: Sequence[Row], arms: Sequence[str]) -> str:
    names = {
        "rest": "rest ratio, mean over layers",
        "rest_total": "rest ratio, all weights",
        "cosine": "cosine with 1.0",
    }
    assert names.keys() == GRADIENTS.keys()
    header = ("arm", *(f"{name}, {width:g}" for name in names.values() for width in (0.5, 0.25)))
    lines = [
        (arm, *(shown(list(values_of(rows, arm, w, column).values()), 2) for column in names for w in (0.5, 0.25)))
        for arm in arms
    ]
    return markdown(header, [line for line in lines if any(line[1:])])


def page(data: str, rows: Sequence[Row], source: str) -> str:
    arms = [arm for arm in arms_of(data) if any(row["arm"] == arm for row in rows)]
    labelled = [arm for arm in arms if arm.startswith("labels")]
    slim = [arm for arm in arms if arm not in labelled]
    parts = [f"### {data}", ""]
    for column, name in PROBES.items():
        parts += [f"Accuracy in %, {name}:", "", accuracies(rows, slim, column), ""]
        parts += [differences(rows, [arm for arm in slim if arm != "alone"], column, "alone"), ""]
    parts += [probes(rows, "all" if "all" in arms_of(data) else "ours"), ""]
    if len(labelled) == 2:
        parts += ["Accuracy in %, switchable linear probe, trained with labels:", ""]
        parts += [accuracies(rows, labelled, "linear"), "", differences(rows, labelled[:1], "linear", labelled[1]), ""]
    parts += ["Cost of the training:", "", costs(rows, slim), ""]
    parts += [gradients(rows, [arm for arm in arms if arm not in ALONE]), "", source, ""]
    return "\n".join(parts)


def plot(data: str, rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy over width of the arms with three seeds or more, if there are any."""
    from matplotlib.figure import Figure

    seeds = {arm: min(len(values_of(rows, arm, width, "linear")) for width in WIDTHS) for arm in arms_of(data)}
    arms = [arm for arm, count in seeds.items() if count >= 3 and not arm.startswith("labels")]
    if not arms:
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (column, name) in zip(figure.subplots(1, 2), list(PROBES.items())[:2], strict=True):
        for arm in arms:
            values = [list(values_of(rows, arm, width, column).values()) for width in WIDTHS]
            style = "--" if arm == "alone" else "-"
            means, errors = [fmean(each) for each in values], [interval(each) for each in values]
            axes.errorbar(WIDTHS, means, errors, linestyle=style, marker="o", markersize=3, capsize=2, label=arm)
        axes.set_xlabel("width")
        axes.set_ylabel("accuracy (%)")
        axes.set_title(f"{data}, {name}", fontsize=10)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Write the tables of all sets and their pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    given = parser.parse_args()
    pages = []
    for data in SETS:
        rows = read_rows(given.results / f"{data}.csv")
        if rows:
            source = origin(json.loads((given.results / f"{data}.json").read_text()))
            pages.append(page(data, rows, source))
            plot(data, rows, given.images / f"slimclr-{data}.png")
    (given.results / "table.md").write_text("\n".join(pages))


if __name__ == "__main__":
    main()
