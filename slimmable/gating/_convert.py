"""Add gates to any model, remove them, store them in files, and use trained ones: their activity, a static network."""

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import itemgetter
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from slimmable._checks import check_positive, check_whole, checked
from slimmable._convert import Skip, apply_plan, copy_of, extract, know, strip
from slimmable._inputs import Inputs
from slimmable._modules import ADDONS, AddOn, M, in_eval_mode, replace_modules, swapped
from slimmable._numerics import in_float64
from slimmable._tables import differences
from slimmable._width import at_width, set_width, width_of
from slimmable._widths import kept_units
from slimmable.analysis.importance import permute
from slimmable.errors import CheckpointError, ConversionError, SlimmableError, UsageError
from slimmable.gating._passes import ChannelGate, GatedPass, LayerGates, PassNorm, gated, gates_in, gates_of, has_gates
from slimmable.gating._plan import GATE, PLAN, SKIPPED, TEMPERATURE, GatePlan, decode, gate_plan
from slimmable.training.batchnorm import ModelInput, batches_of, calibrate_bn
from slimmable.view.state import Column, state_of

_PART = re.compile(r"(.*\.)?(channel_gate(_\d+)?\.at|gated)\.\d+\.")  # of a gate or norm, in a state dict


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
    gate sees the input of the layer that makes the units; its mask multiplies the inputs of those that read them.
    `print(gate_plan(model))` shows where and why. Outside `with gated(model):` the model computes the same as before.
    A model that was converted first gets gates for each width. Loading a state dict of other gates changes nothing.

    Args:
        model: plain or converted; a part of a converted model cannot be gated.
        example_inputs: as for `slimify`, batch first; the multiply-adds of a gated pass are counted for its size.
        skip: patterns of layer names, or a function of name and module; groups made by these layers get no gate.
        separate_norms: give the BatchNorms on gated channels, and those directly after the layers that read them,
            separate statistics, gain and bias for the gated pass.
        temperature, open_at_zero, bias: passed to each `ChannelGate`.
        inplace: gate `model` itself and return it.

    Raises: ConversionError: if there is nothing to gate, with the reasons, or the model cannot be traced. UsageError:
        if the model already has gates, or an argument is out of range. After an error nothing has changed.

    Source: Krishna et al. 2023 gate the inner channels of residual blocks; other architectures and widths are new here.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    >>> model = gate(net, example_inputs=torch.zeros(2, 4))
    >>> with slimmable.gating.gated(model.train()) as run:
    ...     scores = model(torch.randn(3, 4))
    >>> {name: tuple(mask.shape) for name, mask in run.masks().items()}
    {'2': (3, 32)}
    """
    check_whole("gate", model)
    if gates_in(model):
        raise UsageError(f"this {type(model).__name__} already has gates; remove them with slimmable.gating.ungate")
    found = gate_plan(model, example_inputs=example_inputs, skip=skip)
    if found.plan.switchable or not found.plan.overlap:
        raise ConversionError("gates need widths that share their weights: no overlap=False, and nothing switchable")
    if not found.gates:
        reasons = "\n".join(f"  {maker} ({units}): {reason}" for maker, units, reason in found.refused[:20])
        raise ConversionError(f"nothing in this {type(model).__name__} can be gated\n{reasons}".rstrip())
    converted = state_of(model)
    width = None if converted is None else width_of(model)
    make = partial(ChannelGate, temperature=temperature, open_at_zero=open_at_zero, bias=bias)
    built = []
    for planned in found.gates:
        like = next(model.get_submodule(planned.maker).parameters())
        gates = LayerGates(planned, found.plan, make).to(like.device, like.dtype)
        child = f"{GATE}_{planned.number}" if planned.number else GATE
        built.append((planned, child, gates))
        if converted is not None:
            know(gates, found.plan, f"{planned.maker}.{child}")
            for registered in converted.columns[len(found.plan.columns) :]:  # widths without gates, which run dense
                gates._slim.keep([*gates._slim.columns, Column(registered.width, counts=registered.counts)])
    target = model if inplace else copy_of(model)
    for planned, child, gates in built:  # in the order of the layers, so a gate decides after masks on its input
        for number, reader in enumerate(planned.readers):
            target.get_submodule(reader.path).register_forward_pre_hook(partial(gates.mask, number))
        maker = target.get_submodule(planned.maker)
        maker.add_module(child, gates.train(maker.training))
        maker.register_forward_pre_hook(gates.decide)
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

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = gate(net, example_inputs=torch.zeros(2, 4))
    >>> len(model.state_dict()), len(ungate(model).state_dict())
    (15, 6)
    """

    def ours(each: object) -> bool:
        hook = getattr(each, "hook", each)
        owner = getattr(getattr(hook, "func", hook), "__self__", each)  # of a method, perhaps in a `partial`
        return isinstance(owner, LayerGates) or hook is _refuse_other_gates

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
    """Return the parameters of a model's gates, for a separate optimizer group.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = gate(net, example_inputs=torch.zeros(2, 4))
    >>> [tuple(parameter.shape) for parameter in gate_parameters(model)]
    [(2, 8), (2,), (2,), (32, 2), (32,)]
    """
    return [parameter for gates in gates_in(model) for parameter in gates.parameters()]


