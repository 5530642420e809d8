"""What do the techniques of SlimCLR buy, and does one pre-training replace one for each width?

    python -m benchmarks.slimclr.run                       # every arm and seed that has no result yet; hours
    python -m benchmarks.slimclr.run --data digits --seeds 0 1 --arms all alone
    python -m benchmarks.slimclr.run --data fashion        # see README.md
    python -m benchmarks.slimclr.run --data cifar10 --folder data/    # also stl10; folder: one of images by class
    python -m benchmarks.slimclr.run --quick               # a smoke run of seconds

Each run pre-trains by MoCo v2, on Fashion-MNIST by SimCLR, and evaluates the frozen features at every width. Finished
runs stand in `results/<data>.csv` and are not repeated; one that was interrupted goes on after its last epoch, by what
it left in `results/unfinished`. Several processes may work on different seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import datasets

import slimmable
from benchmarks.glyphs import glyphs
from benchmarks.measuring import append_rows, read_rows
from benchmarks.runtime.training import read
from benchmarks.training_data import Kept, Known, features_at_widths, few_of_each
from slimmable._small_resnet import small_resnet
from slimmable.cli.config import PretrainConfig
from slimmable.cli.data import Images, Pictures, Plain, batches_of, load_images
from slimmable.cli.pretrain import Training
from slimmable.cli.run import CHECKPOINT, Start, build_method, load_checkpoint
from slimmable.evaluation import evaluate_features
from slimmable.methods import Distillation
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
OURS: dict[str, Any] = {"slow_start": 0.2, "distill": "mse"}
FASHION: dict[str, dict[str, Any]] = {
    "alone": BARE,
    "bare": BARE,
    "published": {"slow_start": 0.5, "distill": "own"},
    "ours": OURS,
    "ours, no slow start": OURS | {"slow_start": 0.0},
    "ours, longer": OURS | {"epochs": 22},  # as many multiply-adds as the networks alone
    "slow start": BARE | {"slow_start": 0.5},
    "distillation": BARE | {"distill": "own"},
    "re-weighting": BARE | {"loss_weights": "widest_plus_rest"},
    "sandwich": OURS | {"universal": True},  # middle widths drawn in each step (Yu and Huang 2019)
    "two stages": BARE | {"method": "supervised", "epochs": 40},  # by a teacher; one view a step, so as many views
    "taught": {"method": "supervised", "slow_start": 0.0},  # all widths, by the full one, from its weights; one view
    "labels": BARE | {"method": "supervised"},
    "labels, alone": BARE | {"method": "supervised"},  # one network for each width
}
ALONE = ("alone", "labels, alone")
BY_OTHERS = {arm: settings for arm, settings in FASHION.items() if "method" not in settings}  # than SimCLR
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
SHARED: dict[str, Any] = {
    "method": "mocov2",
    "epochs": 30,
    "warmup_epochs": 2.5,
    "batch_size": 128,
    "proj_dim": 64,
    "proj_hidden_dim": 64,
    "queue_size": 512,
}
ON_FASHION: dict[str, Any] = {
    **{"data": "fashion", "num_images": 12_800, "image_size": 28, "method": "simclr", "proj_hidden_dim": 128},
    **{"epochs": 20, "warmup_epochs": 1.0, "batch_size": 256, "lr": 0.012, "min_crop_scale": 0.2},
}
SETS: dict[str, dict[str, Any]] = {
    "digits": {"data": "digits", "num_images": 4096, "image_size": 20, "lr": 0.006},
    "glyphs": {"data": "glyphs", "num_images": 4096, "image_size": 20, "lr": 0.006},
    "fashion": ON_FASHION,
    "fashion-mocov2": ON_FASHION | {"method": "mocov2", "queue_size": 3072},
    "fashion-vicreg": ON_FASHION | {"method": "vicreg", "proj_dim": 256, "proj_hidden_dim": 256},
    "fashion-byol": ON_FASHION | {"method": "byol"},
    "fashion-large": ON_FASHION | {"num_images": 60_000, "epochs": 100},
    "cifar10": ON_FASHION | {"data": "cifar10", "image_size": 32},
    "stl10": ON_FASHION | {"data": "stl10", "image_size": 48},
    "folder": ON_FASHION | {"data": "folder", "image_size": 64},
}
LARGE = {arm: FASHION[arm] for arm in ("alone", "ours", "published")}
PASSES = {  # forwards of an image in a step: with gradients, and of the momentum encoder or the teacher
    **{"mocov2": (1, 1), "simclr": (2, 0), "vicreg": (2, 0), "byol": (2, 2)},
    "supervised": (1, 0),
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


def arms_of(data: str) -> dict[str, dict[str, Any]]:
    """Return the arms of a set of `SETS`: name -> settings."""
    by_others = dict.fromkeys(("fashion-mocov2", "fashion-vicreg", "fashion-byol"), BY_OTHERS)
    return {"digits": ARMS, "glyphs": ARMS, "fashion-large": LARGE, **by_others}.get(data, FASHION)


def configuration(data: str, arm: str, seed: int, **more: Any) -> PretrainConfig:
    return PretrainConfig(**{"widths": WIDTHS, "seed": seed, **SHARED, **SETS[data], **arms_of(data)[arm], **more})


def fashion(count: int, validate: bool, folder: Path) -> Images:
    """Return the first `count` training images of Fashion-MNIST, and the test images, or the last training images."""

    def part(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = read(folder / f"{name}-images-idx3-ubyte.gz")
        return images.mul(255).round().to(torch.uint8), read(folder / f"{name}-labels-idx1-ubyte.gz")

    images, labels = part("train")
    held_out = (images[-5000:], labels[-5000:]) if validate else part("t10k")
    classes = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    return Images(images[:count], labels[:count], *held_out, classes, 1, handwriting=True)


def photographs(config: PretrainConfig, folder: Path) -> Images:
    """Return the images of CIFAR-10, STL-10 or a folder; those to train on are drawn once for all seeds."""
    if config.data == "cifar10":
        found = load_images(replace(config, data="torch/cifar10", data_dir=str(folder)))
    elif config.data == "folder":
        found = load_images(replace(config, data=str(folder)))
    else:  # timm does not know it by name
        train, test = (datasets.STL10(folder, split=part) for part in ("train", "test"))
        parts = ((torch.from_numpy(each.data), torch.from_numpy(each.labels).long()) for each in (train, test))
        found = Images(*next(parts), *next(parts), tuple(train.classes))
    some = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(0))[: config.num_images]
    chosen = found.train.take(some.tolist()) if isinstance(found.train, Pictures) else found.train[some]
    return replace(found, train=chosen, train_labels=found.train_labels[some])


def images_of(config: PretrainConfig, validate: bool = False, folder: Path = FOLDER) -> Images:
    if config.data == "fashion":
        return fashion(config.num_images, validate, folder)
    if config.data == "glyphs":
        return glyphs(config.num_images, config.num_images // 4, config.image_size)
    return load_images(config) if config.data == "digits" else photographs(config, folder)


def network(data: str, channels: int, planes: tuple[int, ...]) -> nn.Module:
    """Return the backbone: on photographs that of `slimmable pretrain`."""
    if data in ("digits", "glyphs"):
        return small_resnet(in_chans=channels, channels=planes, blocks=(1, 1, 1, 1), zero_init_last=True)
    return small_resnet(in_chans=channels, channels=tuple(2 * each for each in planes))


def pretrain(
    config: PretrainConfig,
    planes: tuple[int, ...],
    images: Images,
    known: Known | None,
    unfinished: Path | None = None,
    teacher: nn.Module | None = None,
) -> tuple[Training, float]:
    """Train one network at the widths of `config`, or by the features of `teacher`; return it and the seconds.

    With a teacher, a network of several widths starts from its weights. Views are kept in `known`, if given. After each
    epoch the folder `unfinished`, if given, gets what a later call with the same arguments goes on from.
    """
    torch.manual_seed(config.seed)
    backbone, classes = network(config.data, images.channels, planes), len(images.classes)
    if teacher is None:
        method = build_method(config, backbone, images.channels, classes)
    else:
        size = teacher.num_features
        same = {"weight": torch.eye(size), "bias": torch.zeros(size)}
        start = Start(teacher.state_dict(), False, same) if len(config.widths) > 1 else None
        encoder = build_method(config, backbone, images.channels, size, start).encoder
        method = Distillation(encoder, teacher, kind="cosine")
    training = Training(config, method, images, torch.device("cpu"))
    if known is not None:
        training.views = Kept(training.views, known)
    training.diagnostics = GradientDiagnostics(method.online, EVERY)
    seconds = 0.0
    if unfinished is not None and (saved := unfinished / CHECKPOINT).exists():
        training.resume(*load_checkpoint(saved))
        seconds, rows = json.loads((unfinished / "measured.json").read_text())
        training.diagnostics.step = training.step
        training.diagnostics.rows = [row for row in rows if row["step"] < training.step]
    start = time.process_time() - seconds
    while training.step < training.steps:
        training.take_step()
        if unfinished is not None and training.step % training.steps_per_epoch == 0:
            unfinished.mkdir(parents=True, exist_ok=True)
            measured = time.process_time() - start, training.diagnostics.rows
            (unfinished / "measured.json").write_text(json.dumps(measured))
            training.save(unfinished / CHECKPOINT)
    return training, time.process_time() - start


def judged(training: Training, seconds: float) -> Trained:
    """Evaluate each width."""
    config, images, backbone = training.config, training.images, training.method.backbone
    if config.universal:
        some = Plain(images.train, config.image_size, most=4096)
        slimmable.calibrate_bn(backbone, batches_of(some, config.batch_size), config.widths)
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
    """Return the multiply-adds of the encoder in the whole training: a backward counts as two forwards.

    Widths that are drawn in each step count as those of the configuration between the widest and the narrowest.
    """
    config, method = training.config, training.method
    size = (images.channels, config.image_size, config.image_size)
    macs = {row.width: row.macs for row in slimmable.profile(method.encoder, size, repeats=0).rows}
    views, keys = PASSES[config.method]
    slow = round(config.slow_start * training.steps)
    trained = 3 * views * (slow * macs[1.0] + (training.steps - slow) * sum(macs.values()))
    held = keys * macs[1.0]
    if isinstance(method, Distillation):
        held = slimmable.profile(method.teacher, size, repeats=0).rows[0].macs
    return float(config.batch_size * (trained + training.steps * held))


def run(
    data: str,
    arm: str,
    seed: int,
    known: Known | None,
    folder: Path = FOLDER,
    unfinished: Path | None = None,
    **more: Any,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each width; `unfinished` is the folder of what each training leaves after an epoch."""
    config = configuration(data, arm, seed, **more)
    images = images_of(config, folder=folder)
    if arm not in (*ALONE, "two stages", "taught"):
        yield from rows(judged(*pretrain(config, PLANES, images, known, unfinished)), arm, seed)
        return

    def place(name: str) -> Path | None:
        return None if unfinished is None else unfinished / name

    alone = config if arm in ALONE else configuration(data, "alone", seed, **more)
    first = pretrain(replace(alone, widths=(1.0,)), PLANES, images, known, place("1"))
    teacher = None if arm in ALONE else first[0].method.backbone
    if arm == "taught":
        found = judged(*pretrain(config, PLANES, images, known, place("taught"), teacher))
        both = {"seconds": found.seconds + first[1], "gmacs": found.gmacs + cost(first[0], images) / 1e9}
        yield from rows(replace(found, **both), arm, seed)
        return
    yield from rows(judged(*first), arm, seed, 1.0)
    for width in WIDTHS[1:]:
        planes, settings = tuple(round(width * each) for each in PLANES), alone if teacher is None else config
        one = replace(settings, widths=(1.0,), proj_hidden_dim=round(width * config.proj_hidden_dim))
        yield from rows(judged(*pretrain(one, planes, images, known, place(f"{width:g}"), teacher)), arm, seed, width)


