"""What does a step that trains four widths cost, in time and in memory, over plain networks?

    python -m benchmarks.training_step.run            # all models, about 10 minutes
    python -m benchmarks.training_step.run --quick    # a smoke run of seconds

Time: a step of `SlimRecipe` (by `backward`, by the loop over `widths`, by `total` with one backward for all) over the
sum of the steps of four plain networks, those that `slimmable.extract` gives. Memory: what autograd holds for the
backward at the peak of the step, over the peak of a step of the plain full network; parameters and buffers are not
counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import slimmable
from benchmarks.measuring import compare, interleaved, markdown, origin, read_results, write_result
from benchmarks.training_step.saved import peak_saved_bytes
from slimmable.losses import nt_xent, nt_xent_logits

HERE = Path(__file__).parent
MODELS = ("resnet18", "resnet50", "vit_tiny_patch16_224")
WIDTHS = (1.0, 0.75, 0.5, 0.25)
DIMENSION = 128
GOALS = {"time": 1.03, "saved": 1.05}
TOGETHER = ("recipe.total, distilling", "one summed backward")  # the latter in results from before `total`


def plain_step(models: Iterable[nn.Module], views: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """One step of each model by itself."""
    pairs = [(model, torch.optim.SGD(model.parameters())) for model in models]

    def step() -> None:
        for model, optimizer in pairs:
            optimizer.zero_grad()
            nt_xent(*map(model, views)).backward()

    return step


def slim_step(
    way: str, model: nn.Module, views: tuple[Tensor, Tensor], distill: slimmable.OnlineDistillation | None = None
) -> Callable[[], None]:
    """One step of all widths by `SlimRecipe`: "backward", "total", or the "loop" over its widths."""
    optimizer = torch.optim.SGD(model.parameters())
    recipe = slimmable.SlimRecipe(model, distill=distill)

    def step() -> None:
        optimizer.zero_grad()
        if way == "backward":
            recipe.backward(lambda: nt_xent(*map(model, views)))
        elif way == "total":
            recipe.total(lambda: nt_xent(*map(model, views))).backward()
        else:
            for _ in recipe.widths(1.0):
                z0, z1 = map(model, views)
                recipe.loss(nt_xent(z0, z1), teach=nt_xent_logits(z0, z1) if distill else None).backward()
                del z0, z1

    return step


def measure(name: str, seconds: float, batch: int, size: int, least: int) -> list[dict[str, Any]]:
    """Return a row per way of training four widths."""
    sized = {"img_size": size} if name.startswith("vit") else {}
    plain = timm.create_model(name, num_classes=DIMENSION, **sized).train()
    slim = slimmable.slimify(plain, WIDTHS, example_inputs=torch.zeros(2, 3, size, size))
    views = (torch.randn(batch, 3, size, size), torch.randn(batch, 3, size, size))
    apart = plain_step([slimmable.extract(slim, width) for width in WIDTHS], views)
    steps = {
        "recipe.backward": slim_step("backward", slim, views),
        "recipe.backward, distilling": slim_step("backward", slim, views, slimmable.OnlineDistillation()),
        "recipe.widths, distilling": slim_step("loop", slim, views, slimmable.OnlineDistillation()),
        "recipe.total, distilling": slim_step("total", slim, views, slimmable.OnlineDistillation()),
    }
    full_bytes = peak_saved_bytes(plain_step([plain], views), plain)
    rows = []
    times = interleaved({"apart": apart, **steps}, seconds, least)
    for way, step in steps.items():
        row = {"way": way, "batch": batch, "image_size": size, **compare(times[way], times["apart"])}
        saved = peak_saved_bytes(step, slim)
        row |= {"saved_bytes": saved, "saved_ratio": round(saved / full_bytes, 4), "goals": GOALS}
        print(f"{name} {row}", flush=True)
        rows.append(row)
    return rows


def missed(row: dict[str, Any]) -> bool:
    """Tell whether a way misses the goal in time; `recipe.total` is there to compare with."""
    return bool(row["way"] not in TOGETHER and row["ratio"] > row["goals"]["time"])


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    header = (
        "model",
        "threads",
        "views x batch x image",
        "four-width step",
        "plain networks, CPU ms",
        "time / plain networks",
        "95 %",
        "saved, MB",
        "saved / plain full network",
    )
    results = read_results(folder)
    lines = [
        (
            result["name"],
            result["machine"]["threads"],
            f"2 x {row['batch']} x {row['image_size']}",
            row["way"],
            f"{row['baseline_cpu_ms']:.0f}",
            f"{row['ratio']:.3f}" + (" (missed)" if missed(row) else ""),
            f"{row['low']:.3f} – {row['high']:.3f}",
            f"{row['saved_bytes'] / 1e6:.1f}",
            f"{row['saved_ratio']:.3f}",
        )
        for result in results
        for row in result["rows"]
    ]
    sources = sorted({origin(result) for result in results})
    goals = f"Goals for the recipe: time {GOALS['time']}, saved {GOALS['saved']}."
    return markdown(header, lines) + "\n" + "\n".join([goals, *sources]) + "\n"


def main() -> None:
    """Measure, write one result file per model, and the table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names")
    parser.add_argument("--batch-size", type=int, default=8, help="images per view")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=120, help="time per model")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="one small model, few repetitions: a smoke run")
    given = parser.parse_args()
    names, seconds, batch, size, least = given.models, given.seconds, given.batch_size, given.image_size, 8
    if given.quick:
        names, seconds, batch, size, least = ("resnet10t",), 0, 2, 32, 4
    torch.manual_seed(0)
    for name in names:
        rows = measure(name, seconds, batch, size, least)
        write_result(given.out, name, rows, variant=f"batch{batch}-image{size}")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
