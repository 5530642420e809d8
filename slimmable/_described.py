"""Integers that describe layers, such as `in_channels` and `num_features`, follow them in an extracted network.

The forward's own integers are in the plan. These are the others, which only other methods and other code read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias, cast

from torch import nn

from slimmable._modules import tensors_of
from slimmable._reach import names_in
from slimmable.analysis.sizes import size_axes
from slimmable.view.container import SwitchableContainer
from slimmable.view.state import state_of

_SAY_CHANNELS = re.compile(
    r"dims?|chs?|chans?|channels?|features?|feats?|heads?|hidden|embed|embedding|embd|intermediate|inner|ffn?|model|groups"
    r"|(in|out|mid)?planes|filters|units"
)
_SAY_OTHERS = re.compile(
    r"layers?|depths?|blocks?|levels?|class(es)?|labels?|kernel|window|patch(es)?|ima?ge?|stride|pad(ding)?|pos(itions?)?"
    r"|len(gth)?|vocab|tokens?|axis|start|end"
)
_AXES = 4  # a smaller integer may as well be the number of an axis


Twins: TypeAlias = tuple[nn.Module, nn.Module]  # a module of the full model, and that of the extracted network


def follow_layers(model: nn.Module, small: nn.Module) -> None:
    """Set the integers of an extracted network that describe its layers, in place.

    An attribute follows if its name says that it counts channels, features or heads, and if all that has this size in
    the nearest layers, its module's own or those inside, shrinks alike. What contradicts itself stays.

    Args:
        model: the converted model.
        small: the network extracted from it, with its narrow tensors and all integers that the forward reads.
    """
    pairs: list[Twins] = [(model, small)]
    for twins in pairs:  # which grows
        pairs += _children(twins).values()
    for full, narrow in pairs:
        before, after = tensors_of(full).get("weight"), tensors_of(narrow).get("weight")
        for name, axis in size_axes(narrow).items():
            if before is not None and after is not None and before.shape != after.shape and name in vars(narrow):
                narrow.__dict__[name] = after.shape[axis] * (getattr(narrow, "groups", 1) if axis else 1)
    for full, narrow in reversed(pairs):  # children first
        known = {*read_by_forward(full), *size_axes(narrow)}
        for name, value in list(vars(narrow).items()):
            if name not in known and counts_channels(name):
                narrow.__dict__[name] = _followed((full, narrow), name, value)
    _follow_features(model, small)


def _follow_features(model: nn.Module, small: nn.Module) -> None:
    """Set what sizes a timm model's features: the classifier's inputs, or the channels of each output."""
    state, info = state_of(model), cast(Any, vars(small).get("feature_info"))
    if hasattr(info, "out_indices") and state is not None and state.plan is not None and state.active.counts:
        columns = (state.plan.columns[0], state.plan.sub_network(state.active.counts))
        for index, before, now in zip(info.out_indices, *(column.output_shapes for column in columns), strict=False):
            channels = info.info[index]["num_chs"]
            narrow = [two for one, two in zip(before, now, strict=True) if one == channels]
            info.info[index]["num_chs"] = min(narrow, default=channels)
    heads = [cast(Any, each).get_classifier() for each in (model, small) if hasattr(each, "get_classifier")]
    for name in ("num_features", "head_hidden_size", "embed_dim"):
        if heads and isinstance(heads[0], nn.Linear) and vars(model).get(name) == heads[0].in_features:
            small.__dict__[name] = heads[1].in_features


def read_by_forward(module: nn.Module) -> set[str]:
    """Return the names of attributes that the plan determines, or that the forward's code names, with what it calls."""
    kind: Any = type(module)
    found: set[str] = _named_in_forward(kind)
    state = state_of(module)
    if state is None:
        return found
    attributes = () if state.plan is None else state.plan.channels.attributes
    planned = {name for path, name in attributes if path == state.path}
    return {*found, *planned, *state.active.values, *state.active.sizes}


@cache
def _named_in_forward(kind: Any) -> set[str]:
    found, todo = set[str](), ["forward"]
    while todo:
        code = getattr(inspect.unwrap(getattr(kind, todo.pop(), None) or object), "__code__", None)
        new = set(names_in(code)) - found if code is not None else set()
        found |= new
        todo += new
    return found


def _children(twins: Twins) -> dict[str, Twins]:
    found = {}
    for name, full in twins[0]._modules.items():
        narrow = twins[1]._modules.get(name)
        if full is not None and narrow is not None:
            found[name] = (full.module_at(0) if isinstance(full, SwitchableContainer) else full, narrow)
    return found


def counts_channels(name: str) -> bool:
    """Tell whether an attribute's name says that it counts channels, features or heads.

    >>> counts_channels("in_chs"), counts_channels("hidden_size"), counts_channels("num_hidden_layers")
    (True, True, False)
    """
    words = [word.rstrip("0123456789") for word in name.lower().split("_")]
    return any(map(_SAY_CHANNELS.fullmatch, words)) and not any(map(_SAY_OTHERS.fullmatch, words))


def _followed(twins: Twins, name: str, value: Any) -> Any:
    """Return an attribute's narrow value; in a list of dicts, such as timm's `feature_info`, that of each entry."""
    if type(value) is int:
        return _narrow(twins, name, value) if value > 1 and counts_channels(name) else value
    if type(value) in (list, tuple):
        return type(value)(_followed(twins, name, part) for part in value)
    if type(value) is dict:
        path = value.get("module")
        for step in path.split(".") if isinstance(path, str) and path else ():
            twins = _children(twins).get(step, twins)
        return {key: _followed(twins, str(key), part) for key, part in value.items()}
    return value


def _narrow(twins: Twins, name: str, value: int) -> int:
    """Return what a size of the full model has become in the nearest layers that have it, if they agree."""
    level, known = [twins], (None, *read_by_forward(twins[0]))
    while level:
        sizes = [(own, small) for each in level for own, full, small in _sizes(each) if full == value]
        if level == [twins]:  # its other attributes have yet to follow
            sizes = [(own, small) for own, small in sizes if own in known]
        found = {small for own, small in sizes if own == name} or {small for _, small in sizes if value > _AXES}
        if found:
            return found.pop() if len(found) == 1 else value
        level = [child for each in level for child in _children(each).values()]
    return value


def _sizes(twins: Twins) -> Iterator[tuple[str | None, int, int]]:
    """Yield the sizes of the full and the narrow layer: of axes of its tensors, and of attributes with their names."""
    full, narrow = twins
    spatial = 2 if isinstance(full, nn.modules.conv._ConvNd) else None
    before, after = tensors_of(full), tensors_of(narrow)
    for name in before.keys() & after.keys():
        axes = zip(before[name].shape[:spatial], after[name].shape[:spatial], strict=False)
        yield from ((None, *both) for both in axes)
    for name, value in vars(full).items():
        if type(value) is int and type(now := vars(narrow).get(name)) is int and counts_channels(name):
            yield name, value, now
