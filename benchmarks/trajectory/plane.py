"""The plane of a training: the two directions in which the parameters moved most, and the loss around the path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

MARGIN = 0.25  # of the path's extent, on each side of the map


@dataclass
class Plane:
    """The path of one network's parameters in the plane of their first two principal directions.

    Attributes:
        end: the last parameters, shape (parameters,); the plane goes through them.
        directions: shape (2, parameters), orthonormal; the path starts at negative coordinates.
        path: coordinates of the snapshots from `end` on, shape (snapshots, 2).
        variance: share of the snapshots' variance that lies in the plane, in [0, 1].
        straightness: distance from the first to the last snapshot over the length of the path, in all dimensions.
    """

    end: Tensor
    directions: Tensor
    path: Tensor
    variance: float
    straightness: float


def plane_of(snapshots: Tensor) -> Plane:
    """Return the plane of snapshots of shape (snapshots, parameters).

    >>> plane = plane_of(torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0], [3.0, 1.0, 4.0]]))
    >>> round(plane.variance, 3), round(plane.straightness, 3)
    (1.0, 0.85)
    """
    moved = snapshots - snapshots[-1]
    _, sizes, directions = torch.linalg.svd(moved - moved.mean(0), full_matrices=False)
    squares, two = sizes.double().square(), directions[:2]
    two = torch.where(two @ moved[0] > 0, -1, 1).unsqueeze(1) * two
    length = (snapshots[1:] - snapshots[:-1]).norm(dim=1).sum()
    return Plane(
        end=snapshots[-1],
        directions=two,
        path=moved @ two.T,
        variance=(squares[:2].sum() / squares.sum()).item(),
        straightness=(moved[0].norm() / length).item(),
    )


@dataclass
class Map:
    """The loss on a grid of the plane: `losses[row, column]` at `(across[column], up[row])`."""

    across: Tensor
    up: Tensor
    losses: Tensor


@torch.no_grad()
def map_of(plane: Plane, network: nn.Module, loss: Callable[[nn.Module], Tensor], points: int) -> Map:
    """Return the loss at `points` x `points` places around the path.

    The network runs in training mode, so its BatchNorms take the statistics of the very batch at each place.
    """
    low, high = plane.path.amin(0), plane.path.amax(0)
    margin = MARGIN * (high - low)
    shares = torch.linspace(0, 1, points).to(low)
    across, up = (torch.lerp(low[i] - margin[i], high[i] + margin[i], shares) for i in (0, 1))
    network.train()
    losses = torch.empty(points, points).to(low)
    for row in range(points):
        for column in range(points):
            place = torch.stack([across[column], up[row]])
            vector_to_parameters(plane.end + place @ plane.directions, network.parameters())
            losses[row, column] = loss(network)
    return Map(across, up, losses)


def vector_of(network: nn.Module) -> Tensor:
    """Return all parameters of a network as one vector, a copy."""
    return parameters_to_vector(network.parameters()).detach().clone()


def draw(panels: dict[str, tuple[Plane, Map]], title: str, path: Path) -> None:
    """Draw one map beside the other, with the path from its start (circle) to its end (star)."""
    figure = Figure(figsize=(3.6 * len(panels), 3.6), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, (plane, found)) in zip(columns, panels.items(), strict=True):
        levels = torch.linspace(found.losses.min().sqrt(), found.losses.max().sqrt(), 24).square().unique()
        lines = axes.contour(found.across, found.up, found.losses, levels=levels.tolist(), linewidths=0.8)
        axes.clabel(lines, lines.levels[::4], fontsize=7)
        axes.plot(*plane.path.T, ".-", color="black", linewidth=1, markersize=4)
        axes.plot(*plane.path[0], "o", color="tab:red")
        axes.plot(*plane.path[-1], "*", color="tab:red", markersize=12)
        axes.set_title(f"{name}\n{100 * plane.variance:.0f} % of the variance", fontsize=9)
        axes.tick_params(labelsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
