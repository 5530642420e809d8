"""What int8 costs in accuracy, and saves in size and time, at each width of networks trained with labels.

python -m benchmarks.int8 --data FOLDER      # Fashion-MNIST, see benchmarks/slimclr/README.md; half an hour
python -m benchmarks.int8 --images 2048      # on cluttered digits
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

import numpy as np
import onnxruntime
import timm
import torch
from torch import nn

import slimmable
from benchmarks.intervals import shown
from benchmarks.measuring import append_rows, interleaved, markdown, median_cpu_ms, origin, read_rows
from benchmarks.runtime.training import WIDTHS, Data, digits, fashion

HERE = Path(__file__).parent
FIELDS = (
    "model",
    "seed",
    "width",
    "float_accuracy",
    "int8_accuracy",
    "float_bytes",
    "int8_bytes",
    "float_ms",
    "int8_ms",
)


def measure(name: str, data: Data, seed: int, epochs: int, seconds: float) -> list[dict[str, object]]:
    """Train a network, write both files of all widths, and run them on the test images and, for time, on one."""
    torch.manual_seed(seed)
    (images, labels), (test, truth) = data.train, data.test
    images, test = (images - images.mean()) / images.std(), (test - images.mean()) / images.std()
    size = {"img_size": images.shape[-1], "patch_size": 4} if "vit" in name else {}
    plain = timm.create_model(name, num_classes=10, in_chans=images.shape[1], **size)
    model = slimmable.slimify(plain, WIDTHS, example_inputs=images[:2])
    steps = epochs * (len(labels) // 64)
    recipe = slimmable.SlimRecipe(model, steps=steps, distill=slimmable.OnlineDistillation())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels))[: len(labels) // 64 * 64].split(64):
            x, y = images[rows], labels[rows]
            optimizer.zero_grad()
            recipe.backward(lambda: nn.functional.cross_entropy(model(x), y))  # noqa: B023 -- called at once
            optimizer.step()
            schedule.step()
    model.eval()
    options, found = onnxruntime.SessionOptions(), {}
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    with tempfile.TemporaryDirectory() as folder:
        for kind, batches in (("float", None), ("int8", images[:256].split(64))):
            path = Path(folder, f"{kind}.onnx")
            slimmable.export(model, path, example_inputs=images[:2], calibration=batches)
            found[kind] = onnxruntime.InferenceSession(path, options), path.stat().st_size
    rows = []
    for position, width in enumerate(WIDTHS):
        row: dict[str, object] = {"model": name, "seed": seed, "width": width}
        calls = {}
        for kind, (session, stored) in found.items():
            feed = {"images": test.numpy(), "width": np.array(position)}
            (scores,) = session.run(None, feed)
            row[f"{kind}_accuracy"] = round(float((scores.argmax(1) == truth.numpy()).mean()), 4)
            row[f"{kind}_bytes"] = stored
            one = {**feed, "images": test[:1].numpy()}
            calls[kind] = lambda session=session, one=one: session.run(None, one)
        for kind, times in interleaved(calls, seconds).items():
            row[f"{kind}_ms"] = median_cpu_ms(times)
        rows.append(row)
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Return one line for each network and width, means over the seeds, as Markdown."""
    header = (
        "network",
        "seeds",
        "width",
        "float, %",
        "int8, %",
        "difference",
        "int8 / float, bytes",
        "int8 / float, time",
    )
    lines = []
    for name, width in dict.fromkeys((row["model"], row["width"]) for row in rows):
        own = [row for row in rows if (row["model"], row["width"]) == (name, width)]
        floats, ints = ([100 * float(row[f"{kind}_accuracy"]) for row in own] for kind in ("float", "int8"))
        lost = [b - a for a, b in zip(floats, ints, strict=True)]
        sizes, times = ([float(row[f"int8_{c}"]) / float(row[f"float_{c}"]) for row in own] for c in ("bytes", "ms"))
        figures = (f"{fmean(sizes):.2f}", f"{fmean(times):.2f}")
        lines.append((name, len(own), width, shown(floats), shown(ints), shown(lost, 2, "+"), *figures))
    return markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", nargs="+", default=["test_resnet", "test_vit"])
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files (default: cluttered digits)")
    parser.add_argument("--images", type=int, default=12_800, help="to train on (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.out / ("digits.csv" if given.data is None else "fashion.csv")
    count, epochs, seconds = (256, 1, 0.1) if given.quick else (given.images, given.epochs, 1.0)
    for seed in given.seeds:
        data = digits(count, seed) if given.data is None else fashion(given.data, seed, count)
        for name in given.models:
            rows = measure(name, data, seed, epochs, seconds)
            append_rows(path, FIELDS, rows)
            print(*rows, sep="\n", flush=True)
    made = json.loads(path.with_suffix(".json").read_text())
    (given.out / "table.md").write_text(f"{table(read_rows(path))}\n{origin(made)}\n")


if __name__ == "__main__":
    main()
