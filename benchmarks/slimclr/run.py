"""What do the techniques of SlimCLR buy, and does one pre-training replace one for each width?

    python -m benchmarks.slimclr.run                       # every arm and seed that has no result yet; hours
    python -m benchmarks.slimclr.run --data digits --seeds 0 1 --arms all alone
    python -m benchmarks.slimclr.run --quick               # a smoke run of seconds

Each run pre-trains by MoCo v2 and evaluates the frozen features at every width. A run that was interrupted starts anew;
finished ones stand in `results/<data>.csv` and are not repeated. Several processes may work on different seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import slimmable
from benchmarks.glyphs import glyphs
from benchmarks.measuring import append_rows, read_rows
from benchmarks.training_data import Kept, features_at_widths, few_of_each
from slimmable._small_resnet import small_resnet
from slimmable.cli.config import PretrainConfig
from slimmable.cli.data import Images, Plain, load_images
from slimmable.cli.pretrain import Training
from slimmable.cli.run import build_method
from slimmable.evaluation import evaluate_features
from slimmable.training import GradientDiagnostics

HERE = Path(__file__).parent
WIDTHS = (1.0, 0.75, 0.5, 0.25)
PLANES = (8, 16, 32, 64)
FEW = 10  # labelled images of each class in the probe with few labels
BARE: dict[str, Any] = {"slow_start": 0.0, "distill": "none", "loss_weights": "ones"}
ARMS: dict[str, dict[str, Any]] = {
    "alone": BARE,  # one network for each width
    "bare": BARE,
    "slow start": BARE | {"slow_start": 0.5},
    "distillation": BARE | {"distill": "own"},
    "re-weighting": BARE | {"loss_weights": "widest_plus_rest"},
    "all": {},
    "all, longer": {"epochs": 42},  # as many multiply-adds as the networks alone
    "labels": BARE | {"method": "supervised"},  # for its gradients
}
SHARED: dict[str, Any] = {
    "epochs": 30,
    "warmup_epochs": 2.5,
    "batch_size": 128,
    "proj_dim": 64,
    "proj_hidden_dim": 64,
    "queue_size": 512,
}
SETS: dict[str, dict[str, Any]] = {
    "digits": {"data": "digits", "num_images": 4096, "image_size": 20, "lr": 0.006},
    "glyphs": {"data": "glyphs", "num_images": 4096, "image_size": 20, "lr": 0.006},
}
PROBES = ("knn", "linear", "slimmable", "ridge")
GRADIENTS = {"rest": "rest_ratio/w{0}", "rest_total": "rest_ratio_total/w{0}", "cosine": "grad_cosine_total/w1.0_w{0}"}
EVERY = 20  # steps between two looks at the gradients
FIELDS = ("arm", "seed", "width", *PROBES, "few", "seconds", "gmacs", "steps", *GRADIENTS)


@dataclass
class Trained:
    """Accuracies by width and probe, and what the training took: processor time, and multiply-adds in billions.

    `gradients` holds means over the second half of the training, see `GradientDiagnostics`.
    """

    accuracy: dict[float, dict[str, float]]
    gradients: dict[float, dict[str, float]]
    seconds: float
    gmacs: float
    steps: int


def configuration(data: str, arm: str, seed: int, **more: Any) -> PretrainConfig:
    return PretrainConfig(**{"widths": WIDTHS, "seed": seed, **SHARED, **SETS[data], **ARMS[arm], **more})


def images_of(config: PretrainConfig) -> Images:
    if config.data == "glyphs":
        return glyphs(config.num_images, config.num_images // 4, config.image_size)
    return load_images(config)


def pretrain(
    config: PretrainConfig,
    planes: tuple[int, ...],
    images: Images,
    known: dict[tuple[int, int], list[torch.Tensor]],
) -> Trained:
    """Train one network at the widths of `config`, and evaluate each."""
    torch.manual_seed(config.seed)
    method = build_method(
        config,
        small_resnet(in_chans=images.channels, channels=planes, blocks=(1, 1, 1, 1), zero_init_last=True),
        images.channels,
        len(images.classes),
    )
    training = Training(config, method, images, torch.device("cpu"))
    training.views = Kept(training.views, known)
    training.diagnostics = GradientDiagnostics(method.online, EVERY)
    start = time.process_time()
    while training.step < training.steps:
        training.take_step()
    seconds = time.process_time() - start
    backbone = method.backbone
    train, test = (features_at_widths(backbone, Plain(part, config.image_size)) for part in (images.train, images.test))
    accuracy = {
        width: {probe: getattr(found, probe) for probe in PROBES}
        for width, found in evaluate_features(
            train, images.train_labels, test, images.test_labels, probes=PROBES
        ).items()
    }
    few = few_of_each(images.train_labels, FEW, config.seed)
    labelled = {width: features[few] for width, features in train.items()}
    scarce = evaluate_features(labelled, images.train_labels[few], test, images.test_labels, probes=("linear",))
    for width, found in scarce.items():
        accuracy[width]["few"] = found.linear
    return Trained(accuracy, gradients(training), seconds, cost(training, images) / 1e9, training.steps)


def gradients(training: Training) -> dict[float, dict[str, float]]:
    """Return for each narrow width the means over the second half of the training."""
    assert training.diagnostics is not None
    rows = training.diagnostics.rows
    late = [row for row in rows if row["step"] >= training.steps / 2] or rows[-1:]
    return {
        width: {name: statistics.fmean(row[column.format(width)] for row in late) for name, column in GRADIENTS.items()}
        for width in training.config.widths[1:]
    }


def cost(training: Training, images: Images) -> float:
    """Return the multiply-adds of the encoder in the whole training: a backward counts as two forwards."""
    config = training.config
    size = (images.channels, config.image_size, config.image_size)
    macs = {row.width: row.macs for row in slimmable.profile(training.method.encoder, size, repeats=0).rows}
    slow = round(config.slow_start * training.steps)
    queries = 3 * (slow * macs[1.0] + (training.steps - slow) * sum(macs.values()))
    keys = training.steps * macs[1.0]
    return float(config.batch_size * (queries + keys))


def run(
    data: str, arm: str, seed: int, known: dict[tuple[int, int], list[torch.Tensor]], **more: Any
) -> Iterator[dict[str, Any]]:
    """Yield a row for each width."""
    config = configuration(data, arm, seed, **more)
    images = images_of(config)
    if arm == "alone":
        for width in WIDTHS:
            planes = tuple(round(width * each) for each in PLANES)
            one = replace(config, widths=(1.0,), proj_hidden_dim=round(width * config.proj_hidden_dim))
            yield from rows(pretrain(one, planes, images, known), arm, seed, width)
    else:
        yield from rows(pretrain(config, PLANES, images, known), arm, seed)


def rows(trained: Trained, arm: str, seed: int, alone: float | None = None) -> Iterator[dict[str, Any]]:
    for width, shares in trained.accuracy.items():
        percent = {name: f"{100 * share:.2f}" for name, share in shares.items()}
        spent = {"seconds": f"{trained.seconds:.0f}", "gmacs": f"{trained.gmacs:.0f}", "steps": trained.steps}
        found = {name: f"{value:.4f}" for name, value in trained.gradients.get(width, {}).items()}
        yield {"arm": arm, "seed": seed, "width": width if alone is None else alone, **percent, **spent, **found}


def main() -> None:
    """Do the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=tuple(SETS), default=tuple(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one epoch on few images: a smoke run")
    given = parser.parse_args()
    more: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0.0, "num_images": 512} if given.quick else {}
    for data in given.data[:1] if given.quick else given.data:
        path = given.out / f"{data}.csv"
        for seed in [0] if given.quick else given.seeds:
            known: dict[tuple[int, int], list[torch.Tensor]] = {}
            for arm in given.arms:
                if (arm, str(seed)) not in {(row["arm"], row["seed"]) for row in read_rows(path)}:
                    found = list(run(data, arm, seed, known, **more))
                    append_rows(path, FIELDS, found)
                    shown = "  ".join(f"{row['width']}: {row['knn']}/{row['linear']}" for row in found)
                    print(f"{data} seed {seed} {arm}: {shown} (kNN/linear), {found[0]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