def rows(trained: Trained, arm: str, seed: int, alone: float | None = None) -> Iterator[dict[str, Any]]:
    for width, shares in trained.accuracy.items():
        percent = {name: f"{100 * share:.2f}" for name, share in shares.items()}
        spent = {"seconds": f"{trained.seconds:.0f}", "gmacs": f"{trained.gmacs:.0f}", "steps": trained.steps}
        found = {name: f"{value:.4f}" for name, value in trained.gradients.get(width, {}).items()}
        yield {"arm": arm, "seed": seed, "width": width if alone is None else alone, **percent, **spent, **found}


def validate(folder: Path) -> None:
    """Print the accuracy of the full width alone on the validation images, for some settings around the chosen ones."""
    for more in (
        {"lr": 0.006, "min_crop_scale": 0.3},
        {"lr": 0.003, "min_crop_scale": 0.3},
        {"min_crop_scale": 0.3},
        {"lr": 0.006},
        {},
        {"temperature": 0.1},
        {"temperature": 0.4},
        {"min_crop_scale": 0.1},
    ):
        config = replace(configuration("fashion", "alone", 0, **more), widths=(1.0,))
        trained = pretrain(config, PLANES, images_of(config, validate=True, folder=folder), {})
        found = judged(*trained).accuracy[1.0]
        shown = "  ".join(f"{name} {100 * share:.1f}" for name, share in found.items())
        print(f"{more or 'as chosen'}: {shown}", flush=True)


