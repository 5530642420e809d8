"""Add gates to any model with `gate`, remove them with `ungate`; files store the arguments and loading gates again."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from slimmable._addons import ADDONS, AddOn
from slimmable._checks import check_positive, check_whole, checked
from slimmable._convert import Skip, copy_of, know
from slimmable._inputs import Inputs
from slimmable._modules import replace_modules
from slimmable._tables import listing
from slimmable._width import set_width, width_of
from slimmable.errors import CheckpointError, ConversionError, SlimmableError, UsageError
from slimmable.gating._gates import GATE, TEMPERATURE, ChannelGate, GateHook, LayerGates, NoGates, gates_in, has_gates
from slimmable.gating._passes import PassNorm
from slimmable.gating._plan import PLAN, SKIPPED, GatePlan, PlannedGate, decode_inputs, gate_plan
from slimmable.view.state import Column, state_of

M = TypeVar("M", bound=nn.Module)

_PART = re.compile(r"(?:.*\.)?(?:(?P<gate>channel_gate(?:_\d+)?\.at)|gated)\.\d+(?=\.)")  # of a state dict's name


@checked
def gate(
    model: M,
    *,
    example_inputs: Any = None,
    skip: Skip = (),
    separate_norms: bool = True,
    temperature: float = TEMPERATURE,
    open_at_zero: bool = False,
    bias: bool = True,
    inplace: bool = False,
) -> M:
    """Return a model with the weights of `model`, and with gates that open and close channels for each image.

    A channel group gets a gate if it lies inside a block: one layer makes it, others read it as their input, and all
    between treats channels separately. In Transformers these are the MLPs' hidden units and whole attention heads. The
    gate sees the input of the layer that makes the units; its mask multiplies the inputs of those that read them, as if
    the channels were dropped. `print(gate_plan(model))` shows where and why. Every tensor has the batch first.

    Outside `with gated(model):` the model is dense and computes the same numbers as before. A slimmable model gets
    gates for each of its widths; convert it first, then gate it. Loading a state dict whose gates differ from the
    model's raises a CheckpointError and changes nothing.

    Args:
        model: plain or converted; a part of a converted model cannot be gated.
        example_inputs: as for `slimify`; the multiply-adds of a gated pass are counted for its size.
        skip: patterns of layer names, or a function of name and module; groups made by these layers get no gate.
        separate_norms: give the BatchNorms on gated channels, and those directly after the layers that read them,
            separate statistics, gain and bias for the gated pass.
        temperature, open_at_zero, bias: passed to each `ChannelGate`.
        inplace: gate `model` itself and return it.

    Raises: ConversionError: if there is nothing to gate, with the reasons, or the model cannot be traced. UsageError:
        if the model already has gates, or an argument is out of range. After an error nothing has changed.

    Source: Krishna et al. 2023 gate the inner channels of residual blocks; other architectures and widths are new here.

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
    check_whole("gate", model)
    if gates_in(model):
        raise UsageError(f"this {type(model).__name__} already has gates; remove them with slimmable.gating.ungate")
    found = gate_plan(model, example_inputs=example_inputs, skip=skip)
    if found.plan.switchable or not found.plan.overlap:
        raise ConversionError(
            "gates need widths that share their weights: convert without overlap=False and switchable"
        )
    if not found.gates:
        reasons = "\n".join(f"  {maker} ({units}): {reason}" for maker, units, reason in found.refused[:20])
        raise ConversionError(f"nothing in this {type(model).__name__} can be gated\n{reasons}".rstrip())
    width = None if state_of(model) is None else width_of(model)
    make = partial(ChannelGate, temperature=temperature, open_at_zero=open_at_zero, bias=bias)
    built = [(planned, _layer_gates(model, found, planned, make)) for planned in found.gates]
    target = model if inplace else copy_of(model)
    for planned, gates in built:
        for number, reader in enumerate(planned.readers):
            target.get_submodule(reader.path).register_forward_pre_hook(GateHook(gates, number))
        maker = target.get_submodule(planned.maker)
        maker.add_module(_child(planned), gates.train(maker.training))
    for planned, gates in built:  # after the masks on the same layer's input
        target.get_submodule(planned.maker).register_forward_pre_hook(GateHook(gates))
    if separate_norms:
        norms = [target.get_submodule(path) for path in {path for planned in found.gates for path in planned.norms}]
        replace_modules(target, {id(norm): PassNorm.of(norm, len(found.plan.columns)) for norm in norms})
    target.register_load_state_dict_pre_hook(_refuse_other_gates)  # type: ignore[no-untyped-call]
    target.__dict__[PLAN] = found
    if width is not None:
        set_width(target, width)
    return target


@checked
def ungate(model: M) -> M:
    """Remove the gates and the gated pass's norms from a model in place, and return it.

    >>> import torch, slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> len(model.state_dict()), len(ungate(model).state_dict())
    (15, 6)
    """

    def ours(each: object) -> bool:
        return isinstance(each, (GateHook, LayerGates, NoGates)) or getattr(each, "hook", None) is _refuse_other_gates

    for module in list(model.modules()):
        module.__dict__.pop(PLAN, None)
        held: Any
        for held in module._forward_pre_hooks, module._load_state_dict_pre_hooks, module._modules:
            for key in [key for key, each in held.items() if ours(each)]:
                del held[key]
    norms = [module for module in model.modules() if isinstance(module, PassNorm)]
    return cast(M, replace_modules(model, {id(norm): norm.without() for norm in norms}))


