"""How many graphs does `torch.compile` make of a slimmable network, and what do they take?

    python -m benchmarks.compiled                   # about ten minutes
    python -m benchmarks.compiled --model resnet50 --image-size 224
    python -m benchmarks.compiled --quick           # a smoke run of seconds, without a compiler

Three epochs of training at all widths, with a last batch that is smaller, and an evaluation of each width after each,
compiled and not. The rows say how many graphs there are after each epoch and how long the epoch took. `four widths` is
an ordinary conversion, `drawn widths` a universal one with `SlimRecipe(random_widths=2)`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import slimmable
from benchmarks.measuring import markdown, origin, read_results, write_result

HERE = Path(__file__).parent
WIDTHS = (1.0, 0.75, 0.5, 0.25)
EPOCHS = 3


def epoch(run: Any, model: nn.Module, recipe: slimmable.SlimRecipe, batches: list[torch.Tensor]) -> None:
    """Train on all batches, then evaluate each width on the first and the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for images in batches:
        optimizer.zero_grad()
        recipe.backward(lambda images=images: run(images).square().mean())
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for width in WIDTHS:
            with slimmable.at_width(model, width):
                for images in (batches[0], batches[-1]):
                    run(images)


def measure(name: str, size: int, batch: int, steps: int, backend: str) -> list[dict[str, Any]]:
    """Return one row for each kind of conversion, compiled and not."""
    rows: list[dict[str, Any]] = []
    for drawn in (0, 2):
        for compiled in (True, False):
            torch.manual_seed(0)
            torch._dynamo.reset()
            model = slimmable.slimify(timm.create_model(name), WIDTHS, universal=drawn > 0)
            counter = CompileCounterWithBackend(backend)
            run = torch.compile(model, backend=counter) if compiled else model
            recipe = slimmable.SlimRecipe(model, random_widths=drawn)
            batches = [torch.rand(batch if step < steps - 1 else batch - 3, 3, size, size) for step in range(steps)]
            row: dict[str, Any] = {"widths": "drawn widths" if drawn else "four widths", "compiled": compiled}
            row |= {"graphs": [], "seconds": []}
            for _ in range(EPOCHS):
                start = time.process_time()
                epoch(run, model, recipe, batches)
                row["seconds"].append(round(time.process_time() - start, 2))
                row["graphs"].append(counter.frame_count)
            rows.append(row)
            print(row, flush=True)
    return rows


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    header = ("model", "widths", "", "graphs after each epoch", "processor seconds of each epoch")
    results = read_results(folder)
    lines = [
        (
            f"{result['name']}, {result['steps']} steps of {result['batch']} x {result['image_size']} px",
            row["widths"],
            "compiled" if row["compiled"] else "eager",
            ", ".join(map(str, row["graphs"])),
            ", ".join(f"{seconds:.1f}" for seconds in row["seconds"]),
        )
        for result in results
        for row in result["rows"]
    ]
    return f"{markdown(header, lines)}\n{origin(results[0])}\n"


def main() -> None:
    """Measure, write one result file and the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet", help="model of timm (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=96, help="in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=9, help="steps of an epoch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="two steps of 8 images of 32 pixels, not compiled to code")
    given = parser.parse_args()
    if given.quick:
        given.image_size, given.batch, given.steps = 32, 8, 2
    sizes = {"image_size": given.image_size, "batch": given.batch, "steps": given.steps}
    backend = "eager" if given.quick else "inductor"
    rows = measure(given.model, given.image_size, given.batch, given.steps, backend)
    write_result(given.out, given.model, rows, backend, **sizes)
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
