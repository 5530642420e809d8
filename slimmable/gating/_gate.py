"""The gate: decide from a layer's input which of its units an image needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimmable._checks import check_positive
from slimmable._numerics import at_least_float32
from slimmable.errors import DataError, UsageError

TEMPERATURE = 2 / 3
_TINY = 1e-8  # keeps the logarithms of the noise finite


def hard_mask(
    logits: Tensor, uniform: Tensor | None = None, temperature: float = TEMPERATURE, *, open_at_zero: bool = False
) -> Tensor:
    """Return a mask: 1 where a unit is open, 0 where it is closed.

    With noise, a unit is open if `soft = sigmoid((logits + log u - log(1 - u)) / temperature)` is at least 0.5; the
    gradient is that of `soft` (straight-through). Without noise, units with positive logits are open, and there is no
    gradient.

    Source: the binary Gumbel-softmax of Krishna et al. 2023. Their code uses the temperature 0.66667, and without noise
    also opens units at logit 0, so a gate whose hidden units are all zeroed by their ReLU opens everything.

    Args:
        logits: any shape.
        uniform: `u`, random numbers in [0, 1), of the same shape; None for no noise.
        temperature: positive.
        open_at_zero: without noise, open units with logit 0, as published.

    >>> hard_mask(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 1.])
    >>> hard_mask(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.9, 0.4, 0.5]))
    tensor([1., 0., 1.])
    """
    if uniform is None:
        return (logits >= 0 if open_at_zero else logits > 0).to(logits.dtype)
    noise = torch.log(uniform + _TINY) - torch.log(1 - uniform + _TINY)
    soft = torch.sigmoid((logits + noise) / temperature)
    return (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())


class ChannelGate(nn.Module):
    """Decides for each image which of a layer's units are open.

    A linear layer to a quarter of the channels, BatchNorm, ReLU, and a linear layer to one logit per unit, with noise
    in training mode (see `hard_mask`). Decides in at least float32. The buffer `threshold` is subtracted from all
    logits; it is 0 until `calibrate_gates` sets it.

    Source: Krishna et al. 2023; these linear layers are their 1x1 convolutions on pooled features. Theirs have no bias,
    so an image without an active hidden unit has logit 0 for every unit: with noise half of the units are open, without
    noise none are, and the network that runs is not the one that was trained.

    Shapes: (images, channels), averaged over positions -> (images, units), zeros and ones.

    Args:
        channels: number of channels of the layer's input.
        units: number of units that the gate opens or closes.
        temperature, open_at_zero: as in `hard_mask`.
        bias: add a learned bias per unit to the logits.

    Raises: UsageError: if an argument is out of range.

    >>> gate = ChannelGate(16, 24).eval()
    >>> gate(torch.randn(2, 16)).shape, gate.macs
    (torch.Size([2, 24]), 160)
    """

    threshold: Tensor

    def __init__(
        self,
        channels: int,
        units: int,
        *,
        temperature: float = TEMPERATURE,
        open_at_zero: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if min(channels, units) < 1:
            raise UsageError(f"ChannelGate: channels and units must be at least 1, got {channels} and {units}")
        check_positive("ChannelGate", temperature=temperature)
        hidden = _hidden(channels)
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.expand = nn.Linear(hidden, units, bias=bias)
        for linear in (self.reduce, self.expand):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        if self.expand.bias is not None:
            nn.init.zeros_(self.expand.bias)
        self.temperature = temperature
        self.open_at_zero = open_at_zero
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def macs(self) -> int:
        """Multiply-adds per image."""
        return gate_macs(self.reduce.in_features, self.expand.out_features)

    def logits(self, pooled: Tensor) -> Tensor:
        """Return one logit per unit: (images, channels) -> (images, units)."""
        if pooled.ndim != 2 or pooled.shape[1] != self.reduce.in_features:
            raise DataError(
                f"ChannelGate: expected pooled features of shape (images, {self.reduce.in_features}), "
                f"got {tuple(pooled.shape)}"
            )
        logits: Tensor = self.expand(torch.relu(self.norm(self.reduce(pooled))))
        return logits

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the mask."""
        logits = at_least_float32(self.logits(pooled)) - self.threshold
        noise = torch.rand_like(logits) if self.training else None
        return hard_mask(logits, noise, self.temperature, open_at_zero=self.open_at_zero)


def gate_macs(channels: int, units: int) -> int:
    """Return the multiply-adds of a `ChannelGate` per image."""
    return _hidden(channels) * (channels + units)


def _hidden(channels: int) -> int:
    return max(1, channels // 4)