@checked
def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model's gates, for a separate optimizer group; empty for a model without gates.

    >>> import torch, slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> [tuple(parameter.shape) for parameter in gate_parameters(model)]
    [(2, 8), (2,), (2,), (32, 2), (32,)]
    """
    return [parameter for gates in gates_in(model) for parameter in gates.parameters()]


def _child(planned: PlannedGate) -> str:
    return f"{GATE}_{planned.number}" if planned.number else GATE


def _layer_gates(
    model: nn.Module, found: GatePlan, planned: PlannedGate, make: Callable[[int, int], nn.Module]
) -> LayerGates:
    """Make the gates of one group, one per width, with the device and dtype of the layer's parameters."""
    plan = found.plan
    grouping = plan.channels.needed.grouping
    own = next(model.get_submodule(planned.maker).parameters())
    per_width = [np.array([*column.counts, 1]) for column in plan.columns]
    gates = [
        make(grouping.count(counts, planned.channels), int(counts[planned.group])).to(own.device, own.dtype)
        for counts in per_width
    ]
    readers = [
        (reader.axis, [reader.units[grouping.mask(counts, reader.ids)].tolist() for counts in per_width])
        for reader in planned.readers
    ]
    made = LayerGates(planned.name, planned.axis, plan.widths, gates, readers)
    converted = state_of(model)
    if converted is not None:
        know(made, plan, f"{planned.maker}.{_child(planned)}")
        for registered in converted.columns[len(plan.columns) :]:  # widths without gates, which run dense
            made._slim.add(Column(registered.width))
            made._slim.columns[-1].counts = registered.counts
    return made


def _refuse_other_gates(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Refuse to load a state dict whose gates, or norms of the gated pass, differ; one without gates may be dense."""
    given = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix) and _PART.match(name)}
    if not _parts(given, only_gates=True):
        return
    tensors = module.state_dict(prefix=prefix, keep_vars=True)
    own = {name: tensor for name, tensor in tensors.items() if _PART.match(name)}
    shapes = {name: (tuple(getattr(given[name], "shape", ())), tuple(own[name].shape)) for name in own if name in given}
    kinds = {
        "missing": _parts((name for name in own if name not in given), only_gates=True),
        "not in the model": _parts(name for name in given if name not in own),
        "of other sizes": [f"{name} {one}, in the model {two}" for name, (one, two) in shapes.items() if one != two],
    }
    if lines := listing(kinds, 4):
        first = f"the gates in this state dict differ from those of this {type(module).__name__}; nothing was loaded"
        advice = (
            "gate the model like the checkpoint's: the same model, widths, skip and separate_norms. To load only the "
            "other tensors, leave out those with channel_gate or gated in their names, and use strict=False"
        )
        raise CheckpointError(f"{first}{lines}\n{advice}")


def _parts(names: Iterable[str], only_gates: bool = False) -> list[str]:
    """Return the gates and norms that tensors belong to, each once."""
    found = filter(None, map(_PART.match, names))
    return list(dict.fromkeys(part.group() for part in found if part["gate"] or not only_gates))


def _describe(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of a gated model without its gates, and JSON data from which `_restore` makes the same ones."""
    kind, found = type(model).__name__, model.__dict__.get(PLAN)
    if not isinstance(found, GatePlan):
        raise CheckpointError(f"this {kind} has gates, but it is not the model that slimmable.gating.gate returned")
    gates = list(_channel_gates(model))
    data = {
        "example": found.example,
        "skipped": [maker for maker, _, reason in found.refused if reason == SKIPPED],
        "separate_norms": any(isinstance(module, PassNorm) for module in model.modules()),
        "bias": any(own.expand.bias is not None for own in gates),
        "settings": [[own.temperature, own.open_at_zero] for own in gates],
    }
    bare = ungate(copy_of(model))
    before, again = [(planned.name, planned.units) for planned in found.gates], None
    arguments = _arguments(bare, data)
    with suppress(SlimmableError):
        again = [(planned.name, planned.units) for planned in gate_plan(bare, **arguments).gates]
    if again != before or {own.name for own in gates_in(model)} != {name for name, _ in before}:
        raise CheckpointError(f"this {kind} was changed after it was gated; remove the gates with ungate, gate again")
    return bare, data


def _restore(model: nn.Module, data: dict[str, Any]) -> nn.Module:
    """Gate a model in place from the data of `_describe`, and return it; the gates have random weights."""
    norms, bias = bool(data["separate_norms"]), bool(data["bias"])
    gate(model, **_arguments(model, data), separate_norms=norms, bias=bias, inplace=True)
    for made, (temperature, open_at_zero) in zip(_channel_gates(model), data["settings"], strict=True):
        check_positive("load", temperature=temperature)
        made.temperature, made.open_at_zero = float(temperature), bool(open_at_zero)
    return model


def _arguments(model: nn.Module, data: dict[str, Any]) -> dict[str, Any]:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    args, kwargs = decode_inputs(data["example"], like)
    skipped = set(map(str, data["skipped"]))
    return {"example_inputs": Inputs(*args, **kwargs), "skip": lambda path, module: path in skipped}


def _channel_gates(model: nn.Module) -> Iterator[ChannelGate]:
    """Yield the gates of all widths, in the order of their layers; refuse others, whose class no file can name."""
    for gates in gates_in(model):
        for own in gates.at:
            if not isinstance(own, ChannelGate):
                raise CheckpointError(f"the gate of {gates.name} is a {type(own).__name__}; a file holds ChannelGates")
            yield own


ADDONS["gating"] = AddOn(
    refusal="has gates, which are made for its widths; remove them with slimmable.gating.ungate",
    present=has_gates,
    detach=ungate,
    describe=_describe,
    restore=_restore,
)
