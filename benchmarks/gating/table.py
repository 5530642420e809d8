"""The tables and pictures of `benchmarks.gating.run`: means over the seeds with 95 % intervals.

python -m benchmarks.gating.table
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.gating.run import HERE, SETS
from benchmarks.intervals import interval, shown
from benchmarks.measuring import markdown, origin, read_rows

Row = dict[str, str]
PROBES = {"linear": "linear probe", "knn": "kNN", "few": "linear probe, 10 labels of each class"}
NETWORKS = {  # name in the tables -> arm, network
    "dense pass": ("gated", "dense"),
    "gated pass": ("gated", "gated"),
    "gated pass, as trained": ("gated", "gated, as trained"),
    "dense pass, gates without bias": ("no bias", "dense"),
    "gated pass, gates without bias": ("no bias", "gated"),
    "static network": ("gated", "static"),
    "narrow, alone": ("narrow", "dense"),
    "slimmable": ("slimmable", ""),
}
PAIRS = (
    ("dense pass", "vanilla"),
    ("gated pass", "vanilla"),
    ("gated pass", "narrow, alone"),
    ("gated pass", "slimmable"),
    ("gated pass", "gated pass, gates without bias"),
    ("static network", "gated pass"),
    ("static network", "narrow, alone"),
)


def values_of(rows: Iterable[Row], name: str, budget: float, column: str) -> dict[str, float]:
    """Return seed -> value of a network; `vanilla` is the same at all budgets."""
    arm, network = NETWORKS.get(name, ("vanilla", "dense"))
    if arm == "slimmable":
        chosen = [row for row in rows if row["arm"] == arm and row["network"] == str(budget)]
    else:
        own = "" if arm == "vanilla" else str(budget)
        chosen = [r for r in rows if (r["arm"], r["network"], r["budget"]) == (arm, network, own)]
    return {row["seed"]: float(row[column]) for row in chosen}


def budgets_of(rows: Iterable[Row]) -> list[float]:
    """Return the budgets that were run."""
    return sorted({float(row["budget"]) for row in rows if row["budget"]})


def accuracies(rows: Sequence[Row], column: str) -> str:
    """Return the accuracy of each network at each budget."""
    budgets = budgets_of(rows)
    lines = [("vanilla", shown(list(values_of(rows, "vanilla", 1.0, column).values())), *[""] * (len(budgets) - 1))]
    for name in NETWORKS:
        lines.append((name, *(shown(list(values_of(rows, name, budget, column).values())) for budget in budgets)))
    lines = [line for line in lines if any(line[1:])]
    return markdown(("network", *map(str, budgets)), lines)


def differences(rows: Sequence[Row], column: str) -> str:
    """Return what one network has more than another, seed by seed."""
    lines = []
    for name, base in PAIRS:
        cells = []
        for budget in budgets_of(rows):
            ours, theirs = values_of(rows, name, budget, column), values_of(rows, base, budget, column)
            cells.append(shown([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()], sign="+"))
        lines.append((f"{name} minus {base}", *cells))
    return markdown(("", *map(str, budgets_of(rows))), [line for line in lines if any(line[1:])])


def costs(rows: Sequence[Row]) -> str:
    """Return multiply-adds over those of the dense network: mean, and the seed that is farthest from the budget."""
    lines = []
    for name in NETWORKS:
        cells = []
        for budget in budgets_of(rows):
            shares = list(values_of(rows, name, budget, "share").values())
            farthest = max(shares, key=lambda share: abs(share - budget), default=0.0)
            cells.append(f"{fmean(shares):.3f} ({farthest:.3f})" if shares else "")
        lines.append((name, *cells))
    lines = [line for line in lines if any(line[1:]) and not line[0].startswith("dense")]
    return markdown(("multiply-adds", *map(str, budgets_of(rows))), lines)


def page(rows: Sequence[Row], source: str) -> str:
    """Return all tables as Markdown."""
    seeds = len({row["seed"] for row in rows if row["arm"] == "gated"})
    parts = [f"{seeds} seeds. Multiply-adds over the dense network's, mean over seeds (and farthest seed):", ""]
    parts += [costs(rows), ""]
    for column, name in PROBES.items():
        parts += [f"Accuracy in %, {name}:", "", accuracies(rows, column), "", differences(rows, column), ""]
    return "\n".join([*parts, source, ""])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy over multiply-adds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, 2), list(PROBES.items())[:2], strict=True):
        vanilla = list(values_of(rows, "vanilla", 1.0, column).values())
        if vanilla:
            axes.axhline(fmean(vanilla), color="grey", linewidth=1, label="vanilla, dense")
        for name in (name for name in NETWORKS if "," not in name or name == "narrow, alone"):
            named = {budget: list(values_of(rows, name, budget, column).values()) for budget in budgets_of(rows)}
            found = {budget: values for budget, values in named.items() if values}
            if not found:
                continue
            shares = list(found)
            if name != "dense pass":
                shares = [fmean(values_of(rows, name, budget, "share").values()) for budget in found]
            means, errors = zip(*((fmean(values), interval(values)) for values in found.values()), strict=True)
            style = "--" if name in ("narrow, alone", "slimmable") else "-"
            axes.errorbar(shares, means, errors, linestyle=style, marker="o", markersize=3, capsize=2, label=name)
        axes.set_xlabel("share of multiply-adds (dense pass: budget of its gates)")
        axes.set_ylabel("accuracy (%)")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def plot_channels(activity: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw for each budget and gate which share of its channels opens never, for some images, and always."""
    from matplotlib.figure import Figure

    budgets = sorted({entry["budget"] for entry in activity})
    figure = Figure(figsize=(2.2 * len(budgets), 2.8), layout="constrained")
    for axes, budget in zip(figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0], budgets, strict=True):
        found = [entry["opened"] for entry in activity if entry["budget"] == budget]
        names = list(found[0])
        always, some, never = (
            [fmean(fmean(test(share) for share in each[name]) for each in found) for name in names]
            for test in (lambda x: float(x == 1), lambda x: float(0 < x < 1), lambda x: float(x == 0))
        )
        places = range(len(names))
        axes.bar(places, always, color="tab:blue", label="always open")
        axes.bar(places, some, bottom=always, color="tab:orange", label="for some images")
        both = [a + b for a, b in zip(always, some, strict=True)]
        axes.bar(places, never, bottom=both, color="lightgrey", label="never open")
        axes.set_xticks(places, [name.split(".")[0].removeprefix("layer") for name in names])
        axes.set_xlabel("stage")
        axes.set_title(f"budget {budget}", fontsize=10)
    figure.axes[0].set_ylabel("share of channels")
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Write the tables and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    given = parser.parse_args()
    for data in SETS:
        if rows := read_rows(given.results / f"{data}.csv"):
            source = origin(json.loads((given.results / f"{data}.json").read_text()))
            (given.results / f"{data}.md").write_text(page(rows, source))
            plot(rows, given.images / f"gating-{data}.png")
            opened = (given.results / f"{data}-activity.jsonl").read_text().splitlines()
            plot_channels([json.loads(line) for line in opened], given.images / f"gating-{data}-channels.png")


if __name__ == "__main__":
    main()
