"""Files of models, slimmable or plain: safetensors whose metadata say how to rebuild the model, mostly by timm."""

import argparse
import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimmable._atomic import read_tensors, write_tensors
from slimmable._checks import check_whole, checked
from slimmable._convert import apply_plan, copy_of, misfits, plain, plan_of
from slimmable._described import Facts, facts, fitting, named_in_forward
from slimmable._modules import ADDONS, MODULES, M, addons_of, replace_modules
from slimmable._tables import differences
from slimmable._width import places_of, registered
from slimmable.errors import CheckpointError, SlimmableError, explained
from slimmable.files.description import HIDDEN, Tensors, decode, describe, encode, hidden_buffers, unlike
from slimmable.view.norms import SwitchableContainer
from slimmable.view.state import is_slim

_FORMAT = "slimmable 2"
_UNITS = "slimmable/units"
_NEVER = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
_LARGE = 2**13  # image sizes, depths and the like are smaller; other sizes are those of tensors


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

    >>> import tempfile, timm
    >>> model = slimmable.slimify(timm.create_model("test_resnet", num_classes=3), (1.0, 0.5))
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> slimmable.save(model, path)
    >>> slimmable.widths_of(slimmable.load(path))
    (1.0, 0.5)
    """
    check_whole("save", model)
    if not isinstance(arguments, (Mapping, type(None))):
        raise CheckpointError(f"arguments are those of timm.create_model, as a dict; got {arguments!r}")
    bare, data = model, dict[str, Any]()
    for name, addon in addons_of(model).items():
        bare, data[name] = addon.describe(bare)
    plan = None
    if any(is_slim(module) for module in bare.modules()):
        places, plan = places_of(bare), plan_of(bare)  # the first raises if layers were added
        this = f"this {type(bare).__name__}"
        if plan is None or any(state.plan is not plan for _, state in places):
            raise CheckpointError(f"{this} is a part or wrapper, or made by hand; save the converted model itself")
        if gone := ", ".join([name for name, shape in misfits(bare, plan) if shape is None][:6]):
            raise CheckpointError(f"{gone}: gone from {this} since it was converted; convert it again, then save it")
    full = full_network(bare)
    tensors = model.state_dict() | hidden_buffers(full)
    data["recipe"] = fitting_recipe(full, plan is None, arguments)
    data |= {"class": type(model).__name__, "versions": versions(), "modules": describe(full)}
    if plan is not None:
        data["plan"], units = encode(plan)
        data["registered"] = [column.width for column in bare.__dict__["_slim"].columns[len(plan.widths) :]]
        tensors[_UNITS] = torch.from_numpy(units.astype(np.int32))
    write_tensors(Path(path), tensors, {"format": _FORMAT, "model": json.dumps(data)})


@overload
def load(path: str | Path, model: None = None) -> nn.Module: ...
@overload
def load(path: str | Path, model: M) -> M: ...
@checked
def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Return the model that `save` wrote, with all its widths and gates, or as a plain network if it was one.

    The model is on the CPU, or on the device of `model`, at full width and in evaluation mode.

    Args:
        path: path of the file.
        model: the plain full-width network, with any weights, if the file has no recipe for timm; it is not changed.

    Raises: CheckpointError: if the file is missing, damaged or foreign, or of another network, one whose modules,
        settings (such as strides and activations) or tensors differ; the message names the differences.
    """
    data, tensors = read(Path(path))
    if model is None and data.get("recipe") is None:
        known = f"{path} holds a {data.get('class')} and no recipe for timm to make it"
        raise CheckpointError(f"{known}; pass the plain full-width network, as in load(path, model=...)")
    if model is not None and any(is_slim(module) for module in model.modules()):
        raise CheckpointError(f"load({path}, model=...) needs the plain network, not a converted one")
    try:
        return _restored(data, tensors, model).eval()
    except Exception as error:  # of any class, if the description is no such thing
        said = error if isinstance(error, SlimmableError) else f"its description of the model is invalid ({error!r})"
        raise CheckpointError(f"{path} cannot be loaded: {said}") from error