def main() -> None:
    """Do the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=tuple(SETS), default=("digits", "glyphs"))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--arms", nargs="+", choices=tuple(dict.fromkeys((*ARMS, *FASHION))), help="default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the files of the photographs")
    parser.add_argument("--validate", action="store_true", help="try settings on Fashion-MNIST's validation images")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one epoch on few images: a smoke run")
    given = parser.parse_args()
    if given.validate:
        validate(given.folder)
        return
    more: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0.0, "num_images": 512} if given.quick else {}
    for data in given.data[:1] if given.quick else given.data:
        path = given.out / f"{data}.csv"
        for seed in [0] if given.quick else given.seeds:
            known: Known | None = None if data in ("fashion-large", "folder") else {}  # views would fill the memory
            for arm in given.arms or arms_of(data):
                if (arm, str(seed)) not in {(row["arm"], row["seed"]) for row in read_rows(path)}:
                    unfinished = given.out / "unfinished" / f"{data}-{arm}-{seed}"
                    found = list(run(data, arm, seed, known, given.folder, unfinished, **more))
                    append_rows(path, FIELDS, found)
                    shutil.rmtree(unfinished)
                    shown = "  ".join(f"{row['width']}: {row['knn']}/{row['linear']}" for row in found)
                    print(f"{data} seed {seed} {arm}: {shown} (kNN/linear), {found[0]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
