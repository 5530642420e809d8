"""What do the defaults of `pretrain --method supervised --init` buy, when a trained model is made slimmable?

    python -m benchmarks.fine_tune            # three seeds, some minutes; it goes on where it stopped
    python -m benchmarks.fine_tune --quick    # a smoke run of seconds

A plain network learns to tell five of the ten cluttered digits apart. The other five are then learnt at four widths
from few images: from these weights with all defaults, with one of them left out at a time, and from scratch, for as
many steps. Everything else, the learning rate too, is as the command has it by default. The figures are the accuracies
of the network's own classifier on held-out images of the new classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch

import slimmable
from benchmarks.finetuning import accuracy_of
from benchmarks.measuring import append_rows, markdown, origin, read_results, read_rows
from slimmable.cli.config import configure
from slimmable.cli.data import Images, Plain, batches_of, cluttered_digits
from slimmable.cli.pretrain import Training
from slimmable.cli.run import new_method, read_start
from slimmable.methods import Method

HERE = Path(__file__).parent
WIDTHS = (1.0, 0.75, 0.5, 0.25)
SEEDS = (0, 1, 2)
NEW = 512  # images of the new classes to train on
EPOCHS = 20  # as the command has by default
ARMS: dict[str, dict[str, Any]] = {
    "from scratch": {"init": None},
    "all defaults": {},
    "no magnitude order": {"importance": "none"},
    "no distillation": {"distill": "none"},
    "distillation without labels": {"share": 1.0},  # as published (Yu and Huang 2019)
}
FIELDS = ("arm", "seed", "statistics", "width", "accuracy")


def half(images: Images, classes: range, most: int | None = None) -> Images:
    """Return the images of some classes, which are counted from 0, up to `most` of them to train on."""
    chosen: dict[str, Any] = {}
    for part in ("train", "test"):
        labels = getattr(images, f"{part}_labels")
        rows = ((labels >= classes.start) & (labels < classes.stop)).nonzero().flatten()
        rows = rows[:most] if part == "train" else rows
        chosen |= {part: getattr(images, part)[rows], f"{part}_labels": labels[rows] - classes.start}
    return replace(images, **chosen, classes=tuple(map(str, classes)))


def train(images: Images, share: float | None = None, **settings: Any) -> Method:
    """Train as the command does with these options, or with another share of distillation, and return the method."""
    config = configure({"method": "supervised", **settings})
    start = None if config.init is None else read_start(config, images.channels)
    method = new_method(config, images.channels, len(images.classes), start)
    training = Training(config, method, images, torch.device("cpu"))
    if share is not None and training.recipe.distill is not None:
        training.recipe.distill.weight = share
    while training.step < training.steps:
        training.take_step()
    return method.eval()


def measure(method: Method, images: Images) -> dict[float, float]:
    """Return the accuracy at each width."""
    test = torch.stack([images.test[index] for index in range(len(images.test))])
    with torch.no_grad():
        return {
            width: accuracy_of(slimmable.extract(method.encoder, width).eval(), test, images.test_labels)
            for width in WIDTHS
        }


def run(seed: int, arms: list[str], images: int, epochs: int) -> Iterator[list[dict[str, object]]]:
    """Yield the rows of each arm: what the trained network is worth, with its own and with calibrated statistics."""
    every = cluttered_digits(images, images // 2, seed=seed)
    old, new = half(every, range(5)), half(every, range(5, 10), NEW)
    with TemporaryDirectory() as folder:
        path = Path(folder, "plain.pth")
        for arm in arms:
            settings = {"init": str(path), **ARMS[arm]}
            if settings["init"] is not None and not path.exists():
                plain = train(old, widths=(1.0,), epochs=epochs, seed=seed)
                torch.save(slimmable.extract(plain.backbone, 1.0).state_dict(), path)
            method, found = train(new, widths=WIDTHS, epochs=epochs, seed=seed, **settings), []
            for statistics in ("own", "calibrated"):
                if statistics == "calibrated":
                    slimmable.calibrate_bn(method.backbone, batches_of(Plain(new.train, 24), 64), WIDTHS)
                for width, accuracy in measure(method, new).items():
                    row = {"arm": arm, "seed": seed, "statistics": statistics, "width": width}
                    found.append({**row, "accuracy": f"{accuracy:.4f}"})
            print(seed, arm, *(row["accuracy"] for row in found), flush=True)
            yield found


def table(folder: Path) -> str:
    """Return the table of all rows in percent, and where they come from."""
    rows = read_rows(folder / "accuracy.csv")
    lines = []
    for arm in ARMS:
        for statistics in ("calibrated", "own") if arm == "all defaults" else ("calibrated",):
            name = arm if statistics == "calibrated" else "no calibrated statistics"
            cells = []
            for width in WIDTHS:
                wanted = (arm, statistics, str(width))
                own = [row for row in rows if (row["arm"], row["statistics"], row["width"]) == wanted]
                shares = [100 * float(row["accuracy"]) for row in own]
                if shares:
                    cells.append(f"{mean(shares):.1f}" + (f" ± {stdev(shares):.1f}" if len(shares) > 1 else ""))
            if cells:
                lines.append([name, len(shares), *cells])
    [result] = read_results(folder)
    header = ["start", "seeds", *map(str, WIDTHS)]
    return f"{markdown(header, lines)}\n{origin(result)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds, images, epochs = ((0,), 320, 1) if given.quick else (SEEDS, 4096, EPOCHS)
    for seed in seeds:
        done = {row["arm"] for row in read_rows(given.out / "accuracy.csv") if row["seed"] == str(seed)}
        for rows in run(seed, [arm for arm in ARMS if arm not in done], images, epochs):
            append_rows(given.out / "accuracy.csv", FIELDS, rows)
    text = table(given.out)
    (given.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
