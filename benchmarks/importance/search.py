"""What do any-width training and `slimmable.search` give: the sub-network found beside the uniform width of its cost.

    python -m benchmarks.importance.search            # three seeds, some minutes
    python -m benchmarks.importance.search --quick    # a smoke run of seconds

A universal model is trained with the sandwich rule, two random widths beside the widest and the narrowest. The greedy
search sees a fifth of the training images, which training has not seen; the accuracies are of the test images. Both
sub-networks have BatchNorm statistics of their own, from the same batches.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimmable
from benchmarks.importance.run import HERE, Digits, Row, accuracy, create, digits, train, write
from benchmarks.measuring import markdown, origin

NAME = "test_resnet"
WIDTHS = (1.0, 0.75, 0.5, 0.25)
BUDGETS = (0.5, 0.1)
FIELDS = ("model", "seed", "network", "width", "macs", "accuracy")


def trained(data: Digits, epochs: int) -> nn.Module:
    """Return a universal model trained at any width."""
    model = slimmable.slimify(create(NAME), WIDTHS, example_inputs=data.test[:1], universal=True)
    recipe = slimmable.SlimRecipe(model, loss_weights="ones", random_widths=2)

    def step(images: Tensor, labels: Tensor) -> None:
        for _ in recipe.widths(progress=1.0):
            recipe.loss(F.cross_entropy(model(images), labels)).backward()

    train(model, data, epochs, step)
    return model


def uniform(model: nn.Module, budget: float) -> float:
    """Return the widest width within a share of the multiply-adds, to three decimals."""
    plan = slimmable.plan(model, WIDTHS, universal=True)
    most = budget * plan.columns[0].macs
    return next(width / 1000 for width in range(1000, 250, -1) if plan.sub_network(width / 1000).macs <= most)


def compared(model: nn.Module, data: Digits, held_out: Digits, step: float) -> list[Row]:
    """Return a row for each width, and for each budget the uniform one within it and the sub-network found."""
    plan, batches = slimmable.plan(model, WIDTHS, universal=True), data.batches()
    found = slimmable.search(
        model,
        lambda net: accuracy(net, held_out.test, held_out.test_labels),
        BUDGETS,
        step=step,
        calibrate=batches[:2],
        progress=False,
    )
    networks: list[tuple[str, Any]] = [(f"width {width}", width) for width in WIDTHS]
    for budget, best in zip(BUDGETS, found, strict=True):
        networks += [(f"uniform within {budget}", uniform(model, budget)), (f"searched within {budget}", best.counts)]
    rows = []
    for name, setting in networks:
        slimmable.calibrate_bn(model, batches, [setting])
        with slimmable.at_width(model, setting):
            percent = accuracy(model, data.test, data.test_labels)
        macs = plan.sub_network(setting).macs
        width = setting if isinstance(setting, float) else ""
        rows.append({"network": name, "width": width, "macs": macs, "accuracy": f"{percent:.2f}"})
    return rows


def table(rows: list[Row], made: dict[str, Any]) -> str:
    """Return the means over the seeds as Markdown."""
    full = max(row["macs"] for row in rows)
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        found = [float(row["accuracy"]) for row in own]
        share = sum(row["macs"] for row in own) / len(own) / full
        mean = sum(found) / len(found)
        lines.append((name, f"{share:.3f}", f"{mean:.1f} ({min(found):.1f} – {max(found):.1f})"))
    return markdown(("network", "share of the multiply-adds", "accuracy, %"), lines) + "\n" + origin(made) + "\n"


def main() -> None:
    """Train, search, test; write all figures, and the table of their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--step", type=float, default=0.25, help="share of a group's units that a round takes away")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "search", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one epoch, large steps: a smoke run")
    given = parser.parse_args()
    seeds, epochs, step = (1, 1, 0.75) if given.quick else (given.seeds, given.epochs, given.step)
    rows: list[Row] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        data = digits(seed)
        cut = len(data.train) // 5
        held_out = Digits(data.train, data.train_labels, data.train[:cut], data.train_labels[:cut])
        data.train, data.train_labels = data.train[cut:], data.train_labels[cut:]
        model = trained(data, epochs)
        rows += [{"model": NAME, "seed": seed, **row} for row in compared(model, data, held_out, step)]
        made = write(given.out, NAME, FIELDS, rows)
        (given.out / "table.md").write_text(table(rows, made))
        print(*rows[-len(WIDTHS) - 2 * len(BUDGETS) :], sep="\n", flush=True)


if __name__ == "__main__":
    main()
