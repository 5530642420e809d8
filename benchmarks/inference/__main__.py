"""What does a narrow width cost in a block of `slimmable.inference`, over the network that `slimmable.extract` gives?

    python -m benchmarks.inference            # all models at two image sizes, about 10 minutes on a quiet machine
    python -m benchmarks.inference --quick    # a smoke run of seconds

One image at a time, in eval mode without gradients; all networks take turns in one process. "Outside" is the same
model without the block, "noise" an exact copy of the extracted network. The outputs must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import slimmable
from benchmarks.measuring import compare, interleaved, markdown, origin, read_results, write_result

HERE = Path(__file__).parent
MODELS = ("resnet18", "resnet50", "vit_tiny_patch16_224")
WIDTHS = (1.0, 0.75, 0.5, 0.25)
SIZES = (224, 64)
GOAL = 1.02


def copied(model: nn.Module) -> dict[int, float]:
    """Return the MB of each block that takes memory of its own, by its address."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    blocks = vars(model)["_compiled_call_impl"].blocks
    parts = [block.part for known in blocks.values() for block in known.values()]
    return {part.data_ptr(): part.nbytes / 1e6 for part in parts if part.untyped_storage().data_ptr() not in own}


def measure(name: str, size: int, seconds: float, least: int) -> list[dict[str, Any]]:
    """Return one row per width."""
    sized = {"img_size": size} if name.startswith("vit") else {}
    plain = timm.create_model(name, **sized)
    model = slimmable.slimify(plain, WIDTHS, example_inputs=torch.zeros(2, 3, size, size)).eval()
    outside, image = copy.deepcopy(model), torch.randn(1, 3, size, size)
    rows: list[dict[str, Any]] = []
    with slimmable.inference(model):
        known: dict[int, float] = {}
        for width in WIDTHS:
            slimmable.set_width(model, width)
            slimmable.set_width(outside, width)
            small = slimmable.extract(model, width)
            networks = {"extracted": small, "noise": copy.deepcopy(small), "inference": model, "outside": outside}
            outputs = [network(image) for network in networks.values()]
            assert all(torch.equal(output, outputs[0]) for output in outputs), (name, width)
            times = interleaved({key: lambda it=it: it(image) for key, it in networks.items()}, seconds, least)
            row = compare(times["inference"], times["extracted"])
            for other in ("outside", "noise"):
                row[other] = compare(times[other], times["extracted"])["ratio"]
            row["copied_mb"] = round(sum(copied(model).values()) - sum(known.values()), 2)
            known = copied(model)
            row["extracted_mb"] = round(sum(parameter.nbytes for parameter in small.parameters()) / 1e6, 2)
            rows.append({"width": width, "image_size": size, "goal": GOAL, **row})
            print(name, rows[-1], flush=True)
    return rows


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    header = ("model", "image", "width", "extracted, CPU ms", "inference / extracted", "95 %", "outside", "noise")
    results = read_results(folder)
    lines = [
        (
            result["name"],
            row["image_size"],
            row["width"],
            f"{row['baseline_cpu_ms']:.1f}",
            f"{row['ratio']:.3f}" + ("" if row["ratio"] <= row["goal"] else " (missed)"),
            f"{row['low']:.3f} – {row['high']:.3f}",
            f"{row['outside']:.3f}",
            f"{row['noise']:.3f}",
            f"{row['copied_mb']:.1f}",
            f"{row['extracted_mb']:.1f}",
        )
        for result in results
        for row in result["rows"]
    ]
    sources = sorted({origin(result) for result in results})
    return markdown((*header, "copied, MB", "extracted, MB"), lines) + "\n" + "\n".join(sources) + "\n"


def main() -> None:
    """Measure, write one result file per model and image size, and the table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names")
    parser.add_argument("--image-sizes", nargs="+", type=int, default=SIZES, metavar="SIZE")
    parser.add_argument("--seconds", type=float, default=20, help="time per width")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="one small model, few repetitions: a smoke run")
    given = parser.parse_args()
    names, sizes, seconds, least = given.models, given.image_sizes, given.seconds, 12
    if given.quick:
        names, sizes, seconds, least = ("resnet10t",), (32,), 0, 4
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, size in itertools.product(names, sizes):
        write_result(given.out, name, measure(name, size, seconds, least), variant=f"batch1-image{size}")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