@checked
def full_state_dict(model: nn.Module, *, prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the state dict of the full-width plain network, which loads strictly into the model before conversion.

    It has no narrower norms and no gates, whatever the active width. That of a model without widths is its own.

    Args:
        model: a converted or gated model, a part or wrapper of one, a model built by hand, or a plain model.
        prefix, keep_vars: as in `torch.nn.Module.state_dict`.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> net.load_state_dict(full_state_dict(slim))
    <All keys matched successfully>
    """
    check_whole("full_state_dict", model)
    return full_network(model).state_dict(prefix=prefix, keep_vars=keep_vars)


def versions() -> dict[str, str]:
    """Return the versions of the packages that make a network."""
    from slimmable import __version__

    return {"slimmable": __version__, "timm": version("timm"), "torch": torch.__version__}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says about its model, and its tensors; refuse it unless `save` wrote it."""
    metadata, tensors = read_tensors(path, _FORMAT, "slimmable.save")
    with explained(f"{path} cannot be read; it is damaged", kind=CheckpointError):
        data = dict(json.loads(metadata["model"]))
    return data, tensors


def _restored(data: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module | None) -> nn.Module:
    """Return the model in a file. Nothing has memory before the file has been compared with the plain network."""
    bare = skeleton(data["recipe"], tensors) if model is None else model
    own = bare.state_dict(keep_vars=True) | hidden_buffers(bare)
    given = {name: tensor for name, tensor in tensors.items() if name in own}
    differing, free = unlike(bare, data["modules"], given, narrow="plan" not in data)
    if differing:
        pairs = [(name, data["versions"].get(name), here) for name, here in versions().items()]
        other = [f"\n  written with {name} {then}, here {name} {here}" for name, then, here in pairs if then != here]
        raise CheckpointError(f"it is of another network{differing}{''.join(other)}")
    network = copy_of(bare, {id(own[name]): filled(own[name], each, each.dtype) for name, each in given.items()})
    for path, settings in free.items():
        vars(network.get_submodule(path)).update(settings)
    if "plan" in data:
        if len(data["plan"]["counts"]) + len(data["registered"]) > max(256, len(tensors)):
            raise CheckpointError("it has more widths than its tensors are for")
        network = apply_plan(network, decode(data["plan"], tensors.pop(_UNITS).numpy(), network))
        widths = [tuple(width) if isinstance(width, list) else float(width) for width in data["registered"]]
        with registered(network, widths):
            pass
    for name in MODULES.keys() & data.keys():
        import_module(MODULES[name])
        network = ADDONS[name].restore(network, data[name])
    own = network.state_dict(keep_vars=True)
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(HIDDEN)}
    if differing := differences(own, given, most=5):
        raise CheckpointError(f"its tensors are those of another network{differing}")
    for name, tensor in own.items():
        tensor.data = tensor.data.to(given[name].dtype)
    network.load_state_dict(given)
    return network


def read_weights(path: str | os.PathLike[str], where: str) -> dict[str, Tensor]:
    """Return the tensors in a file of torch.save or safetensors, floats as float32; nothing in it is executed."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{where}: there is no file {path}")
    import timm

    known = torch.serialization.safe_globals([argparse.Namespace])  # which training scripts often save
    with explained(f"{path} is not a file of weights", kind=CheckpointError), known:
        tensors: dict[str, Tensor] = timm.models.load_state_dict(str(path), weights_only=True)
        if other := [f"{name!s:.80}" for name, value in tensors.items() if not is_plain(value)]:
            raise ValueError(f"it holds more than plain tensors: {', '.join(other[:5])}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def is_plain(value: object) -> bool:
    """Return whether a value is a tensor of real numbers whose memory holds each of them."""
    if not isinstance(value, Tensor) or value.is_quantized or value.is_complex() or value.layout != torch.strided:
        return False
    return not value.is_meta and value.nbytes <= value.untyped_storage().nbytes()


def full_network(model: nn.Module) -> nn.Module:
    """Return the plain network of the full width, with the tensors of `model`, which is returned if it is plain."""
    bare = plain(model)
    full = {id(each): each.module_at(0) for each in bare.modules() if isinstance(each, SwitchableContainer)}
    return replace_modules(bare, full)


def filled(like: Tensor, given: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of `given` to take the place of a network's tensor; on the CPU if that has no memory."""
    device = "cpu" if like.is_meta else like.device
    layout = like.detach() if like.shape == given.shape else given
    new = torch.empty_like(layout, dtype=dtype, device=device).copy_(given)
    return nn.Parameter(new, like.requires_grad) if isinstance(like, nn.Parameter) else new


