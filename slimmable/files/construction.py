"""Recipes of timm models, as far as they can be read off them, and plain networks of the full width."""

import inspect
import math
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import is_dataclass
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_unflatten

from slimmable._checks import check_whole, checked
from slimmable._convert import plain
from slimmable._described import Edits, Score, facts, fitting_edits, named_in_forward
from slimmable._modules import replace_modules
from slimmable.errors import CheckpointError
from slimmable.files.description import describe, hidden_buffers, unlike, unlike_numbers
from slimmable.view.container import SwitchableContainer

_NEVER = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
_PLAIN = (int, float, str, type(None))
_LARGE = 2**13  # image sizes, depths and the like are smaller; other sizes are those of tensors


def fitting_recipe(model: nn.Module, narrow: bool, arguments: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the timm architecture of a plain network and the arguments that make it, or None if it is not timm's.

    If it may be `narrow`, they make one of which it may be a sub-network. A network that surgery has changed from what
    timm makes has no recipe either; a warning says so. Given arguments that make another model are refused.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if name is None:
        if arguments is not None:
            raise CheckpointError(f"arguments= is for timm models; this {type(model).__name__} is not one")
        return None
    tensors, rows = model.state_dict(keep_vars=True) | hidden_buffers(model), describe(model)
    for candidate in [arguments] if arguments is not None else _candidates(model, config, tensors):
        recipe = {"timm": name, "arguments": dict(candidate)}
        with nullcontext() if arguments is not None else suppress(CheckpointError):
            if not unlike(skeleton(recipe, tensors), rows, tensors, narrow)[0]:
                return recipe
    if arguments is not None:
        raise CheckpointError(f"timm.create_model({name!r}) with these arguments makes a network unlike this one")
    warnings.warn(
        f"timm.create_model({name!r}) makes a network unlike this one, so load(path, model=...) will need the plain "
        "network; if arguments make it, pass them, as in save(..., arguments={'num_classes': 10})",
        stacklevel=3,
    )
    return None


def build(recipe: Mapping[str, Any]) -> nn.Module:
    """Make a plain timm model with random weights; raise `CheckpointError` if timm cannot."""
    import timm

    import slimmable._small_resnet  # noqa: F401  adds it to timm's models

    try:
        name, arguments = recipe["timm"], recipe["arguments"]
        known = ":" not in name and timm.is_model(name) and set(arguments).isdisjoint(_NEVER)
        if not known or not all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(arguments)):
            raise ValueError("the name or the arguments are not those of a timm model")
        model: nn.Module = timm.create_model(name, **arguments)
        return model
    except Exception as error:  # timm's constructors raise errors of all kinds
        raise CheckpointError(f"timm cannot make the model {str(recipe)[:400]} ({error})") from error


def skeleton(recipe: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Make a timm model without memory; refuse arguments and numbers of modules far too large for such `tensors`."""
    largest = max(_LARGE, *(size for tensor in tensors.values() if tensor.numel() for size in tensor.shape), 0)
    if any(isinstance(leaf, (int, float)) and abs(leaf) > largest for leaf in tree_leaves(recipe)):
        raise CheckpointError(f"its tensors are too small for the model {str(recipe)[:400]}")
    import timm  # noqa: F401  here, since its own imports make tensors and modules

    with torch.device("meta"), _at_most(100 + 10 * len(tensors)):
        return build(recipe)


@contextmanager
def _at_most(registrations: int) -> Iterator[None]:
    """Let modules of this thread register at most so many parameters and modules while the block runs."""
    thread, left = threading.get_ident(), registrations

    def count(*_: object) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise CheckpointError("it has more modules than the file has tensors for")

    parameters = torch_module.register_module_parameter_registration_hook(count)
    with parameters, torch_module.register_module_module_registration_hook(count):
        yield


def _candidates(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Yield the arguments that the model may have been made with, from none to all that can be read off it."""
    known = list(_read_off(model, config).items())
    for count in range(len(known) + 1):
        yield dict(known[:count])
    taken = inspect.signature(type(model)).parameters
    numbers = unlike_numbers(model, skeleton({"timm": config["architecture"], "arguments": dict(known)}, tensors))
    yield dict(known) | {key: value for key, value in numbers.items() if key in taken}


def _read_off(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
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


def narrow_arguments(model: nn.Module, full: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with which timm makes a network with the tensors of this plain one, or raise `CheckpointError`.

    `full` is the recipe of the full network. What its arguments do cannot be seen in them, so they are tried, on
    tensors without memory. Of those that make such tensors, the ones that also make the most alike numbers are taken.
    """
    tensors, config = model.state_dict(keep_vars=True) | hidden_buffers(model), cast(Any, model).pretrained_cfg
    full = {**full, "arguments": {**full["arguments"], **_read_off(model, config)}}
    given = _constructor_arguments(type(model), full, tensors)
    leaves, shape = tree_flatten_with_path(given)
    known, wanted = facts(skeleton(full, tensors)), facts(model)
    kinds: list[tuple[str, Any]] = [(path, type(module)) for path, module in model.named_modules()]
    read = {(path, name) for path, kind in kinds for name in named_in_forward(kind)}
    shapes = [key for key, fact in known.items() if isinstance(fact, torch.Size)]
    numbers = [key for key in known.keys() & wanted.keys() & read if key not in shapes]

    def arguments(edits: Edits) -> dict[str, Any]:
        edited = tree_unflatten([edits.get(i, value) for i, (_, value) in enumerate(leaves)], shape)
        return {**full["arguments"], **{name: value for name, value in edited.items() if value != given[name]}}

    def misfits(edits: Edits) -> Score:
        try:
            made = facts(skeleton({**full, "arguments": arguments(edits)}, tensors))
        except CheckpointError:
            return math.inf, len(edits)
        unlike, other = (sum(made.get(key) != wanted.get(key) for key in keys) for keys in (shapes, numbers))
        return unlike + other / (len(numbers) + 1), len(edits)

    found = fitting_edits(leaves, known, wanted, misfits)
    if found is None:
        raise CheckpointError("no arguments for timm say the sizes of this network")
    return arguments(found)


def _constructor_arguments(kind: Any, recipe: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the constructor of a timm model's class gets, with the fields of a configuration, for a recipe."""
    code, found, before = inspect.unwrap(kind.__init__).__code__, dict[str, Any](), sys.getprofile()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is code and not found:
            found.update(frame.f_locals)

    sys.setprofile(note)
    try:
        skeleton(recipe, tensors)
    finally:
        sys.setprofile(before)
    fields = [vars(value) for value in found.values() if is_dataclass(value)]
    return {name: value for each in (*fields, found, found.get("kwargs", {})) for name, value in each.items()}


@checked
def full_state_dict(model: nn.Module, *, prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the state dict of the full-width plain network, which loads strictly into the model before conversion.

    It has no narrower norms and no gates, whatever the active width. That of a model without widths is its own.

    Args:
        model: a converted or gated model, a part or wrapper of one, a model built by hand, or a plain model.
        prefix, keep_vars: as in `torch.nn.Module.state_dict`.

    >>> import torch
    >>> from slimmable import slimify
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> slim = slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> "1.narrow.0.weight" in slim.state_dict()
    True
    >>> net.load_state_dict(full_state_dict(slim))
    <All keys matched successfully>
    """
    check_whole("full_state_dict", model)
    return full_network(model).state_dict(prefix=prefix, keep_vars=keep_vars)


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
