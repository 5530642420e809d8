"""A gated model in two processes: both passes inside one DDP forward, and batch norms of the joined batch."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import slimmable
from slimmable.training import average_gradients, synchronised_batchnorm
from tests.two_processes import run_in_two

IMAGES = torch.randn(2, 8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = torch.rand(8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gated_model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    return slimmable.gating.gate(net.double(), example_inputs=IMAGES[0])


class Both(nn.Module):
    """What a training step runs, as one forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x0, x1):
        with slimmable.gating.gated(self.model) as run:
            z0 = self.model(x0)
        return z0, self.model(x1), run.share()


def loss_of(z0, z1, share):
    return (z0 - z1).square().mean() + 0.1 * z1.square().mean() + share.mean()


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def step(part):
    """One step on a part of the images and of the noise."""
    model = gated_model()
    with mock.patch.object(torch, "rand_like", lambda like: NOISE[part, : like.shape[1]]), synchronised_batchnorm():
        loss_of(*Both(model)(IMAGES[0, part], IMAGES[1, part])).backward()
    average_gradients(model)
    return gradients(model)


def both_ways(rank):
    own = slice(4 * rank, 4 * rank + 4)
    averaged = step(own)
    model = gated_model()
    wrapped = DistributedDataParallel(Both(model))
    torch.manual_seed(rank)
    loss_of(*wrapped(IMAGES[0, own], IMAGES[1, own])).backward()
    return {"averaged": averaged, "ddp": gradients(model)}


def test_two_processes_are_one(tmp_path):
    first, second = run_in_two(both_ways, tmp_path)
    whole = step(slice(None))
    for name, expected in whole.items():
        torch.testing.assert_close(first["averaged"][name], expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(first["averaged"][name], second["averaged"][name])
        assert torch.equal(first["ddp"][name], second["ddp"][name])
    assert any(gradient.abs().sum() > 0 for name, gradient in first["ddp"].items() if "channel_gate" in name)
