"""Gates: decide from a layer's input which units an image needs, and mask the inputs of the layers that read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from slimmable._checks import check_floats, check_is_module, check_matrices, checked
from slimmable._numerics import at_least_float32
from slimmable.errors import DataError, UsageError
from slimmable.view.cuts import Indices
from slimmable.view.norms import SwitchableContainer, inner_modules
from slimmable.view.recompute import Active, in_backward, switch

GATE = "channel_gate"  # the name of the gates in the layer whose units they open and close
TEMPERATURE = 2 / 3
Pass = Enum("Pass", ["DENSE", "GATED"])  # which of the two networks of a gated model runs
_TINY = 1e-8  # keeps the logarithms of the noise finite


@checked
def hard_mask(
    logits: Tensor, uniform: Tensor | None = None, temperature: float = TEMPERATURE, *, open_at_zero: bool = False
) -> Tensor:
    """Return a mask: 1 where a unit is open, 0 where it is closed.

    With noise, a unit is open if `soft = sigmoid((logits + log u - log(1 - u)) / temperature)` is at least 0.5, with
    the gradient of `soft` (straight-through). Without noise, positive logits are open, and there is no gradient.

    Source: the binary Gumbel-softmax of Krishna et al. 2023, whose code also opens units at logit 0 without noise.

    Args:
        logits, uniform: two tensors of any one shape; `u` is random in [0, 1), and None for no noise.
        temperature: positive.
        open_at_zero: without noise, open units with logit 0, as published.

    >>> hard_mask(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 1.])
    >>> hard_mask(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.9, 0.4, 0.5]))
    tensor([1., 0., 1.])
    """
    check_floats("hard_mask", logits=logits, uniform=logits if uniform is None else uniform)
    if uniform is None:
        return (logits >= 0 if open_at_zero else logits > 0).to(logits.dtype)
    if uniform.shape != logits.shape:
        raise DataError(f"hard_mask: uniform has shape {tuple(uniform.shape)}, logits {tuple(logits.shape)}")
    noise = torch.log(uniform + _TINY) - torch.log(1 - uniform + _TINY)
    soft = torch.sigmoid((logits + noise) / temperature)
    return (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())


class ChannelGate(nn.Module):
    """Decides for each image which of a layer's units are open.

    A linear layer to a quarter of the channels, BatchNorm, ReLU, and a linear layer to one logit per unit, with noise
    in training mode (see `hard_mask`). Decides in at least float32. The buffer `threshold` is subtracted from all
    logits; it is 0 until `calibrate_gates` sets it.

    Source: Krishna et al. 2023, whose gates have no bias, so all logits are 0 for an image without active hidden units.

    Shapes: (images, channels), averaged over positions -> (images, units), zeros and ones.

    Args:
        channels, units: how many channels the layer's input has, and how many units the gate opens or closes.
        temperature, open_at_zero: as in `hard_mask`.
        bias: add a learned bias per unit to the logits.

    >>> gate = ChannelGate(16, 24).eval()
    >>> gate(torch.randn(2, 16)).shape, gate.macs
    (torch.Size([2, 24]), 160)
    """

    threshold: Tensor

    @checked
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
        hidden = _hidden(channels)
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.expand = nn.Linear(hidden, units, bias=bias)
        for linear in (self.reduce, self.expand):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        if self.expand.bias is not None:
            nn.init.zeros_(self.expand.bias)
        self.temperature, self.open_at_zero = temperature, open_at_zero
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def macs(self) -> int:
        """Multiply-adds per image."""
        return gate_macs(self.reduce.in_features, self.expand.out_features)

    @checked
    def logits(self, pooled: Tensor) -> Tensor:
        """Return one logit per unit: (images, channels) -> (images, units)."""
        if not getattr(pooled, "is_meta", False):  # where a forward only finds shapes
            check_matrices("ChannelGate", pooled=pooled)
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


@dataclass(frozen=True, eq=False)
class Decision:
    """The decision of a gate in one forward."""

    mask: Tensor | None = None  # of shape (images, units); None before the gate has decided
    positions: tuple[int, ...] = ()  # shape of the layer's input without its image and channel axes
    index: int = 0  # of the width
    record: "list[Decision] | None" = None  # of those in the same `gated` block


class LayerGates(SwitchableContainer):
    """The gates of one group of units, one per width, and their decision in the current forward.

    In the state dict the full width's gate is `channel_gate.at.0`, followed by those of narrower widths. The gates of a
    second group that the same layer makes are in `channel_gate_1`.

    Args:
        name, axis: of the layer that makes the units, and the channel axis of its input.
        widths: the model's widths.
        gates: one module per width: pooled features (images, channels) -> mask (images, units).
        readers: for each layer that reads the units, the axis of its input that holds them, and for each width the unit
            at each position of this axis, -1 for positions that stay open.
    """

    def __init__(
        self,
        name: str,
        axis: int,
        widths: Sequence[float],
        gates: Sequence[nn.Module],
        readers: Sequence[tuple[int, Sequence[Sequence[int]]]],
    ) -> None:
        super().__init__(widths)
        self.name, self.axis = name, axis
        self.at = nn.ModuleList(gates)
        self.reader_axes = tuple(axis for axis, _ in readers)
        self.active_pass = Active(Pass.DENSE)
        self.decision = Active(Decision())
        self._units = {  # unit -1 is always open, and the first of the mask
            (number, index): Indices([unit + 1 for unit in units])
            for number, (_, per_width) in enumerate(readers)
            for index, units in enumerate(per_width)
            if list(units) != list(range(len(units)))
        }

    def module_at(self, index: int) -> nn.Module:
        """Return the gate of the width with this index; raise `UsageError` if it has none."""
        gates = inner_modules(self, "at")
        if str(index) not in gates:
            what = f"for the widths {self.widths[: len(self.at)]}, not for the active {self._slim.active.width}"
            raise UsageError(f"the gates of {self.name} are {what}; set one of these, or run the dense pass")
        return gates[str(index)]

    @property
    def idle(self) -> bool:
        """Whether the dense pass runs."""
        return self.active_pass.active is Pass.DENSE

    def own_at(self, index: int) -> nn.Module:
        """Return the whole, which `ungate` then removes, since extracted networks have no gates."""
        return self

    def decide(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the layer that makes the units: decide from its input, and keep the mask for those that read them."""
        if self.idle:
            return
        source: Tensor = args[0]
        others = [axis for axis in range(1, source.ndim) if axis != self.axis % source.ndim]
        mask = self.module_at(self._slim.index)(source.mean(others) if others else source)
        record = self.decision.active.record
        decision = Decision(mask, tuple(source.shape[axis] for axis in others), self._slim.index, record)
        switch([(None, self.decision)], [decision])
        if record is not None and not in_backward():
            record.append(decision)

    def mask(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before a reader, given by its number: return its arguments, with closed units set to zero."""
        source, *more = args
        if self.idle:
            return self.linked(source), *more
        mask = self.decision.active.mask
        if mask is None or len(mask) != len(source):
            found = "not decided" if mask is None else f"decided for {len(mask)} images, not {len(source)}"
            what = f"a layer reads the output of {self.name}, but its gate has {found}"
            raise UsageError(f"{what}; run the whole model gated")
        units = self._units.get((number, self._slim.index))
        if units is not None:
            mask = torch.cat([mask.new_ones(len(mask), 1), mask], 1).index_select(1, units.on(mask.device))
        shape = [1] * source.ndim
        shape[0], shape[self.reader_axes[number]] = mask.shape
        return self.linked(source * mask.to(source.dtype).view(shape)), *more

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of a running forward."""
        return {**self.__dict__, "decision": Active(Decision())}


def gates_in(model: nn.Module) -> list[LayerGates]:
    """Return the gates in a model, in the order of their layers."""
    return [module for module in model.modules() if isinstance(module, LayerGates)]


def has_gates(model: nn.Module) -> bool:
    """Return whether a model has gates."""
    check_is_module("has_gates", model)
    return bool(gates_in(model))
