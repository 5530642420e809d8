"""Which channel groups of a model can have a gate, and where its mask goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimmable._convert import Skip, plain, skipper
from slimmable._input_data import encode_inputs
from slimmable._inputs import check_module, example_of
from slimmable._nested import output_tensors
from slimmable.analysis.fake import FakeModel
from slimmable.analysis.make import best_trace, filled_plan
from slimmable.analysis.plan import Plan
from slimmable.analysis.trace import Trace
from slimmable.errors import ConversionError, TraceError
from slimmable.gating._costs import Costs
from slimmable.gating._gate import gate_macs
from slimmable.gating._judge import Candidate, Judge, RefusedError, Units
from slimmable.view.state import is_slim, state_of


@dataclass(frozen=True, eq=False)
class GatePlan:
    """What `gate` would do, as pure data; `print` shows it. Copies of a model share it.

    Attributes:
        gates: the groups that get a gate, in the order of their layers.
        refused: for each other group the layer that makes it, its units and why it gets none.
        plan: the channel groups.
        costs: multiply-adds for images of the example's size.
        example: of `encode_inputs`, for files.
    """

    gates: tuple[Candidate, ...]
    refused: tuple[tuple[str, int, str], ...]
    plan: Plan
    costs: Costs
    example: list[Any]

    def __deepcopy__(self, memo: Any) -> GatePlan:
        return self

    def least_share(self) -> float:
        """Return what a gated pass costs over the dense one, at the full width, with all gates closed.

        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> gate_plan(net, example_inputs=torch.zeros(2, 4)).least_share()  # first layer and gate, of 192 multiply-adds
        0.4166666666666667
        """
        counts = self.plan.channels.units
        closed = {gate.group: torch.zeros(1, gate.units, dtype=torch.float64) for gate in self.gates}
        own = sum(gate_macs(len(gate.channels), gate.units) for gate in self.gates)
        left = own + sum(self.costs.layers(closed, counts).values())
        return float(left / sum(self.costs.layers({}, counts).values()))

    def __str__(self) -> str:
        lines = [f"{'units':>6}  {'gate looks at the input of':<36}  masks the input of"]
        for gate in self.gates:
            lines.append(f"{gate.units:>6}  {gate.name:<36}  {', '.join(reader.path for reader in gate.readers)}")
        if self.refused:
            lines.append("without a gate:")
        lines += [f"{units:>6}  {maker}: {reason}" for maker, units, reason in self.refused]
        return "\n".join(lines)


def gate_plan(model: nn.Module, *, example_inputs: Any = None, skip: Skip = ()) -> GatePlan:
    """Return which channel groups `gate` would gate, and why not the others; changes nothing.

    Args and errors: as `gate`, but a model without any gate is no error here.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> import torch
    >>> print(gate_plan(net, example_inputs=torch.zeros(2, 4)))
     units  gate looks at the input of            masks the input of
        16  2                                     4
    without a gate:
         8  0: its layer reads the model's input, of which a gate learns little
    """
    check_module("gate_plan", model)
    state = state_of(model)
    plan: Plan | None = None if state is None or "_slim_root" not in model.__dict__ else state.plan
    if plan is None and any(is_slim(module) and module.__dict__["_slim"].plan for module in model.modules()):
        raise ConversionError(
            f"a part of this {type(model).__name__} was converted; gate the model that slimify returned, or gate first "
            "what is then a part of others"
        )
    args, kwargs = example_of(model, example_inputs)
    return _found(model, args, kwargs, skipper(model, skip), plan)


def costs_for(model: nn.Module, found: GatePlan, example_inputs: Any) -> Costs:
    """Return the multiply-adds of a gated model for inputs of another size."""
    args, kwargs = example_of(model, example_inputs)
    trace = _traced(model, args, kwargs, found.plan.widths)[1]
    return _costs(trace, Units(trace, found.plan), found.plan, found.gates, _images(args, kwargs))


def _images(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    tensors = output_tensors((args, kwargs))
    if not tensors or not tensors[0].ndim or not len(tensors[0]):
        raise ConversionError("gates are for models whose first input is a tensor with one row per image")
    return len(tensors[0])


def _traced(model: nn.Module, args: Any, kwargs: Any, widths: tuple[float, ...]) -> Any:
    bare = plain(model)
    fake = FakeModel(bare, args, kwargs)
    try:
        return fake, *best_trace(fake, widths, _nothing, 1)
    except TraceError:
        if not fake.emptied:
            raise
        fake = FakeModel(bare, args, kwargs, keep_caches=True)
        return fake, *best_trace(fake, widths, _nothing, 1)


def _nothing(path: str, module: nn.Module) -> bool:
    return False


def _found(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    skip: Callable[[str, nn.Module], bool],
    plan: Plan | None,
) -> GatePlan:
    images = _images(args, kwargs)
    fake, trace, solution = _traced(model, args, kwargs, (1.0,) if plan is None else plan.widths)
    if plan is None:
        plan = filled_plan(fake, trace, solution, Plan((1.0,)))
    units = Units(trace, plan)
    judge = Judge(fake.model, trace, units, plan, images, skip)
    gates, refused = [], []
    for group, size in enumerate(plan.channels.units):
        try:
            gates.append(judge.candidate(group))
        except RefusedError as error:
            refused.append(((units.makers[group] or ["?"])[0], size, str(error)))
    costs = _costs(trace, units, plan, gates, images)
    savings = costs.savings()
    order = {path: number for number, path in enumerate(trace.calls)}
    kept: list[Candidate] = []
    for gate in sorted(gates, key=lambda gate: order[gate.maker]):
        if gate_macs(len(gate.channels), gate.units) < savings[gate.group]:
            kept.append(replace(gate, number=sum(other.maker == gate.maker for other in kept)))
        else:
            reason = f"a gate would cost more multiply-adds than the {savings[gate.group]:.0f} that it could save"
            refused.append((gate.maker, gate.units, reason))
    return GatePlan(tuple(kept), tuple(refused), plan, costs, encode_inputs(args, kwargs))


def _costs(trace: Trace, units: Units, plan: Plan, gates: Sequence[Candidate], images: int) -> Costs:
    products = [(path, macs, tuple(map(units.of, axes))) for macs, axes, path in trace.context.products]
    positions = {gate.maker: positions_of(trace.calls[gate.maker][0].source, gate.axis) for gate in gates}
    return Costs(products, plan.channels.needed.grouping, images, positions)


def positions_of(source: Tensor | None, axis: int) -> tuple[int, ...]:
    """Return the sizes of a layer's input without batch and channels."""
    assert source is not None
    return tuple(int(size) for i, size in enumerate(source.shape) if i not in (0, axis))
