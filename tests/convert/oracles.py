"""What must hold for every converted model, whatever its architecture.

Functions that return a number measure by how much it does not hold; the others assert that it does. `Run` is how a
model is run: it gives all tensors of the output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import slimmable
from slimmable._inputs import output_tensors
from slimmable.analysis.importance import order_units, permute
from slimmable.analysis.plan import Plan

Run = Callable[[nn.Module], list[Tensor]]


def run_on(*args: Any, **kwargs: Any) -> Run:
    def run(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return output_tensors(model(*args, **kwargs))

    return run


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


def fresh_copy(model: nn.Module) -> nn.Module:
    """A copy without what an earlier forward has computed from the weights and kept."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, value in vars(module).items():
            if isinstance(value, dict) and not name.startswith("_") and all(type(v) is Tensor for v in value.values()):
                value.clear()
    return twin


def first_output(output: Any) -> Tensor:
    return output_tensors(output)[0]


def difference(first: Tensor, second: Tensor) -> float:
    """The largest difference, relative to the largest number; nan if there is one in either."""
    assert first.shape == second.shape
    first, second = first.detach(), second.detach()
    return float((first - second).abs().max() / second.abs().max().clamp_min(1e-30))


def largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return float(np.max([difference(a, b) for a, b in zip(first, second, strict=True)]))  # max() would lose a nan


def outputs_of(slim: nn.Module, run: Run) -> dict[float, list[Tensor]]:
    """The outputs of every width."""
    found = {}
    for width in slimmable.widths_of(slim):
        with slimmable.at_width(slim, width):
            found[width] = run(slim)
    return found


def full_width_is_the_original(model: nn.Module, slim: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(first_output(slim(*inputs)), first_output(model(*inputs)))


def every_width_is_its_extraction(slim: nn.Module, *inputs: Tensor, limit: float) -> None:
    run = run_on(*inputs)
    assert extracted_difference(slim, run, outputs_of(slim, run)) <= limit


def extracted_difference(slim: nn.Module, run: Run, outputs: Mapping[float, Sequence[Tensor]]) -> float:
    found = []
    for width, expected in outputs.items():
        small = slimmable.extract(slim, width)
        assert not [m for m in small.modules() if "_slim" in m.__dict__ or type(m).__module__.startswith("slimmable")]
        found.append(largest_difference(run(small), expected))
    return float(np.max(found))


def permuting_units_changes_nothing(model: nn.Module, plan: Plan, *inputs: Tensor, limit: float) -> None:
    run = run_on(*inputs)
    assert permuted_difference(model, plan, run, run(model)) <= limit


def permuted_difference(
    model: nn.Module, plan: Plan, run: Run, expected: Sequence[Tensor], order: str = "random"
) -> float:
    """Permute the units of every group, at random or by magnitude: the full network must compute the same function."""
    random = np.random.default_rng(0)
    shuffled = fresh_copy(model)
    orders = [np.arange(g.units) if g.ordered else random.permutation(g.units) for g in plan.groups]
    permute(shuffled, plan, order_units(model, plan, "magnitude") if order == "magnitude" else orders)
    found = []
    grouping = plan.channels.needed.grouping
    for got, want, output in zip(run(shuffled), expected, plan.channels.outputs, strict=True):
        for axis, ids in enumerate(output.units):
            if ids is not None and grouping.groups_in([ids]):  # features come out permuted
                got, want = got.sort(axis).values, want.sort(axis).values
        found.append(difference(got, want))
    return float(np.max(found))


def zeroing_what_is_dropped_is_the_narrow_network(
    model: nn.Module, slim: nn.Module, plan: Plan, *inputs: Tensor, limit: float
) -> None:
    run = run_on(*inputs)
    assert zeroed_difference(model, plan, run, outputs_of(slim, run), plan.widths) <= limit


def zeroed_difference(
    model: nn.Module, plan: Plan, run: Run, outputs: Mapping[float, Sequence[Tensor]], widths: Iterable[float]
) -> float:
    """With all that a width drops set to zero, the full network equals the narrow one (BatchNorm networks).

    Where the outputs are thinner, only their largest number and the sum of their sizes can be compared.
    """
    found = []
    for width in widths:
        index = plan.widths.index(width)
        zeroed = fresh_copy(model)
        with torch.no_grad():
            for (path, name), per_width in plan.tensors.items():
                parameter = zeroed.get_submodule(path)._parameters.get(name)
                for axis, kept in enumerate(per_width[index] if parameter is not None else ()):
                    if kept is not None:
                        assert parameter is not None
                        gone = torch.ones(parameter.shape[axis], dtype=torch.bool)
                        gone[list(range(kept) if isinstance(kept, int) else kept)] = False
                        parameter.index_fill_(axis, gone.nonzero()[:, 0], 0)
        for full, narrow in zip(run(zeroed), outputs[width], strict=True):
            same = full.shape == narrow.shape
            found.append(difference(full, narrow) if same else difference(_sizes(full), _sizes(narrow)))
    return float(np.max(found))


def _sizes(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.abs().max(), tensor.abs().sum()])


def zeroing_applies(model: nn.Module, plan: Plan) -> bool:
    """Only BatchNorms, which treat channels one by one, and no attention whose scale follows its width.

    Nor a convolution along channels (ECA) that come nearer to each other where some between them are dropped.
    """
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ and m._parameters]
    scaled = any(isinstance(v, float) for each in plan.columns for at in each.values.values() for v in at.values())
    axes = [axis for group in plan.groups if group.ordered for axis in group.members]
    nearer = any(isinstance(plan.tensors[path, name][-1][axis], tuple) for path, name, axis in axes)
    plain = all(isinstance(norm, nn.modules.batchnorm._BatchNorm) for norm in norms)
    return bool(norms) and plain and not scaled and not nearer


def attention_difference(slim: nn.Module, run: Run, outputs: Mapping[float, Sequence[Tensor]]) -> float | None:
    """Attention by torch's fused kernel and by timm's own code must be scaled alike at every width."""
    switches = [module for module in slim.modules() if getattr(module, "fused_attn", False)]
    found = []
    for module in switches:
        module.fused_attn = False
    for width, expected in outputs.items() if switches else ():
        with slimmable.at_width(slim, width):
            found.append(largest_difference(run(slim), expected))
    for module in switches:
        module.fused_attn = True
    return float(np.max(found)) if found else None
