"""Idioms of pasted research code: distributions, limits on the norm of weights, activations with parameters."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import slimmable
from tests.convert.test_numbers import checked, half, made


class Policy(nn.Module):
    """Of an actor and critic: a distribution made in the forward, which looks at the numbers that it is made from."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 64), nn.Tanh()), nn.Linear(64, 3)
        self.log_std, self.kind = nn.Parameter(torch.zeros(3)), kind

    def forward(self, x):
        found = self.head(self.body(x))
        if self.kind == "normal":
            chosen = torch.distributions.Normal(found, self.log_std.exp())
            return chosen.mean, chosen.log_prob(found).sum(-1), chosen.entropy().sum(-1)
        chosen = torch.distributions.Categorical(logits=found)
        return chosen.probs, chosen.log_prob(torch.zeros(len(x))), chosen.entropy()


@pytest.mark.parametrize("checks", [True, False])  # torch.compile turns them off for the whole process
@pytest.mark.parametrize("kind", ["normal", "categorical"])
def test_a_distribution_may_be_made_in_the_forward(kind, checks, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", checks)
    assert half(checked(made(Policy(kind)), torch.randn(5, 4, dtype=torch.float64))) < 0.55
    with pytest.raises(ValueError, match="constraint") if checks else nullcontext():  # as before
        torch.distributions.Normal(torch.zeros(2), -torch.ones(2))


class Replacing(nn.Linear):
    """Limits the norm of its weights by writing them anew in each forward."""

    def forward(self, x):
        self.weight.data = self.weight.data / self.weight.data.norm(dim=1, keepdim=True).clamp(min=1)
        return super().forward(x)


def test_weights_that_the_forward_replaces_stay_full():
    body = nn.Linear(6, 32), nn.ReLU(), Replacing(32, 16), nn.ReLU()
    model = made(nn.Sequential(*body, nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    with torch.no_grad():
        model[2].weight.mul_(20)
    x = torch.randn(5, 6, dtype=torch.float64)
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=x)
    small = slimmable.extract(slim, 0.5)
    with torch.no_grad():
        slim[2].weight.mul_(20)  # as a training step may
        small[2].weight.mul_(20)
    with slimmable.at_width(slim, 0.5):
        torch.testing.assert_close(slim(x), small(x))
    plan = slimmable.plan(slim)
    assert "the forward replaces its data" in str(plan)
    assert small[2].weight.shape == (16, 32)
    assert small[4].weight.shape == (16, 16)


class Calls(nn.Module):
    def __init__(self, called):
        super().__init__()
        self.called = called

    def forward(self, x):
        return self.called(x)


ALWAYS = {"p": 1e-9, "training": True}  # dropout in eval mode too, to estimate uncertainty


@pytest.mark.parametrize(
    "called",
    [
        lambda x: F.pad(x, (1, 1, 2, 0), mode="circular"),
        lambda x: F.dropout2d(x, **ALWAYS),
        lambda x: F.dropout2d(x, inplace=True, **ALWAYS),
        lambda x: F.feature_alpha_dropout(x, **ALWAYS),
    ],
    ids=["circular padding", "dropout of channels", "in place", "of alpha"],
)
def test_what_an_operation_makes_inside_has_the_units_of_its_input(called):
    """torch fills a new tensor, whose size nobody asked for, from the input."""
    body = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Calls(called), nn.Conv2d(16, 32, 3), nn.ReLU()
    model = made(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)))
    assert half(checked(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))) < 0.35


class MaxNorm(nn.Module):
    def forward(self, weights):
        return weights.renorm(2, 0, 1.0)


class Sorted(nn.Module):
    """Computes weights in a way that needs all of them."""

    def forward(self, weights):
        return weights.flatten().sort().values.view_as(weights)


def depthwise(limit):
    """The beginning of EEGNet: a depthwise convolution over the electrodes, whose weights are computed."""
    over = nn.Conv2d(8, 16, (8, 1), groups=8, bias=False)
    parametrize.register_parametrization(over, "weight", limit)
    body = nn.Conv2d(1, 8, (1, 9)), over, nn.BatchNorm2d(16), nn.ELU()
    return made(nn.Sequential(*body, nn.Conv2d(16, 24, (1, 5)), nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


@pytest.mark.parametrize(("limit", "units"), [(MaxNorm(), 8), (Sorted(), 16)])
def test_a_depthwise_convolution_follows_its_weights(limit, units):
    model, x = depthwise(limit), torch.randn(2, 1, 8, 32, dtype=torch.float64)
    checked(model, x, widths=(1.0, 0.75, 0.5))
    small = slimmable.extract(slimmable.slimify(model, (1.0, 0.75, 0.5), example_inputs=x), 0.5)
    assert small[1].weight.shape[0] == units


def test_an_extracted_activation_tells_its_parameters():
    net = nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 2), nn.PReLU())
    small = slimmable.extract(slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.randn(2, 4)), 0.5)
    assert [each.num_parameters for each in small if isinstance(each, nn.PReLU)] == [4, 1]


class Sparse(nn.Module):
    """Attention of the queries that choose most clearly (Informer); all others get the mean of the values."""

    def __init__(self):
        super().__init__()
        self.heads, self.out = 4, nn.Linear(32, 5)
        self.q, self.k, self.v = nn.Linear(6, 32), nn.Linear(6, 32), nn.Linear(6, 32)

    def forward(self, x):
        size, steps, _ = x.shape
        q, k, v = (layer(x).view(size, steps, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1)
        chosen = (scores.amax(-1) - scores.mean(-1)).topk(3, sorted=False)[1]
        at = torch.arange(size)[:, None, None], torch.arange(self.heads)[None, :, None], chosen
        seen = v.mean(-2, keepdim=True).expand(-1, -1, steps, -1).clone()
        seen[(*at, slice(None))] = (q[at] @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(seen.transpose(1, 2).reshape(size, steps, -1))


def test_what_is_written_at_indices_stays_full_only_along_their_axes():
    assert half(checked(made(Sparse()), torch.randn(2, 8, 6, dtype=torch.float64))) < 0.6
