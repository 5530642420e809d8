"""How well does a latency table predict sub-networks, and does an evolutionary search find better ones than the greedy?

    python -m benchmarks.latency            # ten minutes on a quiet machine; it goes on where it stopped
    python -m benchmarks.latency --quick    # a smoke run

Prediction: a table is measured of each model, at widths from 1 to 1/4, and 20 other random sub-networks are predicted.
They are timed before the table is measured and after it, and the least time counts, since the machine does other work.

Search: a universal network, trained as in `benchmarks.importance.search`, is searched under budgets of multiply-adds in
both ways, with the same number of evaluations on held-out images. The accuracies are of test images.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch

import slimmable
from benchmarks.importance.run import Digits, accuracy, digits
from benchmarks.importance.search import WIDTHS, trained
from benchmarks.measuring import append_rows, interleaved, markdown, origin, read_rows
from slimmable.deploy import LatencyTable
from slimmable.deploy.onnx import save_onnx, to_onnx
from slimmable.training.batchnorm import collect_statistics

HERE = Path(__file__).parent
MODELS = (("resnet18", "torch"), ("vit_tiny_patch16_224", "torch"), ("resnet18", "onnxruntime"))
PREDICTED = ("model", "runtime", "network", "measured_ms", "predicted_ms")
FOUND = ("seed", "budget", "search", "evaluations", "share", "held_out", "accuracy")
SIZE, NETWORKS, BUDGETS = 64, 20, (0.5, 0.2)


def predicted(name: str, runtime: str, networks: int) -> Iterator[dict[str, object]]:
    """Yield the measured and the predicted time of random sub-networks that the table has not seen."""
    torch.manual_seed(0)
    size = {"img_size": SIZE} if name.startswith("vit") else {}
    example = torch.zeros(1, 3, SIZE, SIZE)
    plain = timm.create_model(name, num_classes=10, **size).eval()
    model = slimmable.slimify(plain, (1.0, 0.25), example_inputs=example, universal=True)
    plan, draw = slimmable.plan(model), random.Random(1)
    bounds = [*zip(plan.columns[-1].counts, plan.channels.units, strict=True)]
    chosen = [plan.near(tuple(draw.randint(*each) for each in bounds)).counts for _ in range(networks)]
    runs: list[Any] = [slimmable.extract(model, counts) for counts in chosen]
    if runtime == "onnxruntime":
        with torch.no_grad():
            programs = [torch.export.export(network, (example,)) for network in runs]
        with tempfile.TemporaryDirectory() as folder:
            runs = [save_onnx(to_onnx(program), Path(folder, f"{at}.onnx")) for at, program in enumerate(programs)]
    calls = {str(at): (lambda run=run: run(example)) for at, run in enumerate(runs)}
    with torch.no_grad():
        before = interleaved(calls, 10, 20)
        table = LatencyTable.measure(model, example, runtime)
        after = interleaved(calls, 10, 20)
    for at, counts in zip(calls, chosen, strict=True):
        ms = min(before[at].cpu + after[at].cpu)
        found = {"measured_ms": f"{ms:.4f}", "predicted_ms": f"{table.predict(plan, counts):.4f}"}
        yield {"model": name, "runtime": runtime, "network": at, **found}


def evolved(model: Any, evaluate: Any, budget: float, tries: int, calibrate: Any) -> tuple[tuple[int, ...], float]:
    """Return counts and score of the best sub-network within a budget of multiply-adds, as Once-for-All searches.

    It is the best of so many: the uniform width, a fifth drawn at random, and mutations and crosses of the best quarter
    so far, each as wide as the budget lets it be (Cai et al. 2020, arXiv 1908.09791, section 3.4).
    """
    plan, draw = slimmable.plan(model), random.Random(0)
    bounds, limit = [*zip(plan.columns[-1].counts, plan.channels.units, strict=True)], budget * plan.columns[0].macs
    rate = max(0.1, 1 / len(bounds))  # of mutations
    best: list[tuple[float, tuple[int, ...], list[float]]] = []  # scores, counts, shares of what groups may keep
    for number in range(tries):
        shares = [draw.random() if number else 1.0 for _ in bounds]
        if number > tries // 5:
            one, other = draw.choices([each for *_, each in best[: max(2, len(best) // 4)]], k=2)
            if draw.random() < 0.5:
                shares = [new if draw.random() < rate else old for old, new in zip(one, shares, strict=True)]
            else:
                shares = [draw.choice(pair) for pair in zip(one, other, strict=True)]
        scale, sub = 2.0, plan.columns[0]
        while sub.macs > limit:
            parts = zip(bounds, (min(1, scale * share) for share in shares), strict=True)
            sub = plan.near(tuple(low + round(part * (most - low)) for (low, most), part in parts))
            scale *= 0.95
        if all(counts != sub.counts for _, counts, _ in best):
            with slimmable.at_width(model, sub.counts):
                collect_statistics(model, calibrate)
                best.append((evaluate(model), sub.counts, shares))
            best.sort(key=lambda each: -each[0])
    return best[0][1], best[0][0]


def searched(seed: int, epochs: int, step: float) -> Iterator[dict[str, object]]:
    """Yield what both searches and the uniform width find within each budget."""
    torch.manual_seed(seed)
    data = digits(seed)
    cut = len(data.train) // 5
    held_out = Digits(data.train, data.train_labels, data.train[:cut], data.train_labels[:cut])
    data.train, data.train_labels = data.train[cut:], data.train_labels[cut:]
    model, evaluations = trained(data, epochs), 0
    plan, batches = slimmable.plan(model, WIDTHS, universal=True), data.batches()

    def evaluate(net: Any) -> float:
        nonlocal evaluations
        evaluations += 1
        return accuracy(net, held_out.test, held_out.test_labels)

    for budget in BUDGETS:
        evaluations = 0
        [greedy] = slimmable.search(model, evaluate, budget, step=step, calibrate=batches[:2], progress=False)
        tries = {"uniform": 1, "greedy": evaluations, "evolution": evaluations}
        for name, count in tries.items():
            counts, score = greedy.counts, greedy.score
            if name != "greedy":
                counts, score = evolved(model, evaluate, budget, count, batches[:2])
            slimmable.calibrate_bn(model, batches, [counts])
            with slimmable.at_width(model, counts):
                percent = accuracy(model, data.test, data.test_labels)
            share = f"{plan.sub_network(counts).macs / plan.columns[0].macs:.3f}"
            found = {"share": share, "held_out": f"{score:.2f}", "accuracy": f"{percent:.2f}"}
            yield {"seed": seed, "budget": budget, "search": name, "evaluations": count, **found}


def tables(folder: Path) -> None:
    """Write the two tables of the documentation."""
    lines, rows = [], read_rows(folder / "prediction.csv")
    for key in dict.fromkeys((row["model"], row["runtime"]) for row in rows):
        own = [row for row in rows if (row["model"], row["runtime"]) == key]
        off = [abs(float(row["predicted_ms"]) / float(row["measured_ms"]) - 1) for row in own]
        times = [float(row["measured_ms"]) for row in own]
        within = f"{sum(each <= 0.1 for each in off)} of {len(off)}"
        found = (f"{100 * statistics.mean(off):.1f}", f"{100 * max(off):.1f}", within)
        lines.append((*key, f"{min(times):.1f} – {max(times):.1f}", *found))
    header = ("model", "runtime", "times, ms", "mean error, %", "largest, %", "within 10 %")
    made = {path.stem: origin(json.loads(path.read_text())) for path in folder.glob("*.json")}
    (folder / "prediction.md").write_text(f"{markdown(header, lines)}\n{made.get('prediction', '')}\n")
    lines, rows = [], read_rows(folder / "search.csv")
    for key in dict.fromkeys((row["budget"], row["search"]) for row in rows):
        own = [row for row in rows if (row["budget"], row["search"]) == key]
        means = [statistics.mean(float(row[name]) for row in own) for name in FOUND[3:]]
        spread = [float(row["accuracy"]) for row in own]
        scores = (f"{means[2]:.1f}", f"{means[3]:.1f} ({min(spread):.1f} – {max(spread):.1f})")
        lines.append((*key, f"{means[0]:.0f}", f"{means[1]:.3f}", *scores))
    header = ("budget", "search", "evaluations", "multiply-adds", "held-out accuracy, %", "test accuracy, %")
    (folder / "search.md").write_text(f"{markdown(header, lines)}\n{made.get('search', '')}\n")


def main() -> None:
    """Measure, search, and write all figures and the tables of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--only", choices=("prediction", "search"))
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="few networks, one epoch: a smoke run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    done = {(row["model"], row["runtime"]) for row in read_rows(given.out / "prediction.csv")}
    models = MODELS if not given.quick else (("test_resnet", "torch"),)
    for name, runtime in models if given.only != "search" else ():
        if (name, runtime) not in done:
            rows = list(predicted(name, runtime, 2 if given.quick else NETWORKS))
            append_rows(given.out / "prediction.csv", PREDICTED, rows)
    seeds = {int(row["seed"]) for row in read_rows(given.out / "search.csv")}
    for seed in range(1 if given.quick else given.seeds) if given.only != "prediction" else ():
        if seed not in seeds:
            rows = list(searched(seed, *((1, 0.75) if given.quick else (given.epochs, 0.25))))
            append_rows(given.out / "search.csv", FOUND, rows)
    tables(given.out)


if __name__ == "__main__":
    main()
