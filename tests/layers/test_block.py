"""Blocks of strided parameters: gradients of any order, any memory format, and under torch.func."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from slimmable._width import set_width
from slimmable.layers import SlimConv2d
from slimmable.view.view import install_view

WIDTHS = (1.0, 0.5)
CUTS = {"first units": (2, 3), "shifted": ((1, 2), (2, 3, 4))}


def linear(rows, columns):
    layer = nn.Linear(6, 4, dtype=torch.float64)
    install_view(layer, WIDTHS, {"weight": [(None, None), (rows, columns)], "bias": [(None,), (rows,)]}, {})
    set_width(layer, 0.5)
    return layer


def indexed(weight, rows, columns):
    row, column = (range(kept) if isinstance(kept, int) else kept for kept in (rows, columns))
    return weight[list(row)][:, list(column)]


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_first_and_second_gradients(cut, transposed):
    layer = linear(*cut)

    def read(weight):
        return functional_call(layer, {"weight": weight.T if transposed else weight}, torch.eye(3).double()).exp()

    weight = torch.randn((6, 4) if transposed else (4, 6), dtype=torch.float64, requires_grad=True)
    bias = layer.bias.detach()
    expected = (indexed(weight.T if transposed else weight, *cut).T + bias).exp()
    assert torch.allclose(read(weight), expected, rtol=1e-14)
    assert torch.autograd.gradcheck(read, weight)
    assert torch.autograd.gradgradcheck(read, weight)


def test_gradients_keep_the_memory_format_of_the_parameter():
    conv = SlimConv2d(4, 8, 3, widths=WIDTHS).to(memory_format=torch.channels_last)
    set_width(conv, 0.5)
    plain = conv.weight.detach().clone().requires_grad_()
    x = torch.randn(2, 2, 5, 5)
    conv(x).square().sum().backward()
    nn.functional.conv2d(x, plain, conv.bias).square().sum().backward()
    full = conv._parameters["weight"].grad
    assert full.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(full[:4, :2], plain.grad, rtol=1e-5, atol=1e-5)
    assert not full[4:].any()
    assert not full[:, 2:].any()


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_ensembles_and_gradients_per_sample(cut):
    layer = linear(*cut)
    x = torch.randn(5, 3, dtype=torch.float64)
    weights = torch.randn(5, 4, 6, dtype=torch.float64)
    bias = layer.bias.detach()

    def loss(weight, sample):
        return functional_call(layer, {"weight": weight}, sample).square().sum()

    together = vmap(grad(loss))(weights, x)
    for weight, sample, found in zip(weights, x, together, strict=True):
        weight = weight.clone().requires_grad_()
        (sample @ indexed(weight, *cut).T + bias).square().sum().backward()
        assert torch.allclose(found, weight.grad, rtol=1e-12, atol=1e-12)
