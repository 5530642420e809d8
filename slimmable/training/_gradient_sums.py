"""Norms, ratios and cosines of the widths' gradients, from one set of sums of squares and products per parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor

from slimmable.losses._cosines import at_least_float32
from slimmable.training._blocks import Shared

Sums: TypeAlias = "dict[tuple[str, float, float], Tensor]"
"""(kind, width, other width or the same) -> a sum over the entries of the parameters that it is of."""


def sums_of(shared: Shared, gradient: Tensor, own: Mapping[float, Tensor]) -> Sums:
    """Return the sums of one parameter, as a dict of float64 tensors without axes on the CPU.

    The kinds are `total` and `own` (squares of the total and of each width's own gradient in the block of the width),
    `product` (of two widths' own gradients), and `first` and `second` (squares of the two in what both widths read).

    Args:
        shared: the parameter.
        gradient: the total one.
        own: width -> its own gradient, of the shape of its block.
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
    """Return the sums of several parameters as one vector."""
    result: Sums = {}
    for sums in all_sums:
        result |= {key: result[key] + value if key in result else value for key, value in sums.items()}
    return result


def values_of(sums: Sums, widths: Sequence[float]) -> dict[str, Tensor]:
    """Return column -> value for the sums of a parameter or of several; NaN where there is no sum.

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
    """Sum the products in float64, where the device has it, so that the squares of a part subtract exactly."""
    return (a * b).sum(dtype=torch.float32 if a.device.type == "mps" else torch.float64)
