"""What must hold for every converted model, whatever its architecture; used by the tests beside this file."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import slimmable
from slimmable.analysis._trace import output_tensors
from slimmable.analysis.ordering import permute
from slimmable.analysis.plan import Plan


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give parameters and statistics values that hide nothing: no zero gain, no layer scale of 1e-6."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or float(parameter.abs().max()) < 1e-3:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.3).add(0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator).mul(0.2))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator).add(0.5))
    return model


def first_output(output: Any) -> Tensor:
    return output_tensors(output)[0]


def difference(first: Tensor, second: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    assert first.shape == second.shape
    return float((first - second).abs().max() / second.abs().max().clamp_min(1e-30))


def full_width_is_the_original(model: nn.Module, slim: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(first_output(slim(*inputs)), first_output(model(*inputs)))


def every_width_is_its_extraction(slim: nn.Module, *inputs: Tensor, limit: float) -> None:
    for width in slimmable.widths_of(slim):
        small = slimmable.extract(slim, width)
        assert not [m for m in small.modules() if "_slim" in m.__dict__ or type(m).__module__.startswith("slimmable")]
        with torch.no_grad(), slimmable.at_width(slim, width):
            assert difference(first_output(slim(*inputs)), first_output(small(*inputs))) <= limit


def permuting_units_changes_nothing(model: nn.Module, plan: Plan, *inputs: Tensor, limit: float) -> None:
    """Permute the units of every group: the full network must compute the same function."""
    random = np.random.default_rng(0)
    shuffled = copy.deepcopy(model)
    permute(shuffled, plan, [random.permutation(group.units) for group in plan.groups])
    with torch.no_grad():
        expected, got = first_output(model(*inputs)), first_output(shuffled(*inputs))
    if plan.output_shapes[0] != plan.output_shapes[-1]:  # thinner features come out permuted
        expected, got = expected.sort(1).values, got.sort(1).values
    assert difference(got, expected) <= limit


def zeroing_what_is_dropped_is_the_narrow_network(
    model: nn.Module, slim: nn.Module, plan: Plan, *inputs: Tensor, limit: float
) -> None:
    """With all that a width drops set to zero, the full network equals the narrow one (BatchNorm networks)."""
    for index, width in enumerate(plan.widths):
        zeroed = copy.deepcopy(model)
        with torch.no_grad():
            for (path, name), per_width in plan.tensors.items():
                parameter = zeroed.get_submodule(path)._parameters.get(name)
                for axis, kept in enumerate(per_width[index] if parameter is not None else ()):
                    if kept is not None:
                        assert parameter is not None
                        gone = torch.ones(parameter.shape[axis], dtype=torch.bool)
                        gone[list(range(kept) if isinstance(kept, int) else kept)] = False
                        parameter.index_fill_(axis, gone.nonzero()[:, 0], 0)
            expected = first_output(zeroed(*inputs))
            with slimmable.at_width(slim, width):
                assert difference(first_output(slim(*inputs)), expected) <= limit
