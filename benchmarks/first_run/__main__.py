"""What does `slimmable pretrain` give beside networks trained alone, and beside the full one cut?

    python -m benchmarks.first_run            # three seeds; about four minutes each on two cores
    python -m benchmarks.first_run --seeds 5  # goes on from what is in the results

By the defaults of `slimmable pretrain`, on the same images and views and for as many steps: one training of four widths
("together"); a network of each width, trained alone ("alone"); and the full one of those, cut to each width by the
magnitude of its weights, with new BatchNorm statistics ("cut"). The results of the last two go into the package, whose
picture of a run by the defaults shows them beside the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimmable
from benchmarks.measuring import append_rows, markdown, origin, read_rows
from slimmable._small_resnet import small_resnet
from slimmable.cli.commands import Evaluate
from slimmable.cli.config import PretrainConfig, configure
from slimmable.cli.data import Images, Plain, batches_of, load_images
from slimmable.cli.evaluation import Prober
from slimmable.cli.pretrain import Training
from slimmable.cli.report import Row, to_csv
from slimmable.cli.run import build_method

HERE = Path(__file__).parent
PACKAGED = Path(slimmable.__file__).parent / "cli" / "first_run" / "metrics.csv"
CHANNELS = (16, 32, 64, 128)
ARMS = {"together": "one training of four widths", "alone": "each width alone", "cut": "the full one, cut"}
FIELDS = ("network", "seed", "width", "parameters", "macs", "knn", "linear", "seconds")


def trained(config: PretrainConfig, images: Images, width: float = 1.0) -> tuple[nn.Module, float]:
    """Return a backbone with this share of the channels, trained by `config`, and the processor seconds."""
    torch.manual_seed(config.seed)
    planes = tuple(round(width * each) for each in CHANNELS)
    backbone = small_resnet(in_chans=images.channels, channels=planes)
    training = Training(config, build_method(config, backbone, images.channels, 10), images, torch.device("cpu"))
    start = time.process_time()
    while training.step < training.steps:
        training.take_step()
    return training.method.backbone, time.process_time() - start


def arms(config: PretrainConfig, images: Images) -> Iterator[tuple[str, float, nn.Module, float]]:
    """Yield the name, the width, the network and the processor seconds of each that is compared."""
    together, seconds = trained(config, images)
    for width in config.widths:
        yield "together", width, slimmable.extract(together, width), seconds
    for width in config.widths:
        alone, seconds = trained(replace(config, widths=(1.0,)), images, width)
        full = slimmable.extract(alone, 1.0)
        yield "alone", width, full, seconds
        if width == 1:
            example = torch.zeros(2, images.channels, config.image_size, config.image_size)
            cut = slimmable.slimify(full, config.widths, example_inputs=example, importance="magnitude")
            slimmable.calibrate_bn(cut, list(batches_of(Plain(images.train, config.image_size))))
            for narrow in config.widths[1:]:
                yield "cut", narrow, slimmable.extract(cut, narrow), 0.0


def run(seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each network of a seed."""
    config = configure({"seed": seed})
    images = load_images(config)
    prober = Prober(config, images, Evaluate(HERE, workers=0))
    for name, width, network, seconds in arms(config, images):
        found = prober.measure(network, {1.0: nullcontext})[0][1.0]
        (costs,) = slimmable.profile(network, prober.size, repeats=0).rows
        shares = {probe: f"{share:.4f}" for probe, share in found.items()}
        spent = {"parameters": costs.parameters, "macs": costs.macs, "seconds": f"{seconds:.0f}"}
        print(f"seed {seed}  {name} {width:g}  kNN {found['knn']:.3f}  linear {found['linear']:.3f}", flush=True)
        yield {"network": name, "seed": seed, "width": width, **spent, **shares}


def table(rows: list[dict[str, str]], source: str) -> str:
    """Return means and deviations over the seeds as Markdown."""
    lines = []
    for width in dict.fromkeys(row["width"] for row in rows):
        for name, meaning in ARMS.items():
            own = [row for row in rows if (row["network"], row["width"]) == (name, width)]
            if own:
                columns = ([100 * float(row[probe]) for row in own] for probe in ("knn", "linear"))
                cells = [f"{statistics.fmean(each):.1f} ± {statistics.pstdev(each):.1f}" for each in columns]
                lines.append([width, meaning, *cells])
    seeds = len({row["seed"] for row in rows})
    head = f"# The first run, beside other ways\n\nIn %, mean and deviation of {seeds} seeds. {source}"
    return f"{head}\n\n" + markdown(["width", "network", "kNN", "linear"], lines)


def main() -> None:
    """Measure the seeds that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    path = HERE / "results" / "digits.csv"
    for seed in range(given.seeds):
        if str(seed) not in {row["seed"] for row in read_rows(path)}:
            append_rows(path, FIELDS, list(run(seed)))
    rows = read_rows(path)
    source = origin(json.loads(path.with_suffix(".json").read_text()))
    (HERE / "results" / "table.md").write_text(table(rows, source))
    shown = []
    for row in (row for row in rows if row["network"] != "together"):
        costs, shares = (int(row["parameters"]), int(row["macs"])), {"linear": float(row["linear"])}
        shown.append(Row(float(row["width"]), *costs, shares, row["network"]))
    PACKAGED.parent.mkdir(exist_ok=True)
    PACKAGED.write_text(to_csv(shown))


if __name__ == "__main__":
    main()
