"""`gate` and `ungate`: gates in the layers of any model, and off again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from slimmable._convert import Skip, copy_of
from slimmable._inputs import check_module
from slimmable._modules import replace_modules
from slimmable._width import set_width, width_of
from slimmable.errors import ConversionError, UsageError
from slimmable.gating._find import GatePlan, gate_plan
from slimmable.gating._gate import TEMPERATURE, ChannelGate
from slimmable.gating._judge import Candidate
from slimmable.gating._parts import (
    GATE,
    PLAN,
    LayerGates,
    Look,
    Mask,
    PassNorm,
    has_gates,
    refuse_other_gates,
    remove_gates,
)
from slimmable.view.state import Column, WidthState, state_of


def gate(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    skip: Skip = (),
    separate_norms: bool = True,
    temperature: float = TEMPERATURE,
    open_at_zero: bool = False,
    bias: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """Return a model with the weights of `model` and gates that open and close channels for each image.

    Every channel group gets a gate that lies inside a block: made by one layer, read by others as their input, in
    between only operations that treat channels one by one. In Transformers these are the hidden units of the MLPs and
    whole attention heads. The gate looks at what the maker reads; the mask goes on the inputs of the readers, which is
    the same as dropping the channels. `print(gate_plan(model))` shows what is gated and what is not, and why.

    Of every tensor the first axis is that of the images; models with another order cannot be told from those.

    Outside of `with gated(model):` the model is dense and computes the same numbers as before. A slimmable model gets
    gates for each of its widths; convert it first, then gate it. `save` and `load` know gates; a state dict of other
    gates than the model's is a CheckpointError, before any of it is loaded.

    Args:
        model: plain or converted; a part of a converted model cannot be gated.
        example_inputs: as for `slimify`; the multiply-adds of a gated pass are counted for its size.
        skip: patterns of names of layers, or a function of name and module: what these layers make gets no gate.
        separate_norms: give the BatchNorms on gated channels, and those right behind the readers, statistics, gain and
            bias of their own for the gated pass.
        temperature, open_at_zero, bias: of the gates, see `ChannelGate`.
        inplace: gate `model` itself and return it.

    Raises:
        ConversionError: if there is nothing to gate, with the reasons, or the model cannot be traced.
        UsageError: if the model has gates already, or an argument is outside its range. On errors nothing has changed.

    Source: Krishna et al. 2023 gate the inner channels of residual blocks; other architectures and widths are ours.

    >>> import torch, slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> x = torch.randn(3, 4)
    >>> torch.equal(model(x), net(x))
    True
    >>> with slimmable.gating.gated(model.train()) as run:
    ...     scores = model(x)
    >>> {name: tuple(mask.shape) for name, mask in run.masks().items()}
    {'2': (3, 32)}
    """
    check_module("gate", model)
    if has_gates(model):
        raise UsageError(f"this {type(model).__name__} has gates already; take them off with slimmable.gating.ungate")
    found = gate_plan(model, example_inputs=example_inputs, skip=skip)
    if not found.gates:
        reasons = "\n".join(f"  {maker} ({units}): {reason}" for maker, units, reason in found.refused[:20])
        raise ConversionError(f"nothing in this {type(model).__name__} can be gated\n{reasons}".rstrip())
    width = None if state_of(model) is None else width_of(model)
    make = partial(ChannelGate, temperature=temperature, open_at_zero=open_at_zero, bias=bias)
    built = [_gates(model, found, candidate, make) for candidate in found.gates]
    target = model if inplace else copy_of(model)
    for candidate, gates in zip(found.gates, built, strict=True):
        maker = target.get_submodule(candidate.maker)
        for number, reader in enumerate(candidate.readers):
            target.get_submodule(reader.path).register_forward_pre_hook(Mask(gates, number))
        maker.add_module(_child(candidate), gates.train(maker.training))
    for candidate, gates in zip(found.gates, built, strict=True):  # behind the masks of what the same layer reads
        target.get_submodule(candidate.maker).register_forward_pre_hook(Look(gates))
    if separate_norms:
        paths = {path for candidate in found.gates for path in candidate.norms}
        norms = [target.get_submodule(path) for path in paths]
        replace_modules(target, {id(norm): PassNorm.of(norm, len(found.plan.columns)) for norm in norms})
    target.register_load_state_dict_pre_hook(refuse_other_gates)  # type: ignore[no-untyped-call]
    target.__dict__[PLAN] = found
    if width is not None:
        set_width(target, width)
    return target


def ungate(model: nn.Module) -> nn.Module:
    """Take the gates, and what the gated pass has of its own, off a model in place, and return it.

    >>> import torch, slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> len(model.state_dict()), len(ungate(model).state_dict())
    (15, 6)
    """
    check_module("ungate", model)
    return remove_gates(model)


def _child(candidate: Candidate) -> str:
    return f"{GATE}_{candidate.number}" if candidate.number else GATE


def _gates(
    model: nn.Module, found: GatePlan, candidate: Candidate, make: Callable[[int, int], nn.Module]
) -> LayerGates:
    """Make the gates of one group, one per width, where and of what type the layer's own parameters are."""
    plan = found.plan
    grouping = plan.channels.needed.grouping
    own = next(model.get_submodule(candidate.maker).parameters())
    gates: list[nn.Module] = []
    units: list[list[list[int]]] = [[] for _ in candidate.readers]
    for column in plan.columns:
        counts = np.array([*column.counts, 1])
        channels = grouping.count(counts, candidate.channels)
        gates.append(make(channels, column.counts[candidate.group]).to(own.device, own.dtype))
        for reader, per_width in zip(candidate.readers, units, strict=True):
            per_width.append(reader.units[grouping.mask(counts, reader.ids)].tolist())
    readers = [(reader.axis, per_width) for reader, per_width in zip(candidate.readers, units, strict=True)]
    made_for = LayerGates(candidate.name, candidate.axis, plan.widths, gates, readers)
    converted = state_of(model)
    if converted is not None:
        state: WidthState = made_for._slim
        state.plan, state.path = plan, f"{candidate.maker}.{_child(candidate)}"
        for column_of, sub_network in zip(state.columns, plan.columns, strict=True):
            column_of.counts = sub_network.counts
        for registered in converted.columns[len(plan.columns) :]:  # these run dense
            state.add(Column(registered.width))
            state.columns[-1].counts = registered.counts
    return made_for
