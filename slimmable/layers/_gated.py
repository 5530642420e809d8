"""What a gated model has in its layers: gates per width, hooks that mask, and norms of their own for the gated pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from slimmable._errors import UsageError
from slimmable.layers._container import SwitchableContainer, inner_modules
from slimmable.layers._cut import take_channels
from slimmable.layers._narrow import copy_of_norm, own_norm
from slimmable.layers._recompute import Active, in_backward
from slimmable.layers._switch import SwitchableNorm

GATE = "channel_gate"  # the name of a gate in the layer that makes what it opens and closes


Seen: TypeAlias = "list[tuple[Tensor, tuple[int, ...]]]"


class Pass(Enum):
    """Which of the two networks runs."""

    DENSE = "dense"
    GATED = "gated"

    @property
    def index(self) -> int:
        """A number that says that the pass can be taken up again; see `Active`."""
        return 0 if self is Pass.DENSE else 1


class LayerGates(SwitchableContainer):
    """The gates of one layer's units, one per width, and what they have decided in the forward that runs.

    In the state dict the full width's gate is `channel_gate.at.0`, the narrower ones follow.

    Args:
        name: path of the layer whose input the gates look at.
        axis: of that input, where the channels lie.
        widths: those of the model.
        gates: for each width a module: pooled features (images, channels) -> mask (images, units).
        readers: for each layer that is masked the axis of its input, and for each width the unit at each position of
            it, -1 for positions that stay open.
    """

    state: Active[Pass]
    mask: Tensor | None
    seen: Seen | None

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
        self.__dict__["mask"] = None
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

    def own_at(self, index: int) -> nn.Module:
        """Return nothing of interest: extracted networks have no gates."""
        return nn.Identity()

    def watch(self, seen: Seen | None) -> None:
        """Put what is decided from now on, and the positions that were looked at, into a list."""
        self.__dict__["seen"], self.__dict__["mask"] = seen, None

    def decide(self, source: Tensor) -> None:
        """Look at the input of the layer and keep the mask for the layers that read what it makes."""
        if self.state.active is not Pass.GATED:
            return
        others = [axis for axis in range(1, source.ndim) if axis != self.axis % source.ndim]
        mask = self.module_at(self._slim.index)(source.mean(others) if others else source)
        self.__dict__["mask"] = mask
        if self.seen is not None and not in_backward():
            self.seen.append((mask, tuple(source.shape[axis] for axis in others)))

    def masked(self, source: Tensor, number: int) -> Tensor:
        """Return the input of a layer with closed units set to zero."""
        if self.state.active is not Pass.GATED:
            return source
        mask = self.mask
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
        return {**self.__dict__, "mask": None, "seen": None}


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


class PassNorm(SwitchableNorm):
    """A `SwitchableNorm` with more norms for the gated pass, one per width; in the state dict `bn.gated.0` and so on.

    A checkpoint without them loads into both passes' norms.

    Source: the separate batch norms of Krishna et al. 2023.
    """

    @staticmethod
    def of(norm: nn.Module) -> PassNorm:
        """Turn a norm, switchable or not, into one with norms for the gated pass, which start as copies.

        A switchable norm is changed in place, any other is put inside of a new one.
        """
        own = norm if isinstance(norm, SwitchableNorm) else SwitchableNorm(norm, (1.0,), (None,))
        copies = [copy_of_norm(own_norm(own.norm_at(index))) for index in range(1 + len(own.narrow))]
        own.__dict__["inside"] = own is not norm
        own.__dict__["state"] = Active(Pass.DENSE)
        own.__class__ = PassNorm
        own.add_module("gated", nn.ModuleList(copies))
        own._modules["gated"].training = own.training  # type: ignore[union-attr]
        return cast(PassNorm, own)

    def without(self) -> nn.Module:
        """Undo `of`: the norm, switchable or not, that there was."""
        del self._modules["gated"], self.__dict__["state"]
        self.__class__ = SwitchableNorm  # type: ignore[assignment]
        return self.full if self.__dict__.pop("inside") else self

    def norm_at(self, index: int) -> nn.Module:
        """Return the norm of the width with this index, of the pass that runs."""
        if self.__dict__["state"].active is Pass.DENSE:
            return super().norm_at(index)
        gated = inner_modules(self, "gated")
        if str(index) not in gated:
            raise UsageError(f"the active width {self._slim.active.width} has no norm for the gated pass")
        return gated[str(index)]

    module_at = norm_at

    def norms(self) -> Iterator[nn.Module]:
        """Yield the norms of all widths and of both passes."""
        yield from super().norms()
        yield from inner_modules(self, "gated").values()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List the gated pass's norms last."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        gated = cast(nn.Module, self._modules["gated"])
        yield from gated.named_modules(memo, f"{prefix}.gated" if prefix else "gated", remove_duplicate)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Save the gated pass's norms under `gated`."""
        found = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        gated = cast(nn.Module, self._modules["gated"])
        return gated.state_dict(destination=found, prefix=f"{prefix}gated.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *reports: list[str]
    ) -> None:
        own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(f"{prefix}gated.")}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)
        state_dict.update(own or self._from_dense(state_dict, prefix))

    def _from_dense(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
        """Take what a checkpoint has for the dense pass; a narrow norm that shares gain and bias takes the full's."""
        found = {}
        for index, norm in enumerate(cast(nn.ModuleList, self._modules["gated"])):
            dense = f"{prefix}full." if index == 0 else f"{prefix}narrow.{index - 1}."
            for key, tensor in norm.state_dict(keep_vars=True).items():
                given = state_dict.get(f"{dense}{key}", state_dict.get(f"{prefix}full.{key}"))
                if given is not None:
                    part = given if given.shape == tensor.shape else take_channels(given, self._kept[index])
                    found[f"{prefix}gated.{index}.{key}"] = part.clone()
        return found


Gated = LayerGates | PassNorm


def gated_parts(model: nn.Module) -> list[Gated]:
    """Return what reacts to the pass."""
    return [module for module in model.modules() if isinstance(module, (LayerGates, PassNorm))]


def remove_gates(model: nn.Module) -> nn.Module:
    """Take gates, hooks and the gated pass's norms off a model, in place; return it."""
    for module in list(model.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (Look, Mask)):
                del module._forward_pre_hooks[key]
        module._modules.pop(GATE, None)
        for name, child in list(module._modules.items()):
            if isinstance(child, PassNorm):
                module._modules[name] = child.without()
    return model.without() if isinstance(model, PassNorm) else model


def has_gates(model: nn.Module) -> bool:
    """Tell whether a model has gates."""
    return any(isinstance(module, LayerGates) for module in model.modules())
