"""Do gates save time for each image, if a batch is sorted by what they open?

    python -m benchmarks.gating.sorted            # trains a network for some minutes, then measures for one
    python -m benchmarks.gating.sorted --quick    # a smoke run of seconds

A batch is cut into groups of images for which the gates decide similarly, and each group runs through the network of
the units that are open for any of its images. The figures are a lower bound: the decisions are known beforehand, the
groups are made and their networks extracted outside of the timed part, and what only some images of a group open is not
closed for the others. A real implementation has to do all this, block by block.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimmable
from benchmarks.gating.run import SETS
from benchmarks.measuring import compare, interleaved, markdown, origin, read_results, write_result
from benchmarks.training_data import first_of
from slimmable._small_resnet import small_resnet
from slimmable.cli.config import PretrainConfig
from slimmable.cli.data import batches_of, load_images
from slimmable.cli.pretrain import Training
from slimmable.cli.run import build_method
from slimmable.gating import calibrate_gates, gated

HERE = Path(__file__).parent
PLANES = (32, 64, 128, 256)
BUDGET = 0.3
BATCHES = (16, 256)
GROUPS = (1, 2, 4, 8)
IMAGES = 1024  # held out, for the count of patterns
ANY = 1e-9  # share of the images


def trained(**more: Any) -> tuple[nn.Module, Tensor]:
    """Return a small gated ResNet, trained on digits and calibrated to the budget, and images that it has not seen."""
    config = PretrainConfig(**{"widths": (1.0,), **SETS["digits"], "gate_budget": BUDGET, **more})
    images = load_images(config)
    torch.manual_seed(config.seed)
    method = build_method(
        config,
        small_resnet(in_chans=images.channels, channels=PLANES, blocks=(1, 1, 1, 1), zero_init_last=True),
        images.channels,
        len(images.classes),
    )
    training = Training(config, method, images, torch.device("cpu"))
    while training.step < training.steps:
        training.take_step()
    model = method.backbone.eval()
    calibrate_gates(model, list(batches_of(first_of(images.train, config.image_size, IMAGES))), BUDGET)
    return model, torch.cat(list(batches_of(first_of(images.test, config.image_size, IMAGES))))


@torch.no_grad()
def decisions(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], float]:
    """Return what each gate decides, and what it costs on average."""
    with gated(model) as run:
        model(images)
    return run.masks(), float(run.share().mean())


def grouped(masks: Tensor, groups: int) -> list[Tensor]:
    """Return the numbers of the images of each group, by k-means of their masks."""
    centres = masks[torch.randperm(len(masks))[:groups]]
    for _ in range(20):
        nearest = torch.cdist(masks, centres).argmin(1)
        members = [(nearest == number).nonzero().flatten() for number in range(groups)]
        centres = torch.stack([masks[own].mean(0) if len(own) else centres[n] for n, own in enumerate(members)])
    return [own for own in members if len(own)]


def sorted_run(networks: list[nn.Module], members: list[Tensor], images: Tensor) -> Callable[[], object]:
    """Return inference group by group, with the features in the order of the images."""
    back = torch.cat(members).argsort()

    def inference() -> object:
        with torch.inference_mode():
            return torch.cat([network(images[own]) for network, own in zip(networks, members, strict=True)])[back]

    return inference


def masked_run(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """Return inference with masks."""

    def inference() -> object:
        with torch.inference_mode(), gated(model):
            return model(images)

    return inference


def measure(model: nn.Module, images: Tensor, batch: int, seconds: float, least: int) -> list[dict[str, Any]]:
    """Return a row for the masked pass, and one for each number of groups; the baseline is the dense pass."""
    size = tuple(images.shape[1:])
    model = model.to(memory_format=torch.channels_last)
    dense = slimmable.extract(model, 1.0).eval().to(memory_format=torch.channels_last)
    images = images[:batch].to(memory_format=torch.channels_last)
    masks, share = decisions(model, images)
    full = slimmable.profile(dense, size, repeats=0).rows[0].macs
    calls = {"dense": sorted_run([dense], [torch.arange(batch)], images), "masked": masked_run(model, images)}
    shares = {"masked": share}
    for groups in GROUPS:
        members = grouped(torch.cat(list(masks.values()), 1), groups)
        networks = [
            slimmable.gating.extract_gated(model, [images[own]], keep=ANY, recalibrate=False).eval() for own in members
        ]
        macs = [slimmable.profile(network, size, repeats=0).rows[0].macs / full for network in networks]
        networks = [network.to(memory_format=torch.channels_last) for network in networks]
        way = f"{groups} group{'s' * (groups > 1)}"
        calls[way] = sorted_run(networks, members, images)
        shares[way] = sum(len(own) * each for own, each in zip(members, macs, strict=True)) / batch
    times = interleaved(calls, seconds, least)
    return [
        {"way": way, "batch": batch, "share": round(of_macs, 4)} | compare(times[way], times["dense"])
        for way, of_macs in shares.items()
    ]


def patterns(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return how many different masks there are, of each gate and of all together, and what they cost."""
    masks, share = decisions(model, images)
    count = {name: len(mask.unique(dim=0)) for name, mask in masks.items()}
    found = len(torch.cat(list(masks.values()), 1).unique(dim=0))
    return {"way": "patterns", "images": len(images), "share": round(share, 4), "all": found, "gates": count}


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    results = read_results(folder)
    lines = [
        (
            row["batch"],
            row["way"],
            f"{row['share']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f} – {row['high']:.3f}",
        )
        for result in results
        for row in result["rows"][1:]
    ]
    header = ("batch", "gated network", "MACs / dense", "time / dense", "95 %")
    return markdown(header, lines) + "\n" + "\n".join(sorted({origin(result) for result in results})) + "\n"


def main() -> None:
    """Train, measure, and write the result file and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=20, help="time per batch size")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sorted", help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="one epoch on few images: a smoke run")
    given = parser.parse_args()
    more: dict[str, Any] = (
        {"epochs": 1, "warmup_epochs": 0.0, "num_images": 256} if given.quick else {"epochs": given.epochs}
    )
    model, images = trained(**more)
    rows = [patterns(model, images)]
    for batch in BATCHES[:1] if given.quick else BATCHES:
        rows += measure(model, images, batch, 0 if given.quick else given.seconds, 3 if given.quick else 9)
    for row in rows:
        print(row, flush=True)
    write_result(given.out, "small_resnet", rows, variant=f"budget{BUDGET}-image{images.shape[-1]}")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
