"""What a pass switches: gates inside layers, which decide and mask, and BatchNorms with separate statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimmable.errors import UsageError
from slimmable.view.container import SwitchableContainer, inner_modules
from slimmable.view.cuts import take_channels
from slimmable.view.norms import SwitchableNorm
from slimmable.view.recompute import Active, in_backward

GATE = "channel_gate"  # the name of the gates in the layer whose units they open and close


class Pass(Enum):
    """Which of the two networks of a gated model runs."""

    DENSE = 0
    GATED = 1

    @property
    def index(self) -> int:
        """The index that `Active` needs: not -1, so a recomputed forward can return to this pass."""
        return self.value


@dataclass(frozen=True, eq=False)
class Decision:
    """The decision of a gate in one forward."""

    mask: Tensor | None  # of shape (images, units); None before the gate has decided
    positions: tuple[int, ...]  # shape of the layer's input without its image and channel axes
    index: int  # of the width


_UNDECIDED = Decision(None, (), 0)


class LayerGates(SwitchableContainer):
    """The gates of one group of units, one per width, and their decision in the current forward.

    In the state dict the full width's gate is `channel_gate.at.0`, followed by those of narrower widths. The gates of a
    second group that the same layer makes are in `channel_gate_1`.

    Args:
        name: name of the layer that makes the units, for messages and results.
        axis: channel axis of this layer's input.
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
        self.decision = Active(_UNDECIDED)
        self.record: list[Decision] | None = None
        self._indices = {
            f"units_{number}_{index}": tuple(units)
            for number, (_, per_width) in enumerate(readers)
            for index, units in enumerate(per_width)
            if list(units) != list(range(len(units)))
        }
        device = next((parameter.device for parameter in self.at.parameters()), None)
        for buffer, units in self._indices.items():
            self.register_buffer(buffer, torch.tensor(units, device=device), persistent=False)

    def module_at(self, index: int) -> nn.Module:
        """Return the gate of the width with this index; raise `UsageError` if it has none."""
        gates = inner_modules(self, "at")
        if str(index) not in gates:
            raise UsageError(
                f"the gates of {self.name} are for the widths {self.widths[: len(self.at)]}, not for the active "
                f"{self._slim.active.width}; set one of these, or run the dense pass"
            )
        return gates[str(index)]

    @property
    def idle(self) -> bool:
        """Whether the dense pass runs."""
        return self.active_pass.active is Pass.DENSE

    def own_at(self, index: int) -> nn.Module:
        """Return a placeholder that `ungate` removes, since extracted networks have no gates."""
        return NoGates()

    def record_in(self, record: list[Decision] | None) -> None:
        """Append future decisions to a list, and forget the last one."""
        self.record, self.decision.active = record, _UNDECIDED

    def decide(self, source: Tensor) -> None:
        """Decide from the layer's input, and keep the mask for the layers that read its units."""
        if self.idle:
            return
        others = [axis for axis in range(1, source.ndim) if axis != self.axis % source.ndim]
        mask = self.module_at(self._slim.index)(source.mean(others) if others else source)
        decision = Decision(mask, tuple(source.shape[axis] for axis in others), self._slim.index)
        self.decision.active = decision
        if self.record is not None and not in_backward():
            self.record.append(decision)

    def masked(self, source: Tensor, number: int) -> Tensor:
        """Return the input of a reader, given by its number, with closed units set to zero."""
        if self.idle:
            return source
        mask = self.decision.active.mask
        if mask is None or len(mask) != len(source):
            found = "not decided" if mask is None else f"decided for {len(mask)} images, not {len(source)}"
            raise UsageError(
                f"a layer reads the output of {self.name}, but its gate has {found}; in a gated pass run the whole "
                "model"
            )
        units = self._buffers.get(f"units_{number}_{self._slim.index}")
        if units is not None:  # unit -1 is always open
            mask = torch.cat([mask.new_ones(len(mask), 1), mask], 1).index_select(1, units + 1)
        shape = [1] * source.ndim
        shape[0], shape[self.reader_axes[number]] = mask.shape
        return source * mask.to(source.dtype).view(shape)

    def _apply(self, *args: Any, **kwargs: Any) -> LayerGates:
        """Refill the index buffers after moves that lose their contents, such as `to_empty`."""
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        for name, units in self._indices.items():
            buffer = self._buffers[name]
            if buffer is not None and not buffer.is_meta:
                self._buffers[name] = torch.tensor(units, device=buffer.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of a running forward."""
        return {**self.__dict__, "decision": Active(_UNDECIDED), "record": None}


class NoGates(nn.Identity):
    """Takes the place of gates while a network is extracted."""


def gates_in(model: nn.Module) -> list[LayerGates]:
    """Return the gates in a model, in the order of their layers."""
    return [module for module in model.modules() if isinstance(module, LayerGates)]


def has_gates(model: nn.Module) -> bool:
    """Return whether a model has gates."""
    return bool(gates_in(model))


class GateHook:
    """Before the layer that makes the units, lets the gates decide; before a reader, closes its units."""

    def __init__(self, gates: LayerGates, number: int | None = None) -> None:
        self.gates, self.number = gates, number

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the layer's arguments, masked for a reader."""
        if self.number is not None:
            return (self.gates.masked(args[0], self.number), *args[1:])
        self.gates.decide(args[0])
        return args


class PassNorm(SwitchableNorm):
    """A `SwitchableNorm` with further norms for the gated pass, one per width: `gated.0` and so on in the state dict.

    A checkpoint without them loads into the norms of both passes.

    Source: the separate batch norms of Krishna et al. 2023.
    """

    active_pass: Active[Pass]
    gated: nn.ModuleList

    @staticmethod
    def of(norm: nn.Module, widths: int) -> PassNorm:
        """Give a norm, switchable or not, norms for the gated pass, which start as copies.

        Only the first `widths` widths get them; those that `calibrate_bn` added run dense. A switchable norm is changed
        in place, any other is put inside a new one.
        """
        own = norm if isinstance(norm, SwitchableNorm) else SwitchableNorm(norm, (1.0,), (None,))
        copies = [own.copy_at(index) for index in range(min(widths, 1 + len(own.narrow)))]
        own.__dict__["inside"] = own is not norm
        own.__dict__["active_pass"] = Active(Pass.DENSE)
        own.__class__ = PassNorm
        own.add_module("gated", nn.ModuleList(copies))
        own.gated.training = own.training
        return cast(PassNorm, own)

    def without(self) -> nn.Module:
        """Undo `of`: return the original norm, switchable or not."""
        del self._modules["gated"], self.__dict__["active_pass"]
        self.__class__ = SwitchableNorm  # type: ignore[assignment]
        return self.full if self.__dict__.pop("inside") else self

    def of_gated_pass(self, index: int) -> nn.Module:
        """Return the gated pass's norm of the width with this index; raise `UsageError` if it has none."""
        norms = inner_modules(self, "gated")
        if str(index) not in norms:
            raise UsageError(f"the active width {self._slim.active.width} has no norm for the gated pass")
        return norms[str(index)]

    def norm_at(self, index: int) -> nn.Module:
        """Return the active pass's norm of the width with this index."""
        if self.__dict__["active_pass"].active is Pass.DENSE:
            return super().norm_at(index)
        return self.of_gated_pass(index)

    module_at = norm_at

    def norms(self) -> Iterator[nn.Module]:
        """Yield the norms of all widths and of both passes."""
        yield from super().norms()
        yield from inner_modules(self, "gated").values()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the gated pass's norms last."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        yield from self.gated.named_modules(memo, f"{prefix}.gated" if prefix else "gated", remove_duplicate)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Save the gated pass's norms under `gated`."""
        found = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.gated.state_dict(destination=found, prefix=f"{prefix}gated.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *reports: list[str]
    ) -> None:
        own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(f"{prefix}gated.")}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)
        state_dict.update(own or self._from_dense(state_dict, prefix))

    def _from_dense(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
        """Return the dense pass's entries for the gated pass; narrow norms without an entry use the full norm's."""
        found = {}
        for index, norm in enumerate(self.gated):
            dense = f"{prefix}full." if index == 0 else f"{prefix}narrow.{index - 1}."
            for key, tensor in norm.state_dict(keep_vars=True).items():
                given = state_dict.get(f"{dense}{key}", state_dict.get(f"{prefix}full.{key}"))
                if given is not None:
                    part = given if given.shape == tensor.shape else take_channels(given, self._kept[index])
                    found[f"{prefix}gated.{index}.{key}"] = part.clone()
        return found
