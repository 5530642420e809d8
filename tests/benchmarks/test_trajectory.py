"""The plane of a path and the loss on it, against closed forms."""

import math

import pytest
import torch
from torch import nn

from benchmarks.trajectory.plane import map_of, plane_of, vector_of


def spiral(tilt):
    """An ellipse with half axes 3 and 2 in a plane of seven dimensions, which waves along a third axis by `tilt`."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64))[0].T
    turns = torch.arange(16, dtype=torch.float64) * math.pi / 8
    inside = torch.stack([3 * turns.cos(), 2 * turns.sin(), tilt * (2 * turns).cos()], 1)
    return inside @ axes, inside, axes


def test_the_plane_of_a_flat_path():
    snapshots, inside, axes = spiral(0.0)
    plane = plane_of(snapshots)
    assert plane.variance == pytest.approx(1)
    assert torch.allclose((plane.directions @ axes[:2].T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(torch.cdist(plane.path, plane.path), torch.cdist(inside, inside), atol=1e-6)
    assert torch.equal(plane.path[-1], torch.zeros(2, dtype=torch.float64))
    assert (plane.path[0] <= 1e-9).all()
    steps = (inside[1:] - inside[:-1]).norm(dim=1).sum()
    assert plane.straightness == pytest.approx(((inside[-1] - inside[0]).norm() / steps).item())


def test_the_share_of_the_variance():
    # over whole turns the coordinates are uncorrelated, with variances of half the squared axes
    assert plane_of(spiral(1.0)[0]).variance == pytest.approx((9 + 4) / (9 + 4 + 1))


def test_the_loss_on_the_map():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    snapshots = torch.randn(5, len(vector_of(network)), dtype=torch.float64)
    plane = plane_of(snapshots)
    found = map_of(plane, network.eval(), lambda net: vector_of(net).square().sum(), points=5)
    low, high = plane.path.amin(0), plane.path.amax(0)
    margin = (high[0] - low[0]).item() / 4
    assert found.across[[0, -1]].tolist() == pytest.approx([low[0].item() - margin, high[0].item() + margin])
    for row, up in enumerate(found.up):
        for column, across in enumerate(found.across):
            place = plane.end + across * plane.directions[0] + up * plane.directions[1]
            assert found.losses[row, column].item() == pytest.approx(place.square().sum().item(), rel=1e-9)
    assert network.training
