"""Files of models, slimmable or plain: safetensors whose metadata say how to rebuild the model."""

import json
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from slimmable._addons import ADDONS, MODULES, addons_of
from slimmable._checks import check_module, check_path, check_whole, checked
from slimmable._convert import M, apply_plan, copy_of, misfits, plan_of
from slimmable._width import places_of, registered
from slimmable.analysis.plan import Plan
from slimmable.errors import CheckpointError, SlimmableError
from slimmable.files.construction import filled, fitting_recipe, full_network, skeleton
from slimmable.files.description import HIDDEN, describe, differences, hidden_buffers, unlike
from slimmable.files.plan_json import decode, encode
from slimmable.files.tensors import read_tensors, write_tensors
from slimmable.view.state import is_slim

_FORMAT = "slimmable 2"
_UNITS = "slimmable/units"
_MOST_WIDTHS = 256  # of a model with few tensors


@checked
def save(model: nn.Module, path: str | Path, *, arguments: Mapping[str, Any] | None = None) -> None:
    """Write `model` to one file, from which `load` rebuilds it in any process, without `slimify`.

    The file is a safetensors file, with numbers and names as JSON; nothing in it is ever executed. It holds all widths,
    including those that `calibrate_bn` added, and gates, but no optimizer state, hooks or active width.

    Args:
        model: a converted or gated model, or a plain network, such as one from `extract`.
        path: an existing file stays until the new one is complete. A symbolic link is replaced, its target stays.
        arguments: those with which `timm.create_model` makes the plain full-width model. By default, the numbers of
            classes and image channels and the image size are read off the model. If the model is not timm's, or no
            longer what timm makes (with a warning), the file has no recipe, and `load` needs the plain model.

    Raises: CheckpointError: if the arguments make another model, something cannot be saved, or writing fails.

    >>> import slimmable, tempfile, timm
    >>> model = slimmable.slimify(timm.create_model("test_resnet", num_classes=3), (1.0, 0.5))
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> slimmable.save(model, path)
    >>> slimmable.widths_of(slimmable.load(path))
    (1.0, 0.5)
    """
    check_whole("save", model)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise CheckpointError(f"arguments are those of timm.create_model, as a dict; got {arguments!r}")
    bare, data = model, dict[str, Any]()
    for name, addon in addons_of(model).items():
        bare, data[name] = addon.describe(bare)
    plan, full = _plan_to_save(bare), full_network(bare)
    tensors = model.state_dict() | hidden_buffers(full)
    data["recipe"] = fitting_recipe(full, plan is None, arguments)
    data |= {"class": type(model).__name__, "versions": _versions(), "modules": describe(full)}
    if plan is not None:
        data["plan"], units = encode(plan)
        data["registered"] = [column.width for column in bare.__dict__["_slim"].columns[len(plan.widths) :]]
        tensors[_UNITS] = torch.from_numpy(units.astype(np.int32))
    write_tensors(Path(path), tensors, {"format": _FORMAT, "model": json.dumps(data)})


@overload
def load(path: str | Path, model: None = None) -> nn.Module: ...
@overload
def load(path: str | Path, model: M) -> M: ...
def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Return the model that `save` wrote, with all its widths and gates, or as a plain network if it was one.

    The model is on the CPU, or on the device of `model`, at full width and in evaluation mode.

    Args:
        path: path of the file.
        model: the plain full-width network, with any weights, if the file has no recipe for timm; it is not changed.

    Raises: CheckpointError: if the file is missing, damaged or foreign, or of another network, one whose modules,
        settings (such as strides and activations) or tensors differ; the message names the differences.
    """
    if model is not None:
        check_module("load", model)
    check_path("load", path=path)
    data, tensors = read(Path(path))
    if model is None and data.get("recipe") is None:
        raise CheckpointError(
            f"{path} holds a {data.get('class')} and no recipe for timm to make it; build the plain full-width network "
            "and pass it, as in load(path, model=...)"
        )
    if model is not None and any(is_slim(module) for module in model.modules()):
        raise CheckpointError(f"load({path}, model=...) needs the plain network, not a converted one")
    try:
        return _restored(data, tensors, model).eval()
    except Exception as error:  # of any class, if the description is no such thing
        invalid = f"its description of the model is invalid ({type(error).__name__}: {error})"
        said = error if isinstance(error, SlimmableError) else invalid
        raise CheckpointError(f"{path} cannot be loaded: {said}") from error


def _plan_to_save(model: nn.Module) -> Plan | None:
    """Return the plan of a converted model, or None for a plain one; raise `CheckpointError` if it is neither."""
    if not any(is_slim(module) for module in model.modules()):
        return None
    places, plan = places_of(model), plan_of(model)  # the first raises if layers were added
    if plan is None or any(state.plan is not plan for _, state in places):
        raise CheckpointError(
            f"{type(model).__name__} is not a model as slimmable.slimify returned it: it has slimmable layers from "
            "elsewhere, or is a part or a wrapper of a converted model; save the converted model itself"
        )
    gone = [name for name, shape in misfits(model, plan) if shape is None]
    if gone:
        raise CheckpointError(
            f"{', '.join(gone[:6])}: gone from this {type(model).__name__} since it was converted; convert it again "
            "with slimmable.slimify, then save it"
        )
    return plan


def _versions() -> dict[str, str]:
    from slimmable import __version__

    return {"slimmable": __version__, "timm": version("timm"), "torch": torch.__version__}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says about its model, and its tensors; refuse it unless `save` wrote it."""
    metadata, tensors = read_tensors(path, _FORMAT, "slimmable.save")
    try:
        return dict(json.loads(metadata["model"])), tensors
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read; it is damaged ({error})") from error


def _restored(data: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module | None) -> nn.Module:
    """Return the model in a file. Nothing has memory before the file has been compared with the plain network."""
    units = tensors.pop(_UNITS) if "plan" in data else torch.empty(0)
    plain = skeleton(data["recipe"], tensors) if model is None else model
    own = plain.state_dict(keep_vars=True) | hidden_buffers(plain)
    given = {name: tensor for name, tensor in tensors.items() if name in own}
    differing, free = unlike(plain, data["modules"], given, narrow="plan" not in data)
    if differing:
        versions = [(name, data["versions"].get(name), here) for name, here in _versions().items()]
        other = [f"\n  written with {name} {then}, here {name} {here}" for name, then, here in versions if then != here]
        raise CheckpointError(f"it is of another network{differing}{''.join(other)}")
    network = copy_of(plain, {id(own[name]): filled(own[name], each, each.dtype) for name, each in given.items()})
    for path, settings in free.items():
        vars(network.get_submodule(path)).update(settings)
    if "plan" in data:
        if len(data["plan"]["counts"]) + len(data["registered"]) > max(_MOST_WIDTHS, len(tensors)):
            raise CheckpointError("it has more widths than its tensors are for")
        network = apply_plan(network, decode(data["plan"], units.numpy(), network))
        widths = [tuple(width) if isinstance(width, list) else float(width) for width in data["registered"]]
        with registered(network, widths):
            pass
    for name in MODULES.keys() & data.keys():
        import_module(MODULES[name])
        network = ADDONS[name].restore(network, data[name])
    own = network.state_dict(keep_vars=True)
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(HIDDEN)}
    differing = differences(own, given, most=5)
    if differing:
        raise CheckpointError(f"its tensors are those of another network{differing}")
    for name, tensor in own.items():
        tensor.data = tensor.data.to(given[name].dtype)
    network.load_state_dict(given)
    return network
