"""How many images a second does `slimmable pretrain` train on, and what takes the time beside forward and backward?

    python -m benchmarks.throughput            # ten minutes on one core
    python -m benchmarks.throughput --quick    # a smoke run of seconds

`steps`: training steps of SimCLR by the defaults of `slimmable pretrain`, at one width and at four, in turn with those
of a plain loop around lightly's loss: the same network, images, views, batches and optimizer; "plain, four networks"
trains one after the other. `run`: a whole run of `slimmable pretrain`, and the share of each of its parts. Times are
processor times of one thread.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightly.loss import NTXentLoss

import slimmable
from benchmarks.measuring import (
    compare,
    interleaved,
    markdown,
    median_cpu_ms,
    origin,
    ratio_of,
    read_results,
    write_result,
)
from slimmable._small_resnet import small_resnet
from slimmable.cli import data, pretrain, run
from slimmable.cli.config import PretrainConfig, configure
from slimmable.cli.run import build_method

HERE = Path(__file__).parent
CHANNELS = (16, 32, 64, 128)
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "forward and backward": ((pretrain.Method, "step"),),
    "views": ((data.Views, "__getitems__"),),
    "rest of a step": ((pretrain.Training, "take_step"),),
    "checkpoints": ((pretrain.Training, "save"), (pretrain.Training, "check_finite")),
    "evaluation": ((pretrain, "rows_of_run"),),
    "networks, report and pictures": ((run, "save_networks"), (pretrain, "report_run"), (pretrain, "draw_neighbours")),
    "images": ((data, "load_images"),),
}


def training(config: PretrainConfig, images: data.Images, width: float = 1.0) -> pretrain.Training:
    """Return a training of a network with this share of the channels."""
    torch.manual_seed(0)
    backbone = small_resnet(in_chans=images.channels, channels=tuple(round(width * each) for each in CHANNELS))
    return pretrain.Training(config, build_method(config, backbone, images.channels, 10), images, torch.device("cpu"))


def plain_step(given: pretrain.Training, temperature: float) -> Callable[[], object]:
    """Return a step of a plain loop, with the network, views and optimizer of this training of one width."""
    encoder = slimmable.extract(given.method.encoder, 1.0).train()
    loss, optimizer = NTXentLoss(temperature=temperature), torch.optim.AdamW(encoder.parameters(), fused=True)

    def step() -> None:
        first, second, _ = next(given._batches)
        optimizer.zero_grad()
        loss(encoder(first), encoder(second)).backward()
        optimizer.step()

    return step


def steps(config: PretrainConfig, images: data.Images, seconds: float) -> list[dict[str, Any]]:
    """Return one row for each loop."""
    alone = replace(config, widths=(1.0,), slow_start=0.0)
    plain = [plain_step(training(alone, images, width), config.temperature) for width in config.widths]
    four = training(replace(config, slow_start=0.0), images)
    calls: dict[str, Callable[[], object]] = {
        "plain, one network": plain[0],
        "slimmable, one width": training(alone, images).take_step,
        "plain, four networks": lambda: [each() for each in plain],
        "slimmable, four widths": four.take_step,
    }
    times, rows = interleaved(calls, seconds, least=8), []
    for name, baseline in zip(calls, [next(iter(calls))] * 2 + ["plain, four networks"] * 2, strict=True):
        rate = config.batch_size / median_cpu_ms(times[name]) * 1000
        rows.append({"loop": name, "images_per_second": round(rate), **compare(times[name], times[baseline])})
        print(rows[-1], flush=True)
    return rows


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up the processor time of each part while the block runs, without that of parts inside."""
    inside = [0.0]

    def watched(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - start
                spent[part] += took - inside.pop()
                inside[-1] += took

        return call

    patches = [
        mock.patch.object(owner, name, watched(getattr(owner, name), part))
        for part, places in PARTS.items()
        for owner, name in places
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def whole_run(**options: Any) -> list[dict[str, Any]]:
    """Return one row for each part of a run."""
    spent = dict.fromkeys(PARTS, 0.0)
    with tempfile.TemporaryDirectory() as folder, timed(spent):
        start = time.process_time()
        slimmable.pretrain(output=Path(folder, "run"), workers=0, quiet=True, **options)
        total = time.process_time() - start
    spent["the rest"] = total - sum(spent.values())
    rows = [{"part": part, "seconds": round(took, 2), "share": round(took / total, 4)} for part, took in spent.items()]
    print(rows, flush=True)
    return rows


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    results = {result["name"]: result for result in read_results(folder)}
    loops = [(row["loop"], row["images_per_second"], ratio_of(row)) for row in results["steps"]["rows"]]
    parts = [(row["part"], f"{row['seconds']:.1f}", f"{row['share']:.1%}") for row in results["run"]["rows"]]
    first = markdown(("loop", "images per second", "time, of the plain loop's"), loops)
    return f"{first}\n{markdown(('part', 'processor seconds', 'share'), parts)}\n{origin(results['run'])}\n"


def main() -> None:
    """Measure, write the result files and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="few steps of a batch of 8, one epoch on few images")
    given = parser.parse_args()
    torch.set_num_threads(1)
    small: dict[str, Any] = {"num_images": 64, "batch_size": 8, "epochs": 1} if given.quick else {}
    config = replace(configure(small), epochs=1000)  # which do not end
    rows = steps(config, data.load_images(config), 0.0 if given.quick else 120.0)
    write_result(given.out, "steps", rows, f"batch{config.batch_size}")
    write_result(given.out, "run", whole_run(**small), "default")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
