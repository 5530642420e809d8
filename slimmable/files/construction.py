"""Recipes of timm models, as far as they can be read off them, and how networks differ in their tensors."""

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from slimmable._checks import check_whole, checked
from slimmable._convert import plain
from slimmable._modules import replace_modules
from slimmable._tables import listed
from slimmable.errors import CheckpointError
from slimmable.files.description import Row, compare, describe, unlike_numbers
from slimmable.view.container import SwitchableContainer

_NEVER = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
HIDDEN = "slimmable/buffer/"  # before the names of buffers that are not in the state dict
_LARGE = 2**13  # image sizes, depths and the like are smaller; other sizes are those of tensors


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
    tensors, rows = model.state_dict(keep_vars=True) | hidden_buffers(model), describe(model)
    for candidate in [arguments] if arguments is not None else _candidates(model, config, name):
        recipe = {"timm": name, "arguments": dict(candidate)}
        with nullcontext() if arguments is not None else suppress(CheckpointError):
            if not unlike(skeleton(recipe), rows, tensors, narrow)[0]:
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
        raise CheckpointError(f"timm cannot make the model {str(recipe)[:400]} ({error})") from error


def skeleton(recipe: Mapping[str, Any], shapes: Sequence[Sequence[int]] | None = None) -> nn.Module:
    """Make a timm model without memory for its tensors.

    If `shapes` of a file's tensors are given, that takes no longer than the making of a network of such tensors may:
    arguments that are larger, or far more modules, are refused.
    """
    with torch.device("meta"):
        if shapes is None:
            return build(recipe)
        largest = max(_LARGE, *(size for shape in shapes if 0 not in shape for size in shape), 0)
        if _largest(recipe) > largest:
            raise CheckpointError(f"the file is too small for the model {str(recipe)[:400]}")
        with _at_most(100 + 10 * len(shapes)):
            return build(recipe)


def _largest(data: Any) -> float:
    """Return the largest number in nested data."""
    if isinstance(data, (Mapping, list, tuple)):
        return max((_largest(part) for part in (data.values() if isinstance(data, Mapping) else data)), default=0)
    return abs(data) if isinstance(data, (int, float)) else 0


@contextmanager
def _at_most(registrations: int) -> Iterator[None]:
    """Let modules of this thread register at most so many parameters and modules while the block runs."""
    thread, left = threading.get_ident(), registrations

    def count(*_: object) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise CheckpointError("it has more modules than the file has tensors for")

    hooks = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, bool, str))


def _candidates(model: nn.Module, config: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield the arguments that the model may have been made with, from none to all that can be read off it."""
    classes, first = getattr(model, "num_classes", None), config.get("first_conv")
    modules = map(dict(model.named_modules()).get, [first] if isinstance(first, str) else first or ())
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    read = {
        "num_classes": classes if type(classes) is int else None,
        "in_chans": next((each.in_channels for each in modules if isinstance(each, nn.modules.conv._ConvNd)), None),
        "img_size": None if size is None else list(size),
    }
    known = [(key, value) for key, value in read.items() if value is not None]
    for count in range(len(known) + 1):
        yield dict(known[:count])
    taken = inspect.signature(type(model)).parameters
    numbers = unlike_numbers(model, skeleton({"timm": name, "arguments": dict(known)}))
    yield dict(known) | {key: value for key, value in numbers.items() if key in taken}


def hidden_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a plain network that are not in the state dict, by their names in files."""
    saved = model.state_dict(keep_vars=True)
    return {f"{HIDDEN}{name}": buffer for name, buffer in model.named_buffers() if name not in saved}


def unlike(plain: nn.Module, rows: list[Any], tensors: Mapping[str, Tensor], narrow: bool) -> tuple[str, list[Row]]:
    """Return how a network differs from `plain`, "" if it does not, and settings that may differ, to take over.

    `rows` describe the other network, and `tensors` are its own, with hidden buffers; those that forwards have added or
    cut do not count. If it may be `narrow`, it may be a sub-network of `plain`.
    """
    own, hidden = plain.state_dict(keep_vars=True), hidden_buffers(plain)
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(HIDDEN)}
    kept = {name: tensor for name, tensor in tensors.items() if name in hidden}
    narrow = narrow and any(name in own and tensor.shape != own[name].shape for name, tensor in given.items())
    found, free = compare(plain, rows, {name: tensor.shape for name, tensor in given.items()}, narrow)
    found["of another type"] = [
        f"{name} {tensors[name].dtype}, expected {tensor.dtype}"
        for name, tensor in (own | hidden).items()
        if name in tensors and _numbers_of(tensors[name].dtype) != _numbers_of(tensor.dtype)
    ]
    lines = "".join(f"\n  {kind}: {listed(names, 4)}" for kind, names in found.items() if names)
    lines += differences(own, given, most=4, narrow=narrow) + differences(hidden, kept, most=4, narrow=True)
    return lines, free


def _numbers_of(dtype: torch.dtype) -> object:
    """Return what must be the same of two types: real or complex, or else all."""
    return (dtype.is_complex, True) if dtype.is_floating_point or dtype.is_complex else dtype


@checked
def full_state_dict(model: nn.Module, *, prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the state dict of the full-width plain network, which loads strictly into the model before conversion.

    It has no narrower norms and no gates, whatever the active width. That of a model without widths is its own.

    Args:
        model: a converted or gated model, a part or wrapper of one, a model built by hand, or a plain model.
        prefix, keep_vars: as in `torch.nn.Module.state_dict`: what to put before each name, and whether to return the
            Parameters themselves.

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
    found: dict[str, Tensor] = full_network(model).state_dict(prefix=prefix, keep_vars=keep_vars)
    return found


def full_network(model: nn.Module) -> nn.Module:
    """Return the plain network of the full width, with the tensors of `model`, which is returned if it is plain."""
    bare = plain(model)
    full = {id(each): each.module_at(0) for each in bare.modules() if isinstance(each, SwitchableContainer)}
    return replace_modules(bare, full)


def differences(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], most: int | None = None, *, narrow: bool = False
) -> str:
    """Return how two state dicts differ in names and shapes: one line per kind of difference, or "" for none.

    Each line begins with a line break and two spaces, to be appended to the first line of a message. `expected` are the
    tensors of the network, `given` those of the file, and `most` is how many names a line lists, None for all. The
    given ones may be smaller if they are those of a `narrow` network.

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
            if not (narrow and fits_inside(given[name].shape, tensor.shape))
        ],
    }
    return "".join(f"\n  {kind}: {listed(names, most)}" for kind, names in kinds.items() if names)


def fits_inside(small: Sequence[int], large: Sequence[int]) -> bool:
    """Tell whether a tensor of shape `small` can be part of one of shape `large`."""
    return len(small) == len(large) and all(min(1, b) <= a <= b for a, b in zip(small, large, strict=True))


def filled(like: Tensor, given: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of `given` to take the place of a network's tensor; on the CPU if that has no memory."""
    device = "cpu" if like.is_meta else like.device
    layout = like.detach() if like.shape == given.shape else given
    new = torch.empty_like(layout, dtype=dtype, device=device).copy_(given)
    return nn.Parameter(new, like.requires_grad) if isinstance(like, nn.Parameter) else new
