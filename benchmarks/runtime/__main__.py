"""Is a cascade over the widths of one network better than any fixed width that costs as much?

    python -m benchmarks.runtime --data FOLDER    # Fashion-MNIST, five seeds; it goes on where it stopped
    python -m benchmarks.runtime --quick          # a smoke run of seconds, on the cluttered digits

FOLDER holds the four files of Fashion-MNIST (on Debian and Ubuntu the package `dataset-fashion-mnist` puts them there).
For each seed, a small network is trained at four widths, without 5,000 of the training images. On these the thresholds
are chosen, for several targets; the test images are looked at once. A fixed width "at the same cost" is a straight line
between the two fixed widths around it: what one gets by drawing one of the two for each image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

import slimmable
from benchmarks.intervals import shown
from benchmarks.measuring import append_rows, markdown, origin, read_results, read_rows
from benchmarks.runtime.training import HELD_OUT, WIDTHS, Data, digits, fashion, plain_network, train
from slimmable.runtime import Cascade, calibrate_cascade

HERE = Path(__file__).parent
TARGETS = (*(("macs", share) for share in (0.15, 0.26, 0.4, 0.57)), *(("accuracy", share) for share in (0.99, 1.0)))
FIELDS = ("seed", "choice", "target", "share", "accuracy", "at_fixed_cost", "widths")
EPOCHS, TRAINED_ON = 4, 30_000


class Recorded:
    """The scores of a network at each width, called like the network, with the numbers of images for the images."""

    def __init__(self, model: nn.Module, images: torch.Tensor) -> None:
        rows = slimmable.profile(model, example_inputs=images[:1], repeats=0).rows
        self.widths, self.macs = WIDTHS, {each.width: each.macs for each in rows}
        with torch.no_grad():
            parts = [slimmable.run_widths(model, batch) for batch in images.split(500)]
        self.scores = {width: torch.cat([part[width] for part in parts]).numpy() for width in WIDTHS}

    def __call__(self, numbers: np.ndarray, width: float) -> np.ndarray:
        """Return the scores of these images."""
        return self.scores[width][numbers]


def run(model: nn.Module, data: Data, seed: int) -> Iterator[dict[str, object]]:
    """Yield the fixed widths and the calibrated cascades, with share of the multiply-adds and accuracy on the test."""
    held_out, test = Recorded(model, data.held_out[0]), Recorded(model, data.test[0])
    labels, numbers = data.test[1].numpy(), np.arange(len(data.test[1]))
    fixed = {}
    for width in WIDTHS:
        share, accuracy = test.macs[width] / test.macs[1.0], float((test(numbers, width).argmax(1) == labels).mean())
        fixed[share] = accuracy
        yield row(seed, "fixed", width, share, accuracy, accuracy, "")
    loader = [(np.arange(len(data.held_out[1])), data.held_out[1].numpy())]
    for confidence in ("probability", "margin"):
        for of, target in TARGETS:
            chosen = calibrate_cascade(held_out, loader, target, of=of, confidence=confidence)
            answer = Cascade(test, [*chosen.thresholds.values()], confidence=confidence)(numbers)
            accuracy, share = float((answer.logits.argmax(1) == labels).mean()), answer.macs / test.macs[1.0]
            steps = {width: f"{threshold:.3f}" for width, threshold in chosen.thresholds.items()}
            yield row(seed, f"{confidence}, {of}", target, share, accuracy, between(fixed, share), steps)


def row(seed: int, choice: str, target: float, share: float, accuracy: float, same: float, widths: object) -> dict:
    found = {"share": f"{share:.4f}", "accuracy": f"{accuracy:.4f}", "at_fixed_cost": f"{same:.4f}"}
    return {"seed": seed, "choice": choice, "target": target, **found, "widths": widths}


def between(fixed: dict[float, float], share: float) -> float:
    """Return the accuracy of a mixture of the two fixed widths around a cost."""
    known = sorted(fixed.items())
    for (less, low), (more, high) in pairwise(known):
        if less <= share <= more:
            return low + (high - low) * (share - less) / (more - less)
    return known[0][1] if share < known[0][0] else known[-1][1]


def table(folder: Path) -> str:
    """Return the means over the seeds, with 95 % intervals, and where they come from."""
    rows, lines = read_rows(folder / "accuracy.csv"), []
    for choice, target in dict.fromkeys((each["choice"], each["target"]) for each in rows):
        own = [each for each in rows if (each["choice"], each["target"]) == (choice, target)]
        shares, accuracies, same = ([float(each[name]) for each in own] for name in FIELDS[3:6])
        gains = [100 * (one - two) for one, two in zip(accuracies, same, strict=True)]
        name = f"width {target}" if choice == "fixed" else f"cascade ({choice.split(', ')[0]}), {target} of the "
        name += "" if choice == "fixed" else {"macs": "multiply-adds", "accuracy": "accuracy"}[choice.split(", ")[1]]
        gain = "" if choice == "fixed" else shown(gains, 2, "+")
        lines.append([name, shown(shares, 3), shown([100 * each for each in accuracies]), gain])
    header = ["choice", "multiply-adds", "accuracy, %", "points above fixed widths of that cost"]
    [result] = read_results(folder)
    seeds = len({each["seed"] for each in rows})
    return f"{markdown(header, lines)}\n{seeds} seeds, mean ± 95 % interval. {origin(result)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), metavar="FOLDER")
    parser.add_argument("--networks", type=Path, default=Path("runs/runtime"), help="folder of the trained networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(5)])
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = {each["seed"] for each in read_rows(given.out / "accuracy.csv")}
    for seed in [seed for seed in (given.seeds[:1] if given.quick else given.seeds) if str(seed) not in done]:
        data = digits(512, seed) if given.quick else fashion(given.data, seed, TRAINED_ON)
        kept = (given.out if given.quick else given.networks) / f"{seed}.safetensors"
        if kept.exists():
            model = slimmable.load(kept, plain_network())
        else:
            model = train(data, seed, 1 if given.quick else EPOCHS)
            kept.parent.mkdir(parents=True, exist_ok=True)
            slimmable.save(model, kept)
        append_rows(given.out / "accuracy.csv", FIELDS, list(run(model.eval(), data, seed)))
        print(seed, f"{HELD_OUT if not given.quick else 256} held out", flush=True)
    text = table(given.out)
    (given.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
