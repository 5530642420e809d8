"""How do the costs of a slimmable network grow with widths, depth, batch and the operations of its forward?

    python -m benchmarks.growth            # ten minutes on one core
    python -m benchmarks.growth --quick    # a smoke run of seconds

The network is a residual one of 64 channels on images of 32 x 32 pixels; one of its sizes changes at a time. "Step" is
a training step at all widths over the same steps of plain networks of these widths, without the optimizer. The loops
are an LSTM cell called in a Python loop, and `nn.LSTM`. Times are processor times of one thread; those of a conversion
are of the second one in the process, as the first also loads parts of torch.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimmable
from benchmarks.measuring import compare, interleaved, markdown, origin, ratio_of, read_results, write_result

HERE = Path(__file__).parent
WIDTHS = (1.0, 0.75, 0.5, 0.25)
CHANNELS, CLASSES, SIZE = 64, 10, 32
GROWTH: dict[str, tuple[int, ...]] = {
    "widths": (1, 2, 4, 8, 16),
    "blocks": (2, 8, 32, 128),
    "batch": (1, 4, 16, 64),
    "steps of a loop": (1, 16, 64, 256),
    "steps of `nn.LSTM`": (16, 256, 4096),
}


class Block(nn.Module):
    """Two convolutions and what is added to them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.last = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        return (x + self.last(self.second(self.norm(self.first(x)).relu()))).relu()


class Cells(nn.Module):
    """An LSTM over so many steps: as a loop of Python around a cell, or torch's own."""

    def __init__(self, loop: bool) -> None:
        super().__init__()
        self.loop = loop
        self.first, self.head = nn.Linear(16, CHANNELS), nn.Linear(CHANNELS, CLASSES)
        self.cell = nn.LSTMCell(CHANNELS, CHANNELS) if loop else nn.LSTM(CHANNELS, CHANNELS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores after the last step."""
        x = self.first(x)
        if not self.loop:
            return self.head(self.cell(x)[0][:, -1])
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


def residual(blocks: int) -> nn.Module:
    """Return the residual network."""
    stem = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
    return nn.Sequential(
        stem,
        *(Block(CHANNELS) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, CLASSES),
    )


def conversion(make: Callable[[], nn.Module], widths: tuple[float, ...], example: Tensor) -> dict[str, Any]:
    """Return what the second conversion takes, and how many operations a forward has."""
    slimmable.slimify(make(), widths, example_inputs=example)
    model = make()
    start = time.process_time()
    slim = slimmable.slimify(model, widths, example_inputs=example)
    seconds = time.process_time() - start
    weights, plain = (sum(each.numel() for each in net.parameters()) for net in (slim, model))
    return {"seconds": round(seconds, 3), "parameters": round(weights / plain, 4)}


def step(networks: list[tuple[nn.Module, float | None]], images: Tensor, labels: Tensor) -> None:
    """Run forward and backward of each network, at a width if it has several."""
    for net in {id(net): net for net, _ in networks}.values():
        net.zero_grad()
    for net, width in networks:
        if width is not None:
            slimmable.set_width(net, width)
        nn.functional.cross_entropy(net(images), labels).backward()


def measure(what: str, size: int, seconds: float) -> dict[str, Any]:
    """Return one row."""
    if "steps" in what:
        example = torch.zeros(2, size, 16)
        return conversion(lambda: Cells(loop="loop" in what), WIDTHS, example)
    widths = tuple(1 - 0.75 * k / 15 for k in range(size)) if what == "widths" else WIDTHS
    blocks, batch = (size if what == name else usual for name, usual in (("blocks", 4), ("batch", 16)))
    images, labels = torch.rand(batch, 3, SIZE, SIZE), torch.arange(batch) % CLASSES
    row = conversion(lambda: residual(blocks), widths, images[:2])
    slim = slimmable.slimify(residual(blocks), widths, example_inputs=images).train()
    plain = [(slimmable.extract(slim, width).train(), None) for width in widths]
    calls = {
        "plain": lambda: step(plain, images, labels),
        "slimmable": lambda: step([(slim, width) for width in widths], images, labels),
    }
    times = interleaved(calls, seconds, least=6)
    return row | {"step": compare(times["slimmable"], times["plain"])}


def rows(seconds: float, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each size."""
    for what, sizes in GROWTH.items():
        for size in sizes[:1] if quick else sizes:
            yield {"grows": what, "size": size, **measure(what, size, seconds)}


def table(folder: Path) -> str:
    """Return the table of the results."""
    results = read_results(folder)
    lines = [
        (
            row["grows"],
            row["size"],
            f"{row['seconds']:.2f} s",
            f"{row['parameters']:.3f}",
            ratio_of(row["step"]) if "step" in row else "",
        )
        for result in results
        for row in result["rows"]
    ]
    header = ("grows", "to", "`slimify`", "parameters, over plain", "step, over plain networks")
    return markdown(header, lines) + "\n" + "\n".join(sorted({origin(result) for result in results})) + "\n"


def main() -> None:
    """Measure, and write the result file and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="the smallest size of each: a smoke run")
    given = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for row in rows(0.0 if given.quick else 15.0, given.quick):
        print(row, flush=True)
        found.append(row)
    write_result(given.out, "growth", found, variant="cpu")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
