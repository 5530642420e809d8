"""What does `slimmable.repair` give: how accurate are narrow networks of a network that was trained at full width only?

    python -m benchmarks.repair            # four small networks, one seed; some minutes
    python -m benchmarks.repair --seeds 3  # goes on from what is in the results

A plain timm model learns scikit-learn's handwritten digits, is cut to a narrow width in the order by magnitude, and
tested on held-out digits: as it was cut, with new BatchNorm statistics, and repaired with the training images, without
their labels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

import slimmable
from benchmarks.importance.run import Digits, accuracy, digits, train
from benchmarks.measuring import append_rows, environment, markdown, origin, read_rows

HERE = Path(__file__).parent
EPOCHS = {"test_resnet": 15, "test_vit": 20, "test_convnext": 15, "test_efficientnet": 15}
SIZES = {"test_convnext": 32}  # which halves its images too often for 16 pixels
WIDTHS = (0.5, 0.25)
FIELDS = ("model", "seed", "width", "network", "accuracy", "seconds")


def trained(name: str, seed: int) -> tuple[nn.Module, Digits]:
    """Return a network trained at full width, and its data."""
    data = digits(seed)
    if name in SIZES:
        for part in ("train", "test"):
            setattr(data, part, F.interpolate(getattr(data, part), size=SIZES[name], mode="bilinear"))
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4} if name == "test_vit" else {}
    model = timm.create_model(name, in_chans=1, num_classes=10, **sizes)
    train(model, data, EPOCHS[name])
    return model, data


def networks(model: nn.Module, data: Digits, width: float) -> Iterator[tuple[str, nn.Module, float]]:
    """Yield the narrow networks, with the seconds that each took to make."""
    start = time.perf_counter()
    slim = slimmable.slimify(model, (1.0, width), example_inputs=data.test[:2], importance="magnitude")
    yield "cut", slimmable.extract(slim, width), time.perf_counter() - start
    slimmable.calibrate_bn(slim, data.batches(), [width])
    yield "statistics", slimmable.extract(slim, width), time.perf_counter() - start
    for importance in ("magnitude", "activation"):
        start = time.perf_counter()
        small = slimmable.repair(model, data.batches(), width, importance=importance)
        name = "repaired" if importance == "magnitude" else "repaired, by activation"
        yield name, small, time.perf_counter() - start


def table(rows: list[dict[str, str]]) -> str:
    """Return the mean accuracies over the seeds as Markdown."""
    kinds = list(dict.fromkeys(row["network"] for row in rows if row["network"] != "full"))
    lines = []
    for model, width in dict.fromkeys((row["model"], row["width"]) for row in rows if row["network"] != "full"):
        cells = []
        for kind in ("full", *kinds):
            own = [row for row in rows if row["model"] == model and row["network"] == kind]
            found = [float(row["accuracy"]) for row in own if row["width"] in ("1.0", width)]
            cells.append(f"{sum(found) / len(found):.1f}" if found else "")
        lines.append((model, len({row["seed"] for row in rows if row["model"] == model}), width, *cells))
    return markdown(("model", "seeds", "width", "full, %", *(f"{kind}, %" for kind in kinds)), lines)


def main() -> None:
    """Train, cut, repair and test what the results lack; write all figures, and the table of their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=tuple(EPOCHS), choices=tuple(EPOCHS))
    parser.add_argument("--seeds", type=int, default=1, help="networks trained of each model, each with its own split")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    given = parser.parse_args()
    path = given.out / "digits.csv"
    for seed in range(given.seeds):
        for name in given.models:
            if any((row["model"], row["seed"]) == (name, str(seed)) for row in read_rows(path)):
                continue
            model, data = trained(name, seed)
            found = [(1.0, "full", model, 0.0)]
            found += [(width, *made) for width in WIDTHS for made in networks(model, data, width)]
            rows = []
            for width, kind, net, seconds in found:
                right = f"{accuracy(net, data.test, data.test_labels):.2f}"
                rows.append(dict(zip(FIELDS, (name, seed, width, kind, right, f"{seconds:.1f}"), strict=True)))
            append_rows(path, FIELDS, rows)
            print(table(read_rows(path)), flush=True)
    (given.out / "table.md").write_text(table(read_rows(path)) + "\n" + origin(environment()) + "\n")


if __name__ == "__main__":
    main()
