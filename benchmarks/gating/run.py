"""Is a dense and gated network as good as what it stands for: a dense one, and small ones?

    python -m benchmarks.gating.run                       # every arm and seed that has no result yet; 80 minutes
    python -m benchmarks.gating.run --seeds 0 1 --arms vanilla gated
    python -m benchmarks.gating.run --data fashion         # on Fashion-MNIST; three hours a seed
    python -m benchmarks.gating.run --quick               # a smoke run of seconds

Each run pre-trains by VICReg on the embedded digits, or with the images, network and settings of `benchmarks.slimclr`
on Fashion-MNIST, and evaluates frozen features. A run that was interrupted starts anew; finished ones stand in
`results/<data>.csv` and are not repeated. Several processes may work on different seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimmable
from benchmarks.measuring import append_rows, read_rows
from benchmarks.slimclr.run import FOLDER, PLANES, SETS as STUDIES, images_of, network
from benchmarks.training_data import Kept, Known, features_at_widths, few_of_each, first_of
from slimmable.cli.config import PretrainConfig
from slimmable.cli.data import Plain, batches_of
from slimmable.cli.pretrain import Training
from slimmable.cli.run import build_method
from slimmable.evaluation import evaluate_features
from slimmable.gating import calibrate_gates, gate_activity, ungate

HERE = Path(__file__).parent
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)
WIDTHS = {  # with multiply-adds next to these budgets
    "digits": {0.1: 0.31, 0.2: 0.44, 0.3: 0.56, 0.4: 0.64, 0.5: 0.69},
    "fashion": {0.1: 0.31, 0.2: 0.45, 0.3: 0.54, 0.4: 0.63, 0.5: 0.71},
}
GATED = ("gated", "no bias")  # gates as by default, and as published
ARMS = ("vanilla", "gated", "narrow", "slimmable", "no bias")
FEW = 10  # labelled images of each class in the probe with few labels
CALIBRATION = 1024  # training images
SETS: dict[str, dict[str, Any]] = {
    "digits": {
        **{"method": "vicreg", "data": "digits", "num_images": 4096, "image_size": 20, "batch_size": 128},
        **{"epochs": 30, "warmup_epochs": 2.5, "lr": 0.006, "proj_dim": 256, "proj_hidden_dim": 256},
    },
    "fashion": STUDIES["fashion-vicreg"],
}
PROBES = ("knn", "linear", "few")
FIELDS = ("arm", "budget", "seed", "network", "share", *PROBES, "seconds")


class Study:
    """The runs of one seed on a set of `SETS`, which all see the same images and views."""

    def __init__(self, data: str, seed: int, folder: Path = FOLDER, **more: Any) -> None:
        self.data, self.seed, self.settings = data, seed, SETS[data] | more
        self.known: Known = {}
        self.images = images_of(self.configuration(), folder=folder)
        size = (self.images.channels, self.settings["image_size"], self.settings["image_size"])
        self.example = torch.zeros(2, *size)
        self.full = slimmable.profile(self.converted(1.0), size, repeats=0).rows[0].macs
        self.size = size
        self.activity: dict[str, list[float]] = {}

    def configuration(self, **more: Any) -> PretrainConfig:
        """The settings of a run."""
        return PretrainConfig(**{"seed": self.seed, "widths": (1.0,), **self.settings, **more})

    def converted(self, *widths: float) -> nn.Module:
        """A new backbone at these widths."""
        return slimmable.slimify(self.backbone(), widths, example_inputs=self.example)

    def backbone(self) -> nn.Module:
        """A new network."""
        return network(self.data, self.images.channels, PLANES)

    def run(self, arm: str, budget: float | None) -> Iterator[dict[str, Any]]:
        """Train and evaluate; yield a row for each network that comes of it."""
        torch.manual_seed(self.seed)
        if arm == "slimmable":
            config = self.configuration(widths=(1.0, *sorted(WIDTHS[self.data].values(), reverse=True)))
        else:
            config = self.configuration(gate_budget=budget if arm in GATED else None)
        backbone = self.backbone()
        if arm == "narrow" and budget is not None:
            width = WIDTHS[self.data][budget]
            backbone = slimmable.extract(self.converted(1.0, width), width)
        method = build_method(config, backbone, self.images.channels, len(self.images.classes))
        if arm == "no bias":
            slimmable.gating.gate(ungate(method.backbone), example_inputs=self.example, bias=False, inplace=True)
        training = Training(config, method, self.images, torch.device("cpu"))
        training.views = Kept(training.views, self.known)
        start = time.process_time()
        while training.step < training.steps:
            training.take_step()
        seconds = f"{time.process_time() - start:.0f}"
        trained = method.backbone.eval()
        found = self.gated(trained, budget) if arm in GATED and budget else self.plain(trained, arm == "slimmable")
        for row in found:
            yield {"arm": arm, "budget": budget or "", "seed": self.seed, **row, "seconds": seconds}

    def plain(self, backbone: nn.Module, slim: bool) -> Iterator[dict[str, Any]]:
        """Yield a row for each width."""
        names = {width: f"{budget}" for budget, width in WIDTHS[self.data].items()}
        macs = {row.width: row.macs / self.full for row in slimmable.profile(backbone, self.size, repeats=0).rows}
        for width, accuracy in self.accuracies(
            *(self.features(backbone, part) for part in (self.images.train, self.images.test))
        ).items():
            yield {"network": names[width] if slim and width < 1 else "dense", "share": f"{macs[width]:.4f}"} | accuracy

    def gated(self, backbone: nn.Module, budget: float) -> Iterator[dict[str, Any]]:
        """Yield a row for each pass, for gates as they were trained, and for the static network."""
        some = list(batches_of(first_of(self.images.train, self.size[1], CALIBRATION)))
        held_out = list(batches_of(Plain(self.images.test, self.size[1])))
        yield from self.plain(backbone, slim=False)
        yield self.gated_pass(backbone, "gated, as trained")
        calibrate_gates(backbone, some, budget)
        yield self.gated_pass(backbone, "gated")
        self.activity = {name: opened.tolist() for name, opened in gate_activity(backbone, held_out).items()}
        static = slimmable.gating.extract_gated(backbone, some, budget=budget)
        yield next(self.plain(slimmable.slimify(static, (1.0,), example_inputs=self.example), False)) | {
            "network": "static"
        }

    def gated_pass(self, backbone: nn.Module, name: str) -> dict[str, Any]:
        """Return the row of the gated pass."""
        with slimmable.gating.gated(backbone):
            known = self.features(backbone, self.images.train)
        with slimmable.gating.gated(backbone) as run:
            asked = self.features(backbone, self.images.test)
        accuracy = self.accuracies(known, asked)[1.0]
        return {"network": name, "share": f"{float(run.share().mean()):.4f}"} | accuracy

    def features(self, backbone: nn.Module, part: Any) -> dict[float, torch.Tensor]:
        """Return width -> features."""
        return features_at_widths(backbone, Plain(part, self.size[1]))

    def accuracies(
        self, train: dict[float, torch.Tensor], test: dict[float, torch.Tensor]
    ) -> dict[float, dict[str, str]]:
        """Return width -> accuracy in % of each probe."""
        images = self.images
        few = few_of_each(images.train_labels, FEW, self.seed)
        labelled = {width: features[few] for width, features in train.items()}
        all_labels = evaluate_features(train, images.train_labels, test, images.test_labels)
        scarce = evaluate_features(labelled, images.train_labels[few], test, images.test_labels, probes=("linear",))
        return {
            width: {
                "knn": f"{100 * accuracy.knn:.2f}",
                "linear": f"{100 * accuracy.linear:.2f}",
                "few": f"{100 * scarce[width].linear:.2f}",
            }
            for width, accuracy in all_labels.items()
        }


def main() -> None:
    """Do the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(SETS), default="digits")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--budgets", nargs="+", type=float, choices=BUDGETS, default=BUDGETS)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of Fashion-MNIST's four files")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one epoch on few images: a smoke run")
    given = parser.parse_args()
    more: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0.0, "num_images": 512} if given.quick else {}
    path = given.out / f"{given.data}.csv"
    for seed in [0] if given.quick else given.seeds:
        study = Study(given.data, seed, given.folder, **more)
        for arm in given.arms:
            for budget in (None,) if arm in ("vanilla", "slimmable") else given.budgets:
                if (arm, str(budget or ""), str(seed)) in {(r["arm"], r["budget"], r["seed"]) for r in read_rows(path)}:
                    continue
                found = list(study.run(arm, budget))
                append_rows(path, FIELDS, found)
                if arm == "gated":
                    line = json.dumps({"budget": budget, "seed": seed, "opened": study.activity})
                    with (given.out / f"{given.data}-activity.jsonl").open("a") as file:
                        file.write(line + "\n")
                shown = "  ".join(f"{row['network']}: {row['knn']}/{row['linear']} ({row['share']})" for row in found)
                print(f"seed {seed} {arm} {budget or ''}: {shown}, {found[0]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
