"""What does a step of four widths cost in slimmable, and in the published code of others?

    python -m benchmarks.side_by_side --programs FOLDER   # half an hour
    python -m benchmarks.side_by_side --only ours --quick

FOLDER holds checkouts of github.com/JiahuiYu/slimmable_networks and github.com/mzhaoshuai/SlimCLR; OFA is the package
`ofa`, mmrazor the packages `mmrazor` (1.0.0), `mmcv-lite` (2.1.0) and `mmengine`. What is not there is left out. Each
runs in a process of its own, in turn with the plain networks of its four widths: the step (forward, cross-entropy and
backward at each width), the forward of one image at each width in eval mode, what the step adds to the memory of the
process over the step of the full plain network, and the processor time of making the network. Times are those of one
thread.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import slimmable
from benchmarks.measuring import (
    compare,
    interleaved,
    markdown,
    median_cpu_ms,
    origin,
    peak_bytes,
    ratio_of,
    read_results,
    reset_peak,
    write_result,
)
from benchmarks.side_by_side.networks import CONTESTANTS, IMAGE, WIDTHS

HERE = Path(__file__).parent
NAMES = {
    "ours": "slimmable",
    "yu": "slimmable_networks (Yu)",
    "slimclr": "SlimCLR, published code",
    "ofa": "once-for-all (ResNet-50D)",
    "mmrazor": "mmrazor",
}


def steps_of(name: str, folder: Path, batch: int) -> tuple[dict[str, Callable[[], object]], float, nn.Module]:
    """Return the calls that are compared, by what they run, the processor seconds of making the network, and it."""
    torch.manual_seed(0)
    start = time.process_time()
    contestant = CONTESTANTS[name](folder)
    made = time.process_time() - start
    network, set_width = contestant.network.train(), contestant.set_width
    images, labels = torch.rand(batch, 3, IMAGE, IMAGE), torch.randint(0, 1000, (batch,))
    plain = {width: contestant.plain(width).train() for width in WIDTHS}

    def step(model: nn.Module) -> None:
        F.cross_entropy(model(images), labels).backward()

    def all_widths() -> None:
        network.zero_grad()
        for width in WIDTHS:
            set_width(width)
            step(network)

    def our_recipe() -> None:
        network.zero_grad()
        recipe.backward(lambda: F.cross_entropy(network(images), labels))

    def all_plain() -> None:
        for model in plain.values():
            model.zero_grad()
            step(model)

    def full() -> None:
        plain[1.0].zero_grad()
        step(plain[1.0])

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(images[:1])

    def ready(width: float) -> None:
        set_width(width)
        network.eval()
        plain[width].eval()

    if name == "ours":
        recipe = slimmable.SlimRecipe(network, loss_weights="ones")
    calls: dict[str, Callable[[], object]] = {
        "step": our_recipe if name == "ours" else all_widths,
        "plain step": all_plain,
    }
    for width in WIDTHS:
        calls |= {
            f"width {width}": partial(ready, width),
            f"forward {width}": partial(forward, network),
            f"plain forward {width}": partial(forward, plain[width]),
        }
    return calls | {"full step": full}, made, network


def megabytes(name: str, folder: Path, batch: int, call: str) -> float:
    """Return what two calls add to the memory of this process, at most."""
    calls, *_ = steps_of(name, folder, batch)
    before = reset_peak()
    for _ in range(2):
        calls[call]()
    return (peak_bytes() - before) / 2**20


def measure(name: str, folder: Path, batch: int, seconds: float, out: Path) -> None:
    """Write the result file of one network."""
    calls, made, network = steps_of(name, folder, batch)
    rows: list[dict[str, Any]] = []

    def compared(call: str, to: str) -> None:
        times = interleaved({each: calls[each] for each in (to, f"plain {to}")}, seconds, least=6)
        rows.append({"call": call, "cpu_ms": median_cpu_ms(times[to]), **compare(times[to], times[f"plain {to}"])})
        print(name, rows[-1], flush=True)

    compared("step", "step")
    for width in WIDTHS:
        calls[f"width {width}"]()
        compared(f"forward {width}", f"forward {width}")
        if name == "ours":
            with slimmable.inference(network):
                compared(f"inference {width}", f"forward {width}")
    command = [sys.executable, "-m", "benchmarks.side_by_side", "--programs", str(folder), "--batch", str(batch)]
    memory: dict[str, float] = {}
    for call in ("step", "full step"):
        done = subprocess.run([*command, "--memory", name, call], check=True, capture_output=True, text=True)
        memory[call] = round(float(done.stdout.split()[-1]), 1)
    write_result(out, name, rows, f"batch{batch}-image{IMAGE}", made=round(made, 2), batch=batch, megabytes=memory)


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    header = ("library", "step, s", "of four plain steps", "memory, of the full plain step", *WIDTHS, "made in, s")
    results = sorted(read_results(folder), key=lambda result: [*NAMES].index(result["name"]))
    lines = []
    for result in results:
        rows = {row["call"]: row for row in result["rows"]}
        step, ratios = rows["step"], {name: f"{row['ratio']:.2f}" for name, row in rows.items()}
        lines.append((
            NAMES[result["name"]],
            f"{step['cpu_ms'] / 1000:.2f}",
            ratio_of(step),
            f"{result['megabytes']['step'] / result['megabytes']['full step']:.2f}",
            *(ratios[f"forward {width}"] for width in WIDTHS),
            f"{result['made']:.1f}",
        ))  # fmt: skip
        if result["name"] == "ours":
            blocks = (ratios[f"inference {width}"] for width in WIDTHS)
            lines.append(("slimmable, in a block of `slimmable.inference`", "", "", "", *blocks, ""))
    batch = results[0]["batch"]
    about = f"{batch} images of {IMAGE} pixels a step. Under the widths: a forward of one image, of the plain one's."
    return f"{markdown(header, lines)}\n{about}\n\n{origin(results[0])}\n"


def main() -> None:
    """Measure one after the other, each in a process of its own, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, default=Path(), help="folder of the checkouts")
    parser.add_argument("--only", nargs="+", choices=tuple(CONTESTANTS), default=tuple(CONTESTANTS))
    parser.add_argument("--batch", type=int, default=16, help="images of a step (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="few rounds of two images")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        print(megabytes(given.memory[0], given.programs, given.batch, given.memory[1]))
        return
    for name in given.only:
        if len(given.only) == 1:
            batch, seconds = (2, 0.0) if given.quick else (given.batch, 20.0)
            measure(name, given.programs, batch, seconds, given.out)
        else:  # packages of the same name, such as `utils`, do not meet
            command = [sys.executable, *sys.orig_argv[1:], "--only", name]
            if subprocess.run(command).returncode:
                print(f"{name} does not run here", flush=True)
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
