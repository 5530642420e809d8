"""Write the tables of the sweep, `results/table.md` and `results/gates.md`: families, and exceptions with their cause.

python -m benchmarks.timm_zoo.table
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.measuring import markdown
from benchmarks.timm_zoo import records
from benchmarks.timm_zoo.fake import LIMIT

Rows = Sequence[dict[str, str]]
ORACLES = {"extract": 1e-10, "permute": 1e-10, "magnitude": 1e-10, "zero": 1e-10, "fused": 1e-9, "full": 0.0}


def main() -> None:
    fake, real = list(records.read("fake").values()), list(records.read("real").values())
    text = "\n".join([summary(fake, real), "## Families\n", families(fake, real), *exceptions(fake, real)])
    (records.FOLDER / "table.md").write_text(text)
    (records.FOLDER / "gates.md").write_text(gates_page(list(records.read("gates").values())))
    print(text)


def summary(fake: Rows, real: Rows) -> str:
    versions = json.loads((records.FOLDER / "versions.json").read_text())
    ran, tried = good(fake), good(real)
    small = [row for row in ran if float(row["ratio_50"]) <= LIMIT]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"With {named}: {len(ran)} of {len(fake)} models convert and run at widths 1, 0.75, 0.5 and 0.25; "
        f"{len(small)} of them need at most {LIMIT} of the multiply-adds at 0.5 "
        f"(median {median(ran, 'ratio_50', 3)}, at 0.25 {median(ran, 'ratio_25', 3)}). "
        f"A conversion takes {median(ran, 'seconds', 1)} s of processor time in the median. "
        f"All checks with numbers hold for {len([row for row in tried if not broken(row)])} of the {len(real)} models "
        "that were tried with numbers.\n"
    )


def families(fake: Rows, real: Rows) -> str:
    numbers = by_module(real)
    header = ["family", "models", "at 0.5", "largest", "at 0.25", "parameters at 0.5", "seconds", "checked", "worst"]
    lines = []
    for module, rows in sorted(by_module(fake).items()):
        ran, tried = good(rows), good(numbers.get(module, []))
        worst = [float(row[name]) for row in tried for name in ORACLES if row[name]]
        lines.append(
            [
                module,
                len(rows) if len(ran) == len(rows) else f"{len(ran)} of {len(rows)}",
                median(ran, "ratio_50", 3),
                f"{max(float(row['ratio_50']) for row in ran):.3f}" if ran else "",
                median(ran, "ratio_25", 3),
                median(ran, "parameters_50", 3),
                median(ran, "seconds", 1),
                len(tried),
                f"{np.max(worst):.0e}" if worst else "",
            ]
        )
    return markdown(header, lines)


def exceptions(fake: Rows, real: Rows) -> Iterable[str]:
    """Yield the models that need more, that a check fails for, and that fail."""
    dear = sorted(
        (row for row in good(fake) if float(row["ratio_50"]) > LIMIT), key=lambda row: -float(row["ratio_50"])
    )
    lines = [[row["name"], row["ratio_50"], row["cause"] or "", row["pinned"]] for row in dear]
    yield f"## Models that need more than {LIMIT} at 0.5\n"
    yield markdown(["model", "at 0.5", "what costs", "what stays full (units)"], lines)
    yield "## Models for which a check does not hold\n"
    yield markdown(["model", "check"], [[row["name"], broken(row)] for row in good(real) if broken(row)])
    yield "## Models that fail\n"
    yield markdown(["model", "error"], [[row["name"], row["error"][:200]] for row in (*fake, *real) if row["error"]])


def gates_page(rows: Rows) -> str:
    """Say how many models get gates, whether the masks are exact, and what gates can save in each family."""
    ran = good(rows)
    gated = [row for row in ran if int(row["gates"])]
    tried = [row for row in gated if row["masked"]]
    others = [row for row in tried if not float(row["masked"]) <= ORACLES["extract"]]
    exact = [row for row in tried if row not in others]
    worst = {
        name: max((abs(float(row[name])) for row in exact), default=0.0) for name in ("dense", "masked", "counted")
    }
    text = (
        f"{len(gated)} of {len(rows)} models get gates. {len(tried)} were run with numbers. In the dense pass the "
        f"largest difference to the plain model is {worst['dense']:.0e}; between a gated pass with constant masks and "
        f"the network of the open units {worst['masked']:.0e}, and between their multiply-adds {worst['counted']:.0e}, "
        f"but for {', '.join(row['name'] for row in others) or 'none'}.\n"
    )
    header = ["family", "models", "gates, smallest model", "least share", "why groups of the smallest have none"]
    lines = []
    for module, found in sorted(by_module(ran).items()):
        small = min(found, key=lambda row: float(row["parameters"]))
        lines.append([module, len(found), small["gates"], median(found, "least", 2), small["refused"]])
    failed = [[row["name"], row["error"][:200]] for row in rows if row["error"]]
    return "\n".join([text, markdown(header, lines), *([markdown(["model", "error"], failed)] if failed else [])])


def broken(row: dict[str, str]) -> str:
    """Say which checks of a row are above their limit."""
    return ", ".join(
        f"{name} {row[name]}" for name, limit in ORACLES.items() if row.get(name) and not_within(row, name, limit)
    )


def not_within(row: dict[str, str], name: str, limit: float) -> bool:
    return not float(row[name]) <= limit  # also if it is not a number


def good(rows: Rows) -> Rows:
    return [row for row in rows if not row["error"]]


def by_module(rows: Rows) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        found[row["module"]].append(row)
    return found


def median(rows: Rows, column: str, digits: int) -> str:
    return f"{statistics.median(float(row[column]) for row in rows):.{digits}f}" if rows else ""


if __name__ == "__main__":
    main()
