"""What does converting and switching a model cost, in time and in memory?

    python -m benchmarks.conversion.run            # all models, about 5 minutes; the largest needs 20 GiB
    python -m benchmarks.conversion.run --quick    # a smoke run of seconds

Each model is converted in a process of its own, twice: the first conversion of a process also loads parts of torch, the
second, of a fresh copy of the model, is the one in the table. Memory is the growth of the process's peak while it
converts, less the copy that `slimify` returns; `inplace` makes none. `--meta` shows models that no memory here holds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import slimmable
from benchmarks.measuring import markdown, origin, read_results, write_result

HERE = Path(__file__).parent
MODELS = (
    "resnet50", "vit_base_patch16_224", "densenet121", "swin_tiny_patch4_window7_224", "efficientnet_b0",
    "convnext_tiny", "coat_tiny", "vit_gigantic_patch14_clip_224", "eva02_enormous_patch14_clip_224",
)  # fmt: skip
META = ("vit_7b_patch16_dinov3", "resnetrs420")
INPLACE_FROM = 1e9  # parameters
WIDTHS = (1.0, 0.75, 0.5, 0.25)


class Operations(TorchDispatchMode):
    """Counts the operations of a forward."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


def peak_bytes() -> int:
    """Return the largest memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plain(name: str, meta: bool) -> nn.Module:
    """Make a timm model with random weights, or with none."""
    with torch.device("meta" if meta else "cpu"):
        return timm.create_model(name).eval()


def measure(name: str, meta: bool) -> dict[str, Any]:
    """Convert a model and switch it."""
    warm = timm.create_model("test_resnet")
    slimmable.slimify(warm, WIDTHS)
    model = plain(name, meta)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    inplace = parameters >= INPLACE_FROM
    before = peak_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    slim = slimmable.slimify(model, WIDTHS, inplace=inplace)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    grown = peak_bytes() - before - (0 if inplace or meta else size)
    first = {"seconds": wall, "cpu_seconds": cpu}
    if not inplace:
        wall, cpu = time.perf_counter(), time.process_time()
        slimmable.slimify(model, WIDTHS)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    switches = []
    for width in WIDTHS * 10:
        start = time.perf_counter()
        slimmable.set_width(slim, width)
        switches.append((time.perf_counter() - start) * 1e3)
    shapes, images = plain(name, True), torch.zeros(2, *model.pretrained_cfg["input_size"], device="meta")
    with torch.device("meta"), torch.no_grad(), Operations() as operations:
        shapes(images)
    return {
        "model": name + (" (meta)" if meta else ""),
        "parameters": parameters,
        "operations": operations.count,
        "inplace": inplace,
        "seconds": wall,
        "cpu_seconds": cpu,
        "first": first,
        "ms_per_operation": wall * 1e3 / operations.count,
        "ns_per_parameter": wall * 1e9 / parameters,
        "mib_beside": grown / 2**20,
        "set_width_ms": statistics.median(switches),
    }


def in_a_process(name: str, meta: bool) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.conversion.run", "--one", name, *(["--no-numbers"] if meta else [])]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(found.splitlines()[-1]))


def table(folder: Path) -> str:
    """Return the table of all results."""
    results = read_results(folder)
    rows = [
        [
            row["model"],
            f"{row['parameters'] / 1e6:,.1f} M",
            row["operations"],
            f"{row['seconds']:.2f} s",
            f"{row['ms_per_operation']:.2f} ms",
            f"{row['ns_per_parameter']:.0f} ns",
            f"{max(0, row['mib_beside']):.0f} MiB{' (in place)' if row['inplace'] else ''}",
            f"{row['set_width_ms']:.2f} ms",
        ]
        for result in results
        for row in result["rows"]
    ]
    header = ["model", "parameters", "operations", "`slimify`", "per operation", "per parameter", "memory beside"]
    lines = sorted({origin(result) for result in results})
    return markdown([*header, "`set_width`"], rows) + "\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write one result file per model, and the table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="timm names")
    parser.add_argument("--meta", nargs="*", default=list(META), metavar="NAME", help="timm names, without numbers")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="one small model: a smoke run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--no-numbers", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.no_numbers)))
        return
    names = [(name, False) for name in given.models] + [(name, True) for name in given.meta]
    for name, meta in [("test_resnet", False)] if given.quick else names:
        write_result(given.out, name, [in_a_process(name, meta)], variant="meta" if meta else "cpu")
        (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
