"""Files of models, slimmable or plain: safetensors whose metadata say how to rebuild the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from slimmable._addons import addons_of, restore_all
from slimmable._atomic import plain_copies, write_aside
from slimmable._checks import check_module, check_path, checked
from slimmable._convert import M, apply_plan, copy_of, misfits, plan_of
from slimmable._width import places_of, registered
from slimmable.analysis.plan import Plan
from slimmable.errors import CheckpointError, SlimmableError
from slimmable.files.construction import (
    attributes_of,
    build,
    differences,
    fits_inside,
    fitting_recipe,
    full_network,
    set_attributes,
)
from slimmable.files.plan_json import decode, encode
from slimmable.view.state import is_slim, slim_state

_FORMAT = "slimmable 1"
_UNITS = "slimmable/units"
_HIDDEN = "slimmable/buffer/"


@checked
def save(model: nn.Module, path: str | Path, *, arguments: Mapping[str, Any] | None = None) -> None:
    """Write `model` to one file, from which `load` rebuilds it in any process, without `slimify`.

    The file is a safetensors file, with numbers and names as JSON; nothing in it is ever executed. It holds all widths,
    including those that `calibrate_bn` added, and gates, but no optimizer state, hooks or active width.

    Args:
        model: a converted or gated model, or a plain network, such as one from `extract`.
        path: path of the file; an existing file stays until the new one is complete.
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
    from safetensors.torch import save_file

    if arguments is not None and not isinstance(arguments, Mapping):
        raise CheckpointError(f"arguments are those of timm.create_model, as a dict; got {arguments!r}")
    bare, described = model, {}
    for name, addon in addons_of(model).items():
        bare, described[name] = addon.describe(bare)
    plan, full = _plan_to_save(bare), full_network(bare)
    hidden = {f"{_HIDDEN}{name}": buffer for name, buffer in _hidden(full).items()}
    tensors = plain_copies(model.state_dict() | hidden)
    recipe = fitting_recipe(full, plan is None, arguments)
    data: dict[str, Any] = {**described, "class": type(model).__name__, "recipe": recipe}
    data["attributes"] = attributes_of(full)
    if plan is not None:
        data["plan"], units = encode(plan)
        data["registered"] = [column.width for column in slim_state(bare).columns[len(plan.widths) :]]
        tensors[_UNITS] = torch.from_numpy(units.astype(np.int32))
    metadata = {"format": _FORMAT, "model": json.dumps(data)}
    write_aside(Path(path), lambda aside: save_file(tensors, aside, metadata))


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

    Raises: CheckpointError: if the file is missing, damaged, foreign, or of another network; the message says which.
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
    network = build(data["recipe"]) if model is None else copy_of(model)
    try:
        network = _fill(network, data, tensors)
    except SlimmableError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be loaded: its description of the model is invalid ({type(error).__name__}: {error})"
        ) from error
    return network.eval()


def _plan_to_save(model: nn.Module) -> Plan | None:
    """Return the plan of a converted model, or None for a plain one; raise `CheckpointError` if it is neither."""
    if not any(is_slim(module) for module in model.modules()):
        return None
    places = places_of(model)  # raises if layers were added
    plan = plan_of(model)
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


def _hidden(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a plain network that are not in the state dict."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says about its model, and its tensors; refuse it unless `save` wrote it."""
    metadata, tensors = read_tensors(path, _FORMAT, "slimmable.save")
    try:
        return dict(json.loads(metadata["model"])), tensors
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read; it is damaged ({error})") from error


def read_tensors(path: Path, form: str, made_by: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and tensors of a safetensors file; refuse it if its metadata do not name this format."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != form:
                raise CheckpointError(f"{path} was not written by {made_by}")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read; it is damaged, or not a safetensors file ({error})") from error


def _fill(network: nn.Module, data: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    hidden = {name.removeprefix(_HIDDEN): tensors.pop(name) for name in list(tensors) if name.startswith(_HIDDEN)}
    _resize(network, hidden, _hidden(network))
    set_attributes(network, data["attributes"])
    if "plan" in data:
        plan = decode(data["plan"], tensors.pop(_UNITS).numpy())
        _check(network, plan)
        network = apply_plan(network, plan)
        settings = [tuple(setting) if isinstance(setting, list) else float(setting) for setting in data["registered"]]
        with registered(network, settings):
            pass
    else:
        _resize(network, tensors, network.state_dict(keep_vars=True))
    network = restore_all(network, data)
    own = network.state_dict(keep_vars=True)
    differing = differences(own, tensors, most=5)
    if differing:
        raise CheckpointError(f"its tensors are those of another network{differing}")
    for name, tensor in own.items():
        tensor.data = tensor.data.to(tensors[name].dtype)
    network.load_state_dict(tensors)
    return network


def _check(network: nn.Module, plan: Plan) -> None:
    """Refuse a plan of another network, by the sizes of its tensors and the values of its attributes.

    Empty caches are taken from the network into the plan.
    """
    modules = dict(network.named_modules())
    for place, shape in misfits(network, plan):
        found = "is missing" if shape is None else f"has shape {shape}"
        raise CheckpointError(f"{place} {found}, which does not fit the file's plan")
    for (path, name), full in plan.channels.attributes.items():
        if vars(modules[path]).get(name) != full:
            place, own = f"{path}.{name}".lstrip("."), vars(modules[path]).get(name)
            raise CheckpointError(f"{place} is {own!r}, but {full!r} in the file")
    for path, at in plan.caches.items():
        for name in at:
            value = vars(modules[path]).get(name, ...)
            if not (value is None or isinstance(value, (dict, Tensor))) or name.startswith("_"):
                raise CheckpointError(f"{path}.{name} is not an attribute in which a forward keeps results")
            at[name] = {} if isinstance(value, dict) else value


def _resize(network: nn.Module, new: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Take sizes from the file, and the contents of buffers that are not in the state dict."""
    replaced: dict[int, nn.Parameter] = {}
    saved = network.state_dict(keep_vars=True).keys()
    for name, tensor in own.items():
        given = new.get(name)
        if given is None or (given.shape == tensor.shape and name in saved):
            continue
        if not fits_inside(given.shape, tensor.shape):
            raise CheckpointError(f"{name} has shape {tuple(given.shape)}, {tuple(tensor.shape)} in the full network")
        path, _, last = name.rpartition(".")
        module = network.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            small = torch.empty(given.shape, dtype=tensor.dtype, device=tensor.device)
            module._parameters[last] = replaced.setdefault(id(tensor), nn.Parameter(small, tensor.requires_grad))
        else:
            module._buffers[last] = given.to(tensor.device)
