"""Where does the time go that a static network does not save? By kind of operation, as torch's profiler counts it.

python -m benchmarks.gating.causes            # about a minute
python -m benchmarks.gating.causes --quick    # a smoke run of seconds
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import slimmable
from benchmarks.gating.speed import WAYS, call, gated
from benchmarks.measuring import markdown, origin, read_results, write_result

HERE = Path(__file__).parent
MODELS = ("resnet18", "resnet50")
BUDGET = 0.5
KINDS = {"convolution": "convolutions", "batch_norm": "BatchNorms", "max_pool2d": "max pooling"}
OTHER = "other"


def seen_in(inference: Callable[[], object]) -> dict[str, float]:
    """Return kind of operation -> ms in one call, by the clock."""
    found = dict.fromkeys((*KINDS.values(), OTHER), 0.0)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        inference()
    for event in seen.key_averages():
        kind = next((kind for part, kind in KINDS.items() if part in event.key), OTHER)
        found[kind] += event.self_cpu_time_total / 1000
    return found


def measure(name: str, size: int, batch: int, round_to: int, repeats: int) -> list[dict[str, object]]:
    """Return one row per treatment of both networks and kind of operation: the medians, with the calls in turn."""
    torch.manual_seed(0)
    dense, model = gated(name, size)
    images = torch.randn(batch, 3, size, size)
    static = slimmable.gating.extract_gated(model, [images[:1]], budget=BUDGET, round_to=round_to, recalibrate=False)
    rows: list[dict[str, object]] = []
    for way in WAYS[:2]:
        calls = [call(each, images, way) for each in (dense, static)]
        rounds = [[seen_in(inference) for inference in calls] for _ in range(repeats + 1)][1:]
        for kind in rounds[0][0]:
            ms = [round(statistics.median(each[number][kind] for each in rounds), 3) for number in (0, 1)]
            rows.append({"way": way, "kind": kind, "dense_ms": ms[0], "static_ms": ms[1]})
    return rows


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    kinds = (*KINDS.values(), OTHER)
    results = read_results(folder)
    lines = []
    for result, way in itertools.product(results, WAYS[:2]):
        ms = {row["kind"]: (row["dense_ms"], row["static_ms"]) for row in result["rows"] if row["way"] == way}
        lines.append((result["name"], way, *("{:.1f} → {:.1f}".format(*ms[kind]) for kind in kinds)))
    sources = sorted({origin(result) for result in results})
    return markdown(("model", "both are", *kinds), lines) + "\n" + "\n".join(sources) + "\n"


def main() -> None:
    """Measure, write one result file per model, and the table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "causes", help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="one small model, few repetitions: a smoke run")
    given = parser.parse_args()
    names, size, batch, round_to, repeats = given.models, 160, 16, 16, 9
    if given.quick:
        names, size, batch, round_to, repeats = ("resnet10t",), 32, 2, 8, 1
    for name in names:
        rows = measure(name, size, batch, round_to, repeats)
        write_result(given.out, name, rows, variant=f"budget{BUDGET}-batch{batch}-image{size}")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
