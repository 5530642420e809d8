"""Why each width has a classifier of its own: what one linear layer for two widths loses, by theory and by training.

    python -m benchmarks.one_probe

The full width has two features of variance 1 and correlation r, the narrow one the first of them, and the target is
their sum. Apart, least squares give the weights (1, 1) and 1 + r. One slimmable layer has only one weight for the first
feature: it is 1 if the full width's is cut, and with the sum of both losses a compromise, 1 + r / (2 - r^2). What each
loses, in mean squared error over the best of its width, is nothing only where the features are orthogonal.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import slimmable
from slimmable.layers import SwitchableProbe

WIDTHS = (1.0, 0.5)


def features(r: float) -> Tensor:
    """Return features, (images, 2), with exactly this correlation."""
    return math.sqrt(2) * torch.tensor([[1.0, r], [0.0, math.sqrt(1 - r**2)]], dtype=torch.float64)


def theory(r: float) -> dict[str, tuple[float, float]]:
    """Return what is lost at the full and at the narrow width."""
    more = r / (2 - r**2)  # the compromise, over the full width's weight
    return {
        "one for each": (0.0, 0.0),
        "one, trained at both": (more**2 * (1 - r**2), (r - more) ** 2),
        "one, trained at full": (0.0, r**2),
    }


def trained(r: float) -> dict[str, tuple[float, float]]:
    """Return the same of layers that are trained until nothing changes."""
    x = features(r)
    target = x.sum(1, keepdim=True)
    layers: dict[str, tuple[nn.Module, tuple[float, ...]]] = {
        "one for each": (SwitchableProbe(2, 1, WIDTHS, bias=False), WIDTHS),
        "one, trained at both": (slimmable.SlimLinear(2, 1, bias=False, widths=WIDTHS, slim_out=False), WIDTHS),
        "one, trained at full": (slimmable.SlimLinear(2, 1, bias=False, widths=WIDTHS, slim_out=False), WIDTHS[:1]),
    }

    def error(layer: nn.Module, width: float) -> Tensor:
        with slimmable.at_width(layer, width):
            return (layer(x[:, : round(2 * width)]) - target).square().mean()

    found = {}
    for name, (layer, widths) in layers.items():
        optimizer = torch.optim.LBFGS(
            layer.double().parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0
        )
        for _ in range(5):
            optimizer.step(partial(_total, optimizer, [partial(error, layer, width) for width in widths]))
        found[name] = (error(layer, 1.0).item(), error(layer, 0.5).item() - (1 - r**2))
    return found


def _total(optimizer: torch.optim.Optimizer, errors: Sequence[Callable[[], Tensor]]) -> float:
    optimizer.zero_grad()
    loss = torch.stack([error() for error in errors]).sum()
    loss.backward()
    return loss.item()


def plot(path: Path) -> None:
    """Draw what theory says as lines, and what training gives as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, at, title in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("full width", "half width"), strict=True):
        fine, coarse = [step / 100 for step in range(100)], [step / 10 for step in range(10)]
        for name in theory(0.0):
            (line,) = axes.plot(fine, [theory(r)[name][at] for r in fine], label=name)
            axes.plot(coarse, [trained(r)[name][at] for r in coarse], "o", color=line.get_color(), markersize=4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("correlation of the two features")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("squared error over the best")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Draw the picture of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/one-probe.png"))
    plot(parser.parse_args().out)


if __name__ == "__main__":
    main()
