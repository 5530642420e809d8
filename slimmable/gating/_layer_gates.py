"""The gates of a layer's units, and the hooks by which they look and mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimmable.errors import UsageError
from slimmable.gating._pass import Pass
from slimmable.view.container import SwitchableContainer, inner_modules
from slimmable.view.recompute import Active, in_backward


@dataclass(frozen=True, eq=False)
class Decision:
    """What a gate has decided in one forward.

    Attributes:
        mask: of shape (images, units); None before there is one.
        positions: the sizes of what the layer read, without batch and channels.
        index: of the width.
    """

    mask: Tensor | None
    positions: tuple[int, ...]
    index: int


_NONE = Decision(None, (), 0)


class LayerGates(SwitchableContainer):
    """The gates of one layer's units, one per width, and what they have decided in the forward that runs.

    In the state dict the full width's gate is `channel_gate.at.0`, the narrower ones follow. Where a layer makes a
    second gated group, its gates are in `channel_gate_1`.

    Args:
        name: path of the layer whose input the gates look at, for messages and results.
        axis: of that input, where the channels lie.
        widths: those of the model.
        gates: for each width a module: pooled features (images, channels) -> mask (images, units).
        readers: for each layer that is masked the axis of its input, and for each width the unit at each position of
            it, -1 for positions that stay open.
    """

    state: Active[Pass]
    decision: Active[Decision]
    seen: list[Decision] | None

    def __init__(
        self,
        name: str,
        axis: int,
        widths: Sequence[float],
        gates: Sequence[nn.Module],
        readers: Sequence[tuple[int, Sequence[Sequence[int]]]],
    ) -> None:
        super().__init__(widths)
        self.name = name
        self.axis = axis
        self.at = nn.ModuleList(gates)
        self.reader_axes = tuple(axis for axis, _ in readers)
        self._indices: dict[str, tuple[int, ...]] = {}
        self.__dict__["state"] = Active(Pass.DENSE)
        self.__dict__["decision"] = Active(_NONE)
        self.__dict__["seen"] = None
        for number, (_, per_width) in enumerate(readers):
            for index, units in enumerate(per_width):
                if list(units) != list(range(len(units))):
                    self._indices[f"units_{number}_{index}"] = tuple(units)
        device = next((parameter.device for parameter in self.at.parameters()), None)
        for buffer, units in self._indices.items():
            self.register_buffer(buffer, _index(units, device), persistent=False)

    def module_at(self, index: int) -> nn.Module:
        """Return the gate of the width with this index.

        Raises: UsageError: if the width has none.
        """
        if str(index) not in inner_modules(self, "at"):
            raise UsageError(
                f"the gates of {self.name} are for the widths {self.widths[: len(self.at)]}, not for the active "
                f"{self._slim.active.width}; set one of these, or run the dense pass"
            )
        return inner_modules(self, "at")[str(index)]

    @property
    def idle(self) -> bool:
        """Whether the dense pass runs."""
        return self.state.active is Pass.DENSE

    def own_at(self, index: int) -> nn.Module:
        """Return what `remove_gates` takes out: extracted networks have no gates."""
        return NoGates()

    def watch(self, seen: list[Decision] | None) -> None:
        """Put what is decided from now on into a list."""
        self.__dict__["seen"], self.decision.active = seen, _NONE

    def decide(self, source: Tensor) -> None:
        """Look at the input of the layer and keep the mask for the layers that read what it makes."""
        if self.state.active is not Pass.GATED:
            return
        others = [axis for axis in range(1, source.ndim) if axis != self.axis % source.ndim]
        mask = self.module_at(self._slim.index)(source.mean(others) if others else source)
        decision = Decision(mask, tuple(source.shape[axis] for axis in others), self._slim.index)
        self.decision.active = decision
        if self.seen is not None and not in_backward():
            self.seen.append(decision)

    def masked(self, source: Tensor, number: int) -> Tensor:
        """Return the input of a layer with closed units set to zero."""
        if self.state.active is not Pass.GATED:
            return source
        mask = self.decision.active.mask
        if mask is None or len(mask) != len(source):
            raise UsageError(
                f"a layer reads what {self.name} makes, but its gate has "
                f"{'not decided' if mask is None else f'decided for {len(mask)} images, not {len(source)}'}; "
                "in a gated pass run the model as a whole"
            )
        units = self._buffers.get(f"units_{number}_{self._slim.index}")
        if units is not None:  # unit -1 is always open
            mask = torch.cat([mask.new_ones(len(mask), 1), mask], 1).index_select(1, units + 1)
        shape = [1] * source.ndim
        shape[0], shape[self.reader_axes[number]] = mask.shape
        return source * mask.to(source.dtype).view(shape)

    def _apply(self, *args: Any, **kwargs: Any) -> LayerGates:
        """Keep the contents of the index buffers through moves that drop contents, such as `to_empty`."""
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        for name, units in self._indices.items():
            buffer = self._buffers[name]
            if buffer is not None and not buffer.is_meta:
                self._buffers[name] = _index(units, buffer.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a forward."""
        return {**self.__dict__, "decision": Active(_NONE), "seen": None}


class NoGates(nn.Identity):
    """What is in the place of gates while a network is extracted."""


def _index(units: Sequence[int], device: torch.device | None) -> Tensor:
    return torch.tensor(units, device=device)


class Look:
    """A hook before the layer that makes the units: the gate decides."""

    def __init__(self, gates: LayerGates) -> None:
        self.gates = gates

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Let the gate look at the input."""
        self.gates.decide(args[0])


class Mask:
    """A hook before a layer that reads the units: closed ones are zero."""

    def __init__(self, gates: LayerGates, number: int) -> None:
        self.gates, self.number = gates, number

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Mask the input."""
        return (self.gates.masked(args[0], self.number), *args[1:])
