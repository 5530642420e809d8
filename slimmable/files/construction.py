"""Recipes of timm models, as far as they can be read off them, and the plain numbers that modules hold."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimmable._checks import checked
from slimmable._convert import plain
from slimmable._modules import replace_modules
from slimmable._tables import listed
from slimmable.errors import CheckpointError
from slimmable.view.container import SwitchableContainer

_NEVER = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def fitting_recipe(model: nn.Module, narrow: bool, arguments: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the timm architecture of a plain network and the arguments that make it, or None if it is not timm's.

    If it may be `narrow`, they make one of which it may be a sub-network. A network that surgery has changed from what
    timm makes has no recipe either; a warning says so.

    Raises: CheckpointError: if arguments are given but make another model.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if name is None:
        if arguments is not None:
            raise CheckpointError(f"arguments= is for timm models; this {type(model).__name__} is not one")
        return None
    for candidate in [arguments] if arguments is not None else _candidates(model, config):
        recipe = {"timm": name, "arguments": dict(candidate)}
        with nullcontext() if arguments is not None else suppress(CheckpointError), torch.device("meta"):
            if _fits(model, build(recipe), narrow):
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
        known = isinstance(name, str) and timm.is_model(name) and ":" not in name
        if not known or not set(arguments).isdisjoint(_NEVER) or not all(map(_is_plain, arguments.values())):
            raise ValueError("the name or the arguments are not those of a timm model")
        model: nn.Module = timm.create_model(name, **arguments)
        return model
    except Exception as error:  # timm's constructors raise errors of all kinds
        raise CheckpointError(f"timm cannot make the model {recipe!r} ({error})") from error


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, bool, str))


def _candidates(model: nn.Module, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments that the model may have been made with, from none to all that can be read off it."""
    classes, first = getattr(model, "num_classes", None), config.get("first_conv")
    modules = map(dict(model.named_modules()).get, [first] if isinstance(first, str) else first or ())
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    read = {
        "num_classes": classes if type(classes) is int else None,
        "in_chans": next((each.in_channels for each in modules if isinstance(each, nn.modules.conv._ConvNd)), None),
        "img_size": None if size is None else list(size),
    }
    known = [(name, value) for name, value in read.items() if value is not None]
    for count in range(len(known) + 1):
        yield dict(known[:count])


def _fits(model: nn.Module, plain: nn.Module, narrow: bool) -> bool:
    """Tell whether `plain` is the same network, or one that `model` may be a sub-network of."""
    if _classes(model) != _classes(plain):
        return False
    own, full = model.state_dict(keep_vars=True), plain.state_dict(keep_vars=True)
    if not narrow:
        return not differences(full, own)
    return own.keys() == full.keys() and all(fits_inside(own[name].shape, full[name].shape) for name in full)


def _classes(model: nn.Module) -> dict[str, type]:
    """Return the class of every module by path; BatchNorms count as one class, since converters swap them."""
    return {path: _BatchNorm if isinstance(each, _BatchNorm) else type(each) for path, each in model.named_modules()}


def attributes_of(model: nn.Module) -> list[list[Any]]:
    """Return module path, name and full value of attributes that are numbers or nested tuples or lists of them."""
    return [
        [path, name, value]
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_number(value)
    ]


def set_attributes(model: nn.Module, given: list[list[Any]]) -> None:
    """Set the attributes that `attributes_of` returned, except those that are None until a forward sets them."""
    modules = dict(model.named_modules())
    for path, name, value in given:
        own = vars(modules[path]).get(name, "missing") if path in modules else "missing"
        if own is not None:
            new = _like(own, value, f"{path}.{name}".lstrip("."))
            if new != own:
                modules[path].__dict__[name] = new


def _is_number(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_number, value)) and len(value) > 0
    return type(value) in (int, float, bool)


def _like(own: Any, value: Any, place: str) -> Any:
    """Return a value from a file with the types of the model's own value at this place."""
    if isinstance(own, (tuple, list)) and isinstance(value, list) and len(own) == len(value):
        parts = [_like(*pair, place) for pair in zip(own, value, strict=True)]
        return type(own)(*parts) if hasattr(own, "_fields") else type(own)(parts)
    if type(own) in (int, float, bool) and type(value) in (int, float, bool):
        return type(own)(value)
    raise CheckpointError(f"{place} is {value!r} in the file, but {own!r} in this network")


@checked
def full_state_dict(model: nn.Module, *, prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the state dict of the full-width plain network, which loads strictly into the model before conversion.

    It has no narrower norms and no gates, whatever the active width. That of a model without widths is its own.

    Args:
        model: a converted or gated model, a part or wrapper of one, a model built by hand, or a plain model.
        prefix, keep_vars: as in `torch.nn.Module.state_dict`: what to put before each name, and whether to return the
            Parameters themselves.

    Raises: UsageError: if `model` is not a module.

    >>> import torch
    >>> from slimmable import slimify
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> slim = slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> "1.narrow.0.weight" in slim.state_dict()
    True
    >>> net.load_state_dict(full_state_dict(slim))
    <All keys matched successfully>
    """
    found: dict[str, Tensor] = full_network(model).state_dict(prefix=prefix, keep_vars=keep_vars)
    return found


def full_network(model: nn.Module) -> nn.Module:
    """Return the plain network of the full width, with the tensors of `model`, which is returned if it is plain."""
    bare = plain(model)
    full = {id(each): each.module_at(0) for each in bare.modules() if isinstance(each, SwitchableContainer)}
    return replace_modules(bare, full)


def differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], most: int | None = None) -> str:
    """Return how two state dicts differ in names and shapes: one line per kind of difference, or "" for none.

    Each line begins with a line break and two spaces, to be appended to the first line of a message. `expected` are the
    tensors of the network, `given` those of the file, and `most` is how many names a line lists, None for all.

    >>> import torch
    >>> one, two = torch.zeros(1), torch.zeros(2)
    >>> print("not the same:" + differences({"a": two, "b": one}, {"a": one, "c": one}))
    not the same:
      missing: b
      unknown: c
      of another shape: a (1,), expected (2,)
    """
    kinds = {
        "missing": [name for name in expected if name not in given],
        "unknown": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in given and given[name].shape != tensor.shape
        ],
    }
    return "".join(f"\n  {kind}: {listed(names, most)}" for kind, names in kinds.items() if names)


def fits_inside(small: Sequence[int], large: Sequence[int]) -> bool:
    """Tell whether a tensor of shape `small` can be part of one of shape `large`."""
    return len(small) == len(large) and all(a <= b for a, b in zip(small, large, strict=True))