def fitting_recipe(model: nn.Module, narrow: bool, arguments: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the timm architecture and arguments that make a plain network, or if it may be `narrow`, a wider one.

    None if it is not timm's, or surgery has changed it; then with a warning. Given arguments that do not are refused.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if name is None:
        if arguments is not None:
            raise CheckpointError(f"arguments= is for timm models; this {type(model).__name__} is not one")
        return None
    tensors, rows = model.state_dict(keep_vars=True) | hidden_buffers(model), describe(model)
    for candidate in [arguments] if arguments is not None else _candidates(model, config, tensors, rows):
        recipe = {"timm": name, "arguments": dict(candidate)}
        with nullcontext() if arguments is not None else suppress(CheckpointError):
            if not unlike(skeleton(recipe, tensors), rows, tensors, narrow)[0]:
                return recipe
    made = f"timm.create_model({name!r}) makes a network unlike this one"
    if arguments is not None:
        raise CheckpointError(f"{made} with these arguments")
    warnings.warn(f"{made}; if arguments make it, pass them to save; or give load the plain network", stacklevel=4)
    return None


def skeleton(recipe: Mapping[str, Any], tensors: Tensors) -> nn.Module:
    """Make a plain timm model without memory; refuse what timm cannot make, or far too large for such `tensors`."""
    import timm  # here, and not under the device, since its own imports make tensors and modules

    import slimmable._small_resnet  # noqa: F401  adds it to timm's models

    largest = max(_LARGE, *(size for tensor in tensors.values() if tensor.numel() for size in tensor.shape), 0)
    if any(isinstance(leaf, (int, float)) and abs(leaf) > largest for leaf in tree_leaves(recipe)):
        raise CheckpointError(f"its tensors are too small for the model {str(recipe)[:400]}")
    with explained(f"timm cannot make the model {str(recipe)[:400]}", kind=CheckpointError), torch.device("meta"):
        name, arguments = recipe["timm"], recipe["arguments"]
        known = ":" not in name and timm.is_model(name) and set(arguments).isdisjoint(_NEVER)
        if not known or not all(isinstance(leaf, (int, float, str, type(None))) for leaf in tree_leaves(arguments)):
            raise ValueError("the name or the arguments are not those of a timm model")
        model: nn.Module = timm.create_model(name, **arguments)
    return model


def _candidates(model: nn.Module, config: Any, tensors: Tensors, rows: list[Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments that the model may have been made with, from none to all that can be read off it."""
    known = list(read_off(model, config).items())
    for count in range(len(known) + 1):
        yield dict(known[:count])
    with suppress(CheckpointError):  # timm may not take them
        made = describe(skeleton({"timm": config["architecture"], "arguments": dict(known)}, tensors))
        there = {path: settings for path, _, settings in made}
        taken, found = inspect.signature(type(model)).parameters, dict(known)
        for path, _, settings in reversed(rows):  # the outermost module has the last word
            own = {name: value for name, value in settings.items() if name in taken}
            found |= {name: value for name, value in own.items() if there.get(path, own).get(name, value) != value}
        yield found


def read_off(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of classes and image channels and the image size, as far as the model says them."""
    classes, first = getattr(model, "num_classes", None), config.get("first_conv")
    modules = map(dict(model.named_modules()).get, [first] if isinstance(first, str) else first or ())
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    read = {
        "num_classes": classes if type(classes) is int else None,
        "in_chans": next((each.in_channels for each in modules if isinstance(each, nn.modules.conv._ConvNd)), None),
        "img_size": None if size is None else list(size),
    }
    return {key: value for key, value in read.items() if value is not None}


def narrow_arguments(model: Any, full: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with which timm makes a network of this one's sizes: the `full` one's, changed by trial."""
    tensors = model.state_dict(keep_vars=True) | hidden_buffers(model)
    fixed = {**full["arguments"], **read_off(model, model.pretrained_cfg)}
    code, seen, before = inspect.unwrap(type(model).__init__).__code__, dict[str, Any](), sys.getprofile()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is code and not seen:
            seen.update(frame.f_locals)

    def changed(numbers: Mapping[str, Any]) -> dict[str, Any]:
        return {**fixed, **{name: value for name, value in numbers.items() if value != given[name]}}

    def build(numbers: Mapping[str, Any]) -> Facts | None:
        with suppress(CheckpointError):
            return facts(skeleton({**full, "arguments": changed(numbers)}, tensors))
        return None

    sys.setprofile(note)
    try:
        known = facts(skeleton({**full, "arguments": fixed}, tensors))
    finally:
        sys.setprofile(before)
    nested = (vars(value) for value in seen.values() if is_dataclass(value))
    given = {name: value for each in (*nested, seen, seen.get("kwargs", {})) for name, value in each.items()}
    named = {(path, name) for path, module in model.named_modules() for name in named_in_forward(module.__class__)}
    numbers = dict.fromkeys(known.keys() & named, 1e-6)  # some may be those of the full network, which nothing reads
    weights = numbers | {key: 1 for key, fact in known.items() if type(fact) is torch.Size}
    found = fitting(given, build, known, facts(model), weights)
    if found is None:
        raise CheckpointError("no arguments for timm say the sizes of this network")
    return changed(found)
