"""What does `importance="magnitude"` buy: how accurate are narrow networks of a trained network right after conversion?

    python -m benchmarks.importance.run            # two networks, three seeds, some minutes
    python -m benchmarks.importance.run --quick    # a smoke run of seconds

A plain timm model learns scikit-learn's handwritten digits at full width only. It is then converted in the order that
its channels have, and by importance, and tested at every width as it is and after `calibrate_bn`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import slimmable
from benchmarks.measuring import environment, markdown, origin

HERE = Path(__file__).parent
WIDTHS = (1.0, 0.75, 0.5)
IMAGE_SIZE = 16
BATCH = 64
LEARNING_RATE = 4e-3
DECAY = 2.4  # sum of learning rate x weight decay over the steps: about that of SGD on ImageNet, see README.md
MODELS: dict[str, dict[str, Any]] = {"test_resnet": {}, "test_vit": {"img_size": IMAGE_SIZE, "patch_size": 4}}
EPOCHS = {"test_resnet": 15, "test_vit": 20}
ORDERS = {None: "first channels", "magnitude": "magnitude"}
FIELDS = ("model", "seed", "order", "statistics", "width", "accuracy")
Row = dict[str, Any]


@dataclass
class Digits:
    """Images of shape (images, 1, size, size) in [-1, 1] and their labels, to train with and to test with."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def batches(self) -> list[Tensor]:
        """Return the training images in batches of 128, without the last, smaller one."""
        return list(self.train.split(128)[:-1])


def digits(seed: int) -> Digits:
    """Return the 1,797 digits, enlarged, a random quarter of them held out."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(8).sub(1).unsqueeze(1)
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bilinear")
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    return Digits(images[train], labels[train], images[test], labels[test])


def create(name: str) -> nn.Module:
    model: nn.Module = timm.create_model(name, in_chans=1, num_classes=10, **MODELS[name])
    return model


def train(model: nn.Module, data: Digits, epochs: int, step: Callable[[Tensor, Tensor], object] | None = None) -> None:
    """Train with AdamW and a one-cycle schedule; `step` computes the gradients, by default those of the model."""
    steps = epochs * (len(data.train) // BATCH)
    decay = DECAY / (steps * LEARNING_RATE / 2)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train)).split(BATCH)[: len(data.train) // BATCH]:
            images, labels = data.train[batch], data.train_labels[batch]
            optimizer.zero_grad()
            step(images, labels) if step is not None else F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images classified rightly, in percent."""
    return float((model.eval()(images).argmax(1) == labels).float().mean()) * 100


def narrow_accuracies(model: nn.Module, data: Digits) -> Iterator[Row]:
    """Convert a trained model in both orders, and test it at each width, as it is and with new statistics."""
    for order, called in ORDERS.items():
        slim = slimmable.slimify(model, WIDTHS, example_inputs=data.test[:2], importance=order)
        has_statistics = any(isinstance(module, _BatchNorm) for module in model.modules())
        for statistics in ("old", "new") if has_statistics else ("none",):
            if statistics == "new":
                slimmable.calibrate_bn(slim, data.batches(), WIDTHS[1:])
            for width in WIDTHS:
                with slimmable.at_width(slim, width):
                    found = accuracy(slim, data.test, data.test_labels)
                yield {"order": called, "statistics": statistics, "width": width, "accuracy": f"{found:.2f}"}


def table(rows: list[Row]) -> str:
    """Return the mean over the seeds, with the least and the largest, as Markdown."""
    header = (
        "model",
        "seeds",
        "BatchNorm statistics",
        "width",
        *(f"{order}, %" for order in ORDERS.values()),
        "difference",
    )
    lines = []
    for model, statistics, width in dict.fromkeys((row["model"], row["statistics"], row["width"]) for row in rows):
        found: dict[str, list[float]] = {order: [] for order in ORDERS.values()}
        for row in rows:
            if (row["model"], row["statistics"], row["width"]) == (model, statistics, width):
                found[row["order"]].append(float(row["accuracy"]))
        means = [sum(values) / len(values) for values in found.values()]
        cells = [f"{mean:.1f} ({min(v):.1f} – {max(v):.1f})" for mean, v in zip(means, found.values(), strict=True)]
        lines.append((model, len(next(iter(found.values()))), statistics, width, *cells, f"{means[1] - means[0]:+.1f}"))
    return markdown(header, lines)


def read(path: Path) -> list[Row]:
    """Read the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(folder: Path, name: str, fields: tuple[str, ...], rows: list[Row]) -> dict[str, Any]:
    """Write the rows as CSV and, in a JSON file beside them, what they were made with; return the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    made = environment()
    (folder / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
    return made


def main() -> None:
    """Train, convert, test; write all figures, and the table of their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=tuple(MODELS), choices=tuple(MODELS))
    parser.add_argument("--seeds", type=int, default=3, help="networks trained of each model, each with its own split")
    parser.add_argument("--epochs", type=int, help="of training (default: what each model needs)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one network, one epoch: a smoke run")
    given = parser.parse_args()
    models, seeds, epochs = (("test_resnet",), 1, 1) if given.quick else (given.models, given.seeds, given.epochs)
    for name in models:
        rows: list[Row] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model, data = create(name), digits(seed)
            train(model, data, epochs or EPOCHS[name])
            rows += [{"model": name, "seed": seed, **row} for row in narrow_accuracies(model, data)]
            write(given.out, name, FIELDS, rows)
            print(table(rows), flush=True)
    files = sorted(given.out.glob("*.csv"))
    sources = {origin(json.loads(file.with_suffix(".json").read_text())) for file in files}
    rows = [row for file in files for row in read(file)]
    (given.out / "table.md").write_text(table(rows) + "\n" + "\n".join(sorted(sources)) + "\n")


if __name__ == "__main__":
    main()
