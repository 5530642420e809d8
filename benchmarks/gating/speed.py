"""How much of the multiply-adds that gates save does the static network save in time?

    python -m benchmarks.gating.speed            # all models, about 12 minutes on a quiet machine
    python -m benchmarks.gating.speed --quick    # a smoke run of seconds

Each model is gated, `extract_gated` makes static networks for some budgets, and the dense and the static network are
timed in turn, both treated alike. Which units the gates open is drawn: time depends on how many stay, not on which.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

import slimmable
from benchmarks.measuring import compare, interleaved, markdown, origin, read_results, write_result
from slimmable.gating import LayerGates

HERE = Path(__file__).parent
MODELS = ("resnet18", "resnet50", "mobilenetv3_large_100", "convnext_atto", "vit_tiny_patch16_224")
BUDGETS = (0.5, 0.3)
ROUND_TO = (1, 16)
WAYS = ("as it is", "channels last", "folded, channels last", "compiled")  # folded: BatchNorms into convolutions


class Drawn(nn.Module):
    """Opens each unit to a degree that is the same for all images: uniform, around a level of the gate's own."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.open = nn.Parameter((torch.rand(units) + torch.rand(1)) / 2)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return the same mask for each image."""
        return self.open.expand(len(pooled), -1)


def gated(name: str, size: int) -> tuple[nn.Module, nn.Module]:
    """Return the dense network and the same one with drawn gates."""
    sized = {"img_size": size} if name.startswith("vit") else {}
    dense = timm.create_model(name, **sized).eval()
    model = slimmable.gating.gate(dense, example_inputs=torch.zeros(2, 3, size, size))
    for gates in model.modules():
        if isinstance(gates, LayerGates):
            gates.at[0] = Drawn(gates.at[0].expand.out_features)
    return dense, model.eval()


def suits(way: str, model: nn.Module) -> bool:
    """Tell whether a treatment does something: it needs BatchNorms of torch's own type, or several convolutions."""
    if way.startswith("folded"):
        return any(type(module) is nn.BatchNorm2d for module in model.modules())
    return way != "channels last" or sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1


def call(model: nn.Module, images: torch.Tensor, way: str) -> Callable[[], object]:
    """Return inference with a treated copy of the model."""
    model = copy.deepcopy(model).eval()
    if way.startswith("folded"):
        model = fuse(model)
    if "channels last" in way:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    if way == "compiled":
        model = torch.compile(model)

    def inference() -> object:
        with torch.inference_mode():
            return model(images)

    return inference


def measure(name: str, batch: int, size: int, way: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per budget and rounding that the model can be extracted with."""
    torch.manual_seed(0)
    dense, model = gated(name, size)
    images = torch.randn(batch, 3, size, size)
    rows = []
    for budget, round_to in itertools.product(given.budgets, given.round_to) if suits(way, dense) else ():
        try:
            static = slimmable.gating.extract_gated(
                model, [images[:1]], budget=budget, round_to=round_to, recalibrate=False
            )
        except slimmable.errors.UsageError as error:
            print(f"{name}, rounded to {round_to}: {error}")
            continue
        macs = [slimmable.profile(each, (3, size, size), repeats=0).rows[0].macs for each in (static, dense)]
        calls = {key: call(each, images, way) for key, each in (("dense", dense), ("static", static), ("again", dense))}
        times = interleaved(calls, given.seconds, given.least)
        saved = 1 - macs[0] / macs[1]
        found = compare(times["static"], times["dense"])
        row = {"way": way, "batch": batch, "image_size": size, "budget": budget, "round_to": round_to, **found}
        row |= {"macs_saving": round(saved, 4), "noise": compare(times["again"], times["dense"])["ratio"]}
        for part, ratio in {"": "ratio", "_low": "high", "_high": "low", "_wall": "wall_ratio"}.items():
            row[f"quotient{part}"] = round((1 - found[ratio]) / saved, 4)
        print(f"{name} {row}", flush=True)
        rows.append(row)
    return rows


def table(folder: Path) -> str:
    """Return the quotients of a folder, time saved over multiply-adds saved, as Markdown."""
    results = read_results(folder)
    settings = sorted({(-row["budget"], row["round_to"]) for result in results for row in result["rows"]})
    lines = []
    for result in results:
        rows = {(-row["budget"], row["round_to"]): row for row in result["rows"]}
        dense = f"{result['rows'][0]['baseline_cpu_ms']:.0f}"
        cells = [_cell(rows[setting]) if setting in rows else "–" for setting in settings]
        lines.append((result["name"], result["rows"][0]["way"], dense, *cells))
    named = [f"budget {-budget}, round_to {round_to}" for budget, round_to in settings]
    sources = "\n".join(sorted({origin(result) for result in results}))
    return markdown(("model", "both are", "dense, CPU ms", *named), lines) + f"\n{sources}\n"


def _cell(row: dict[str, Any]) -> str:
    return "{quotient:.2f} ({quotient_low:.2f} – {quotient_high:.2f})".format(**row)


def main() -> None:
    """Measure, write one result file per model and treatment, and the table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="treatments of both networks")
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, help="shares of the multiply-adds")
    parser.add_argument("--round-to", nargs="+", type=int, default=ROUND_TO)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--seconds", type=float, default=8, help="time per comparison")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speed", help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="one small model, few repetitions: a smoke run")
    given = parser.parse_args()
    given.least = 9
    if given.quick:
        given.models, given.ways, given.budgets, given.round_to = ("resnet10t",), WAYS[:3], (0.5,), (1, 8)
        given.batch, given.image_size, given.seconds, given.least = 2, 32, 0, 3
    for name, way in itertools.product(given.models, given.ways):
        rows = measure(name, given.batch, given.image_size, way, given)
        if rows:
            treated = way.replace(",", "").replace(" ", "_")
            write_result(given.out, name, rows, variant=f"{treated}-batch{given.batch}-image{given.image_size}")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
