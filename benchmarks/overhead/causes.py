"""Where does the overhead of a narrow width come from? The three costs that a plain network does not have, one by one.

    python -m benchmarks.overhead.causes            # all models, about a minute
    python -m benchmarks.overhead.causes --quick    # a smoke run of seconds

read: taking the block of every parameter. copy: making the blocks of the convolutions contiguous, which torch does in
every convolution. zeros: filling the full-size gradient of every parameter that is cut, as its backward does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import slimmable
from benchmarks.measuring import interleaved, markdown, median_cpu_ms, origin, read_results, write_result
from benchmarks.overhead.run import HERE, MODELS, forward, train
from slimmable.view.state import state_of

WIDTHS = (1.0, 0.5, 0.25)
COSTS = ("read", "copy", "zeros")


def blocks(model: nn.Module) -> Callable[[], list[Tensor]]:
    """Read every cut parameter."""
    found = cut_parameters(model)
    return lambda: [getattr(module, name) for module, name in found]


def contiguous(model: nn.Module) -> Callable[[], None]:
    """Copy the weight of every convolution, one at a time."""
    convs = [module for module in model.modules() if isinstance(module, _ConvNd)]

    def call() -> None:
        for conv in convs:
            conv.weight.contiguous()

    return call


def zeros(model: nn.Module) -> Callable[[], list[Tensor]]:
    """Fill the gradient of every cut parameter."""
    full = [module._parameters[name] for module, name in cut_parameters(model)]
    return lambda: [torch.zeros_like(parameter) for parameter in full if parameter is not None]


def cut_parameters(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return module and name of every parameter that the active width cuts."""
    return [
        (module, name)
        for module in model.modules()
        if (state := state_of(module)) is not None
        for name in state.active.cuts
        if module._parameters.get(name) is not None
    ]


def measure(name: str, seconds: float, size: int, least: int) -> list[dict[str, object]]:
    """Return a row per narrow width: the costs beside the plain forward and training step of one image."""
    converted = slimmable.slimify(timm.create_model(name), WIDTHS, example_inputs=torch.zeros(2, 3, size, size))
    rows: list[dict[str, object]] = []
    for width in WIDTHS[1:]:
        slimmable.set_width(converted, width)
        plain, images = slimmable.extract(converted, width), torch.randn(1, 3, size, size)
        with torch.no_grad():
            calls = dict(zip(COSTS, (blocks(converted), contiguous(converted), zeros(converted)), strict=True))
            times = interleaved({"forward": forward(plain, images), **calls}, seconds, least)
        times |= interleaved({"train": train(plain, images)}, seconds, least)
        rows.append({"width": width, "image_size": size} | {key: median_cpu_ms(found) for key, found in times.items()})
        print(name, rows[-1], flush=True)
    return rows


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    results = read_results(folder)
    header = ("model", "threads", "width", "plain forward, CPU ms", "plain training step", *COSTS)
    lines = [
        (
            result["name"],
            result["machine"]["threads"],
            row["width"],
            *(f"{row[key]:.2f}" for key in ("forward", "train", *COSTS)),
        )
        for result in results
        for row in result["rows"]
    ]
    return markdown(header, lines) + "\n" + "\n".join(sorted({origin(result) for result in results})) + "\n"


def main() -> None:
    """Measure, write one result file per model, and the table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="time per comparison")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "causes", help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="one small model, few repetitions: a smoke run")
    given = parser.parse_args()
    names, seconds, size, least = MODELS, given.seconds, 224, 8
    if given.quick:
        names, seconds, size, least = ("resnet10t",), 0, 64, 4
    for name in names:
        write_result(given.out, name, measure(name, seconds, size, least), variant=f"batch1-image{size}")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