def _refuse_other_gates(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Refuse to load a state dict whose gates, or norms of the gated pass, differ; one without gates may be dense."""
    own, given = (
        {name: tensor for name, tensor in tensors.items() if name.startswith(prefix) and _PART.match(name)}
        for tensors in (module.state_dict(prefix=prefix, keep_vars=True), state_dict)
    )
    if not any(GATE in name for name in given):
        return
    if lines := differences({name: own[name] for name in own if GATE in name or name in given}, given, most=4):
        first = f"the gates in this state dict differ from those of this {type(module).__name__}; nothing was loaded"
        advice = "gate the model like the checkpoint's, or leave out its channel_gate and gated, with strict=False"
        raise CheckpointError(f"{first}{lines}\n{advice}")


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
    gate(model, **_arguments(model, data), separate_norms=data["separate_norms"], bias=data["bias"], inplace=True)
    for made, (temperature, open_at_zero) in zip(_channel_gates(model), data["settings"], strict=True):
        check_positive("load", temperature=temperature)
        made.temperature, made.open_at_zero = float(temperature), bool(open_at_zero)
    return model


def _arguments(model: nn.Module, data: dict[str, Any]) -> dict[str, Any]:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    args, kwargs = decode(data["example"], like)
    skipped = set(map(str, data["skipped"]))
    return {"example_inputs": Inputs(*args, **kwargs), "skip": lambda path, module: path in skipped}


def _channel_gates(model: nn.Module) -> Iterator[ChannelGate]:
    """Yield the gates of all widths, in the order of their layers; refuse others, whose class no file can name."""
    for gates in gates_in(model):
        for own in gates.at:
            if type(own) is not ChannelGate:
                raise CheckpointError(f"the gate of {gates.name} is a {type(own).__name__}; a file holds ChannelGates")
            yield own


_REFUSAL = "has gates, which are made for its widths; remove them with slimmable.gating.ungate"
ADDONS["gating"] = AddOn(_REFUSAL, present=has_gates, detach=ungate, describe=_describe, restore=_restore)


# -- trained gates
@checked
@torch.no_grad()
def gate_activity(model: nn.Module, loader: Iterable[ModelInput]) -> dict[str, Tensor]:
    """Return gate name -> the fraction of images for which it opens each unit, shape (units,), float64, without noise.

    `loader` is as for `calibrate_bn`. Raises: UsageError: if the model has no gates. DataError: if it has no batches.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = gate(net, example_inputs=torch.zeros(2, 4))
    >>> _ = nn.init.ones_(model[2].channel_gate.at[0].expand.weight)
    >>> gate_activity(model, [torch.ones(3, 4)])["2"].unique().numel()
    1
    """
    opened, images = dict[str, Any](), 0
    for run in _gated_batches("gate_activity", model, loader):
        for name, mask in run.masks().items():
            opened[name] = opened.get(name, 0) + in_float64(mask).sum(0)
        images += len(mask)
    return {name: count / images for name, count in opened.items()}


@checked
@torch.no_grad()
def calibrate_gates(model: nn.Module, loader: Iterable[ModelInput], budget: float) -> float:
    """Set the gates' thresholds in place so that gated passes cost `budget` on average; return their actual share.

    Gates that are near a budget with noise may open fewer or more units without. One threshold for all logits, found by
    bisection in eval mode, corrects this, and allows other budgets nearby. Where many logits are equal, as in untrained
    gates, the closest share is chosen. Only the gates of the active width change; after an error none have.
    `loader` is as for `calibrate_bn`, and iterated over about 15 times; `budget` is a share of the dense multiply-adds.
    Raises: UsageError: if the budget is outside (0, 1), below the share with all gates closed or above that with all
        open; if the model has no gates, or the loader can be iterated over only once. DataError: as `gate_activity`.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> model = gate(net, example_inputs=torch.zeros(2, 4))
    >>> _ = nn.init.normal_(model[2].channel_gate.at[0].expand.bias)  # as if trained
    >>> round(calibrate_gates(model, [torch.randn(64, 4)], budget=0.5), 1)
    0.5
    """
    if isinstance(loader, Iterator):
        raise UsageError("calibrate_gates: the loader is iterated over many times; give a list or a DataLoader")
    active = [gates.module_at(gates._slim.index) for gates in gates_of("calibrate_gates", model)]
    gates = [gate for gate in active if isinstance(gate, ChannelGate)]
    shares: dict[float, float] = {}  # threshold -> share

    def share_at(threshold: float) -> float:
        with swapped([(gate._buffers, "threshold", torch.full_like(gate.threshold, threshold)) for gate in gates]):
            return float(torch.cat([run.share() for run in _gated_batches("calibrate_gates", model, loader)]).mean())

    least, most = share_at(math.inf), share_at(-math.inf)
    if not least <= budget <= most:
        costs = f"with all gates closed the network costs {least:.3f}, with all open {most:.3f}, of the dense one"
        raise UsageError(f"calibrate_gates: budget is {budget}, but {costs}")
    low, high = -1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        threshold = math.tan(middle * math.pi / 2)
        shares[threshold] = share_at(threshold)
        if abs(shares[threshold] - budget) <= 5e-4:  # of the dense multiply-adds
            break
        low, high = (middle, high) if shares[threshold] > budget else (low, middle)
    closest = min(shares, key=lambda threshold: abs(shares[threshold] - budget))
    for gate in gates:
        gate.threshold.fill_(closest)
    return shares[closest]


def _gated_batches(where: str, model: nn.Module, loader: Iterable[ModelInput]) -> Iterator[GatedPass]:
    """Run a gated pass in eval mode on each batch, and yield what the gates have decided."""
    gates_of(where, model)
    for args, kwargs in batches_of(where, model, loader):
        with in_eval_mode(model), gated(model) as run:
            model(*args, **kwargs)
        yield run


@checked
def extract_gated(
    model: M,
    loader: Iterable[ModelInput],
    keep: float | None = None,
    *,
    budget: float | None = None,
    round_to: int = 1,
    recalibrate: bool = True,
) -> M:
    """Return a plain network, without gates, of the channels that the gates of a trained model open most often.

    It has the norms of the gated pass at full width, and computes the same as that pass where the masks are the same
    for all images. Each gate keeps at least one unit. Groups whose units have a fixed order are kept whole.

    Args:
        loader: batches as for `calibrate_bn`; it is iterated over twice.
        keep: keep the units that are open for at least this fraction of the images, in (0, 1].
        budget: instead of `keep`: keep as many units as this share of the dense multiply-adds allows, in (0, 1).
        round_to: round the number of kept channels of each gate to about a multiple of this, if it has that many; 8 or
            16 suit most hardware. An attention head of 64 channels counts as 64.
        recalibrate: recompute the BatchNorm statistics of the small network on the loader.

    Raises: UsageError: unless one of `keep` and `budget` is given, in its range and no less than the smallest network
        costs; if the model has no gates, or `loader` can be iterated over only once. DataError: as `gate_activity`.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = gate(net, example_inputs=torch.zeros(2, 4))
    >>> small = extract_gated(model, [torch.randn(16, 4)], budget=0.5)
    >>> type(small[2]), small[2].out_features
    (<class 'torch.nn.modules.linear.Linear'>, 14)
    """
    if (keep is None) == (budget is None):
        raise UsageError("extract_gated: give either keep, a fraction of the images, or budget, a share of the cost")
    if recalibrate and isinstance(loader, Iterator):
        raise UsageError("extract_gated: the loader is iterated over twice; give a list or a DataLoader")
    found: GatePlan | None = model.__dict__.get(PLAN)
    if found is None:
        raise UsageError(f"extract_gated: this {type(model).__name__} is not a model that gate returned; give that one")
    with at_width(model, 1.0):
        opened = gate_activity(model, loader)
        twin = copy_of(model)
    for norm in [module for module in twin.modules() if isinstance(module, PassNorm)]:
        norm.full = norm.gated[0]
    strip(ungate(twin))
    channels = found.plan.channels
    activity = {gate.group: opened[gate.name].tolist() for gate in found.gates if not channels.ordered[gate.group]}
    read = {gate.group: min((each.units >= 0).sum() for each in gate.readers) // gate.units for gate in found.gates}
    steps = {group: round_to // math.gcd(round_to, int(per_unit)) for group, per_unit in read.items()}
    kept = _kept(found, activity, steps, keep, budget or 0.0)
    orders = {group: np.argsort(np.negative(own), kind="stable") for group, own in activity.items()}
    permute(twin, found.plan, [orders.get(group, np.arange(units)) for group, units in enumerate(channels.units)])
    slim, counts = apply_plan(twin, found.plan), found.plan.near(kept).counts
    if recalibrate:
        calibrate_bn(slim, loader, [counts])
    return cast(M, extract(slim, counts))


def _kept(
    found: GatePlan, opened: Mapping[int, Sequence[float]], steps: Mapping[int, int], keep: float | None, budget: float
) -> tuple[int, ...]:
    """Return how many units of each group to keep: those open often enough, or as many as the budget allows."""
    full = found.plan.channels.units
    ranked = sorted(((share, group) for group, own in opened.items() for share in own), key=itemgetter(0), reverse=True)

    def counts(units: int) -> tuple[int, ...]:
        most = Counter(group for _, group in ranked[:units])
        return tuple(
            kept_units(whole, most[group] / whole, steps[group]) if group in opened else whole
            for group, whole in enumerate(full)
        )

    if keep is not None:
        return counts(sum(share >= keep for share, _ in ranked))
    dense = found.macs.total(full)
    fitting = bisect_right(range(len(ranked) + 1), budget * dense, key=lambda units: found.macs.total(counts(units)))
    if not fitting:
        least = found.macs.total(counts(0)) / dense
        raise UsageError(f"extract_gated: budget is {budget}, but the smallest network costs {least:.3f}; give more")
    return counts(fitting - 1)
