"""Compare the gradients of several widths, by the block of each parameter that a width reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor, nn

from slimmable._convert import shallow_modules
from slimmable._numerics import at_least_float32
from slimmable._width import columns_of, places_of
from slimmable.view.container import SwitchableContainer
from slimmable.view.cuts import Cut, put, take
from slimmable.view.norms import SwitchableNorm
from slimmable.view.state import Column, state_of

Sums: TypeAlias = "dict[tuple[str, float, float], Tensor]"
"""(kind, width, the same or another width) -> a sum over the entries of one or several parameters."""


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
class SharedParameter:
    """A parameter that all widths share."""

    name: str
    parameter: nn.Parameter
    blocks: Mapping[float, Block]


def shared_parameters(model: nn.Module, widths: Sequence[float]) -> list[SharedParameter]:
    """Return the parameters of `model` that all `widths` share, in the order of `named_parameters`.

    Parameters of switchable norms and probes belong to one width each and are left out, unless the model shares gains
    and biases between widths. A parameter that several modules hold appears once, with the first module's block.

    Raises: WidthError: if the model lacks one of the widths. ConversionError: if nothing in it reacts to widths.

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
    return [SharedParameter(name, parameter, found[id(parameter)]) for name, parameter in named]


def _parameters_at_all_widths(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    if isinstance(module, SwitchableNorm):
        return module.full._parameters if module.narrow.shared_affine else {}
    return {} if isinstance(module, SwitchableContainer) else module._parameters


def _block(module: nn.Module, name: str, column: Column | None) -> Block:
    """Return the block of a parameter that a module's column reads (None for a module without widths)."""
    if column is None:
        return Block(None, {})
    if not isinstance(module, SwitchableNorm):
        return Block(column.cuts.get(name), module._buffers)
    norm = module.norm_at(column.index)
    state = state_of(norm)  # the norms of narrow widths have a view of the full one's gain and bias
    return Block(None if state is None else state.columns[0].cuts.get(name), norm._buffers)


def sums_of(shared: SharedParameter, gradient: Tensor, own: Mapping[float, Tensor]) -> Sums:
    """Return the sums of one parameter, as scalar float64 tensors on the CPU.

    The kinds are `total` and `own` (squares of the total and of each width's own gradient in the width's block),
    `product` (of two widths' own gradients), and `first` and `second` (squares of the two in what both widths read).

    Args:
        shared: the parameter.
        gradient: its total gradient.
        own: width -> its own gradient, with the shape of its block.
    """
    total = at_least_float32(gradient)
    sums = {("total", width, width): _square(block.of(total)) for width, block in shared.blocks.items()}
    sums |= {("own", width, width): _square(part) for width, part in own.items()}
    spread = {width: shared.blocks[width].spread(part) for width, part in own.items()}
    for first, second in combinations(own, 2):
        part = shared.blocks[second].of(spread[first])
        sums["product", first, second] = _product(part, own[second])
        sums["first", first, second] = _square(part)
        sums["second", first, second] = _square(shared.blocks[first].of(spread[second]))
    return dict(zip(sums, torch.stack(list(sums.values())).cpu().double(), strict=True))


def added(all_sums: Iterable[Sums]) -> Sums:
    """Return the sums of several parameters taken together as one vector."""
    result: Sums = {}
    for sums in all_sums:
        result |= {key: result[key] + value if key in result else value for key, value in sums.items()}
    return result


def values_of(sums: Sums, widths: Sequence[float]) -> dict[str, Tensor]:
    """Return column -> value for the sums of one or several parameters; NaN where there is no sum.

    >>> one, four = torch.tensor(1.0), torch.tensor(4.0)
    >>> values = values_of({("total", 1.0, 1.0): four, ("total", 0.5, 0.5): one}, (1.0, 0.5))
    >>> values["grad_ratio/w0.5"], values["rest_ratio/w0.5"]
    (tensor(2.), tensor(1.7321))
    """
    missing = torch.tensor(math.nan, dtype=torch.float64)
    total = {width: sums.get(("total", width, width), missing) for width in widths}
    own = {width: sums.get(("own", width, width), missing) for width in widths}
    values = {f"grad_norm/w{width}": total[width].sqrt() for width in widths}
    values |= {f"grad_ratio/w{width}": (total[1.0] / total[width]).sqrt() for width in widths[1:]}
    values |= {
        f"rest_ratio/w{width}": ((total[1.0] - total[width]).clamp(min=0) / total[width]).sqrt() for width in widths[1:]
    }
    values |= {f"own_norm/w{width}": own[width].sqrt() for width in widths}
    values |= {f"own_ratio/w{width}": (own[1.0] / own[width]).sqrt() for width in widths[1:]}
    for pair in combinations(widths, 2):
        product, *squares = (sums.get((kind, *pair), missing) for kind in ("product", "first", "second"))
        values[f"grad_cosine/w{pair[0]}_w{pair[1]}"] = product / (squares[0].sqrt() * squares[1].sqrt())
    return values


def _square(tensor: Tensor) -> Tensor:
    return _product(tensor, tensor)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of products, in float64 where the device has it, to subtract the squares of a part exactly."""
    return (a * b).sum(dtype=torch.float32 if a.device.type == "mps" else torch.float64)
