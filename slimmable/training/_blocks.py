"""Which block of every shared parameter each width reads: what the plan or the layer keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from slimmable._convert import shallow_modules
from slimmable._width import columns_of, places_of
from slimmable.view.container import SwitchableContainer
from slimmable.view.cuts import Cut, put, take
from slimmable.view.norms import SwitchableNorm
from slimmable.view.state import Column, state_of


@dataclass(frozen=True)
class Block:
    """The part of a parameter that one width reads; `cut` is None for the whole."""

    cut: Cut | None
    buffers: Mapping[str, Tensor | None]

    def of(self, tensor: Tensor) -> Tensor:
        """Return the block of a tensor of the parameter's shape."""
        return tensor if self.cut is None else take(tensor, self.cut, self.buffers)

    def spread(self, part: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape with `part` in the block and zeros around it."""
        if self.cut is None:
            return part
        return put(part.new_zeros(()).expand(self.cut.full), self.cut, self.buffers, part)


@dataclass(frozen=True)
class Shared:
    """A parameter that all widths share."""

    name: str
    parameter: nn.Parameter
    blocks: Mapping[float, Block]


def shared_parameters(model: nn.Module, widths: Sequence[float]) -> list[Shared]:
    """Return the parameters of `model` that all `widths` share, in the order of their names in the model.

    Parameters of switchable norms and probes belong to one width each and are left out; of a model with shared gains
    and biases these are shared. A parameter that several modules hold comes once, with the block of the first.

    Raises: WidthError: if the model does not have one of the widths. ConversionError: if nothing reacts to widths.

    >>> from slimmable import SlimLinear
    >>> [weight, bias] = shared_parameters(SlimLinear(8, 4, widths=(1.0, 0.5)), (1.0, 0.5))
    >>> weight.name, weight.blocks[0.5].of(weight.parameter).shape
    ('weight', torch.Size([2, 4]))
    """
    places = places_of(model)
    columns = {width: columns_of(places, width) for width in widths}
    column_of = {id(place[0]): {w: columns[w][index] for w in widths} for index, place in enumerate(places)}
    found: dict[int, dict[float, Block]] = {}
    for module in shallow_modules(model):
        at = column_of.get(id(module), {})
        for name, parameter in _parameters_at_all_widths(module).items():
            if parameter is not None:
                found.setdefault(id(parameter), {w: _block(module, name, at.get(w)) for w in widths})
    named = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in found]
    return [Shared(name, parameter, found[id(parameter)]) for name, parameter in named]


def _parameters_at_all_widths(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    if isinstance(module, SwitchableNorm):
        return module.full._parameters if module.narrow.shared_affine else {}
    return {} if isinstance(module, SwitchableContainer) else module._parameters


def _block(module: nn.Module, name: str, column: Column | None) -> Block:
    """Return what a column of a module, None for a module without widths, reads of its parameter."""
    if column is None:
        return Block(None, {})
    if not isinstance(module, SwitchableNorm):
        return Block(column.cuts.get(name), module._buffers)
    norm = module.norm_at(column.index)
    state = state_of(norm)  # the norms of narrow widths have a view of the full one's gain and bias
    return Block(None if state is None else state.columns[0].cuts.get(name), norm._buffers)
