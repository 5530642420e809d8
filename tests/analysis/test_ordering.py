"""Which units count as important: those that the next layers weigh most."""

import pytest
import torch
from torch import nn

import slimmable
from slimmable.analysis.importance import order_units

SIZES = torch.tensor([2.0, 4.0, 1.0, 3.0])  # of the weights that read each unit
IMPORTANT_FIRST = [1, 3, 0, 2]


def order_of(model, example):
    [order] = order_units(model, slimmable.plan(model, (1.0, 0.5), example_inputs=example), "magnitude")
    return order.tolist()


def along(axis, weight):
    """Give each unit along `axis` weights of its size and changing sign."""
    signs = torch.ones(weight.shape)
    signs.flatten()[1::2] = -1
    return weight.data.copy_(signs * SIZES.view([-1 if i == axis else 1 for i in range(weight.ndim)]))


@pytest.mark.parametrize(
    ("make", "norm", "read", "axis", "example"),
    [
        (nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), 1, torch.zeros(2, 3)),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), 1, torch.zeros(2, 3, 4, 4)),
        (nn.ConvTranspose2d(3, 4, 1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3), 0, torch.zeros(2, 3, 4, 4)),
    ],
    ids=["linear", "convolution", "transposed"],
)
def test_reading_weights_decide_and_not_the_making_ones(make, norm, read, axis, example):
    model = nn.Sequential(make, norm, read)
    along(axis, read.weight)
    with torch.no_grad():
        made = make.weight.transpose(0, 1 - axis)  # units first
        made.copy_(torch.ones(made.shape) * (100 / SIZES).view(-1, *[1] * (made.ndim - 1)))
    assert order_of(model, example) == IMPORTANT_FIRST


def test_units_that_nothing_reads_go_by_the_weights_that_make_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    along(0, model[0].weight)
    assert order_of(model, torch.zeros(2, 3, 4, 4)) == IMPORTANT_FIRST


def test_all_readers_count():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.first(self.make(x)), self.second(self.make(x))

    model = Two()
    along(1, model.first.weight)
    along(1, model.second.weight).neg_()
    model.second.weight.data[:, 2] = 10
    assert order_of(model, torch.zeros(2, 3)) == [2, *(unit for unit in IMPORTANT_FIRST if unit != 2)]
