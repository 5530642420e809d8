"""What is each plain network of a pre-training run worth after fine-tuning with labels?

    python -m benchmarks.finetuned runs/pretrain --epochs 20 --probes knn linear

Evaluates the run again, fine-tunes each extracted width (of a gated run the dense and the static networks) together
with a new classifier, and replaces the report of the run by one with a column for the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import slimmable
from benchmarks.finetuning import accuracy_of, finetune
from slimmable.cli.commands import Evaluate
from slimmable.cli.data import Plain, load_images
from slimmable.cli.evaluation import report_run, rows_of_run, static_networks
from slimmable.cli.report import Row, named_at
from slimmable.cli.run import read_config, trained_method
from slimmable.errors import SlimmableError, UsageError


def evaluate_finetuned(run: Path, epochs: int, probes: Iterable[str] = Evaluate.probes) -> str:
    """Evaluate the run in the folder `run`, replace its report, and return the table as Markdown."""
    if epochs < 1:
        raise UsageError(f"--epochs must be at least 1, got {epochs}")
    config = read_config(run)
    images = load_images(config)
    method = trained_method(config, run, images.channels, images.digest)
    backbone = method.backbone
    options = Evaluate(run, probes=tuple(probes), workers=0)
    rows = rows_of_run(config, method, images, options)
    plain = (Plain(part, config.image_size) for part in (images.train, images.test))
    train, test = (torch.stack([part[index] for index in range(len(part))]) for part in plain)
    shares = {}
    gated = config.gate_budget is not None
    networks = {named_at("dense", w) if gated else f"{w:g}": slimmable.extract(backbone, w) for w in config.widths}
    if gated:
        networks |= static_networks(config, backbone, images)
    for name, network in networks.items():
        classifier = finetune(
            network, train, images.train_labels, num_classes=len(images.classes), epochs=epochs, seed=config.seed
        )
        shares[name] = accuracy_of(classifier, test, images.test_labels)
    return report_run(config, [_with_share(row, shares.get(row.name)) for row in rows], images, options)


def _with_share(row: Row, share: float | None) -> Row:
    """Return the row with the accuracy after fine-tuning, if there is one."""
    return row if share is None else replace(row, shares={**row.shares, "finetuned": share})


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tune and report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a pre-training run")
    parser.add_argument("--epochs", type=int, default=20, help="of the fine-tuning")
    parser.add_argument("--probes", nargs="+", choices=("knn", "linear", "slimmable", "ridge"), default=Evaluate.probes)
    given = parser.parse_args(argv)
    try:
        print(evaluate_finetuned(given.run, given.epochs, given.probes))
    except SlimmableError as error:
        print(f"finetuned: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
