"""What an extracted network says of itself besides what forwards read: integers such as `in_channels`, its `config`."""

import dis
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from types import CodeType
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from torch.utils._pytree import MappingKey, tree_flatten_with_path, tree_unflatten

from slimmable._modules import size_axes, tensors_of
from slimmable._reach import PROCESS, codes_in
from slimmable.view.norms import SwitchableContainer
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
Facts: TypeAlias = dict[tuple[str, str], Any]  # module path and name -> the shape of a tensor, or a plain number
Edits: TypeAlias = dict[int, float]  # position of a configuration's leaf -> its new value


def follow_layers(model: nn.Module, small: nn.Module) -> None:
    """Set the integers of `small`, a network extracted from `model`, that describe its layers and no forward reads.

    One follows if its name says that it counts channels, features or heads, and if all that has this size in the
    nearest layers, its module's own or those inside, shrinks alike.
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
    found, state = set(named_in_forward(kind)), state_of(module)
    if state is not None:
        attributes = () if state.plan is None else state.plan.channels.attributes
        found |= {*(name for path, name in attributes if path == state.path), *state.active.values}
    return found


@cache
def named_in_forward(kind: Any) -> set[str]:
    """Return the names in the code of a class's forward, and of the methods that it names."""
    return {name for code in _codes_of_forward(kind) for name in code.co_names}


@cache
def stored_by_forward(kind: Any) -> set[str]:
    """Return the names of attributes that a class's forward, or a method that it names, sets."""
    steps = (step for code in _codes_of_forward(kind) for step in dis.get_instructions(code))
    return {step.argval for step in steps if step.opname == "STORE_ATTR"}


def _codes_of_forward(kind: Any) -> list[CodeType]:
    found, names = list[CodeType](), ["forward"]
    for name in names:  # which grow
        code = getattr(inspect.unwrap(getattr(kind, name, object)), "__code__", None)
        codes = [] if code is None else list(codes_in(code))
        found += codes
        names += {name for each in codes for name in each.co_names}.difference(names)
    return found


def _children(twins: Twins) -> dict[str, Twins]:
    found = {}
    for name, full in twins[0]._modules.items():
        narrow = twins[1]._modules.get(name)
        if full is not None and narrow is not None:
            found[name] = (full.module_at(0) if isinstance(full, SwitchableContainer) else full, narrow)
    return found


def counts_channels(name: str) -> bool:
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


# -- configurations
def follow_configs(model: nn.Module, small: nn.Module) -> None:
    """Let the configurations of an extracted network (transformers, diffusers) describe it, or warn that they cannot.

    Numbers in them are tried, on tensors without memory, until the class makes the tensors and integers of the network.
    """
    done: tuple[str, ...] = ()
    for path, narrow in small.named_modules():
        if hasattr(narrow, "save_pretrained") and hasattr(narrow, "config") and not path.startswith(done or "/"):
            done = (*done, f"{path}." if path else "")
            _follow_config(model.get_submodule(path), narrow)


def _follow_config(full: nn.Module, narrow: Any) -> None:
    kind, config = type(narrow), narrow.config
    own: dict[str, Any] = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    known, wanted = facts(full), facts(narrow)

    def build(edited: Any) -> Facts | None:
        with suppress(Exception), PROCESS, torch.device("meta"), warnings.catch_warnings():  # errors of all kinds
            warnings.simplefilter("ignore")
            nested = hasattr(config, "from_dict")  # in a class of its own, not diffusers' frozen dict
            return facts(kind(type(config).from_dict(edited)) if nested else kind.from_config(edited))
        return None

    before = build(own) or {}
    tensors = {key for key, fact in known.items() if isinstance(fact, torch.Size) and key in wanted}
    unlike = before and any(before.get(key) != known[key] for key in tensors)  # the full network, too
    if unlike or all(known[key] == wanted[key] for key in tensors):
        return
    told = tensors | {(path, name) for path, module in full.named_modules() for name in read_by_forward(module)}
    weights = {key: 1 for key, it in before.items() if it == known.get(key) and (key in told or type(it) is float)}
    saved = narrow.state_dict(keep_vars=True)  # the class computes other tensors anew, with other numbers
    computed = any(known[key] != wanted[key] and ".".join(filter(None, key)) not in saved for key in tensors)
    found = None if computed or not before else fitting(own, build, known, wanted, weights)
    if found is None:
        what = f"no config of {type(narrow).__name__} makes the extracted network, which keeps that of the full one"
        warnings.warn(f"{what}; from_pretrained would refuse its weights; save it with slimmable.save", stacklevel=4)
        return
    _update(narrow, own, found)
    modules = dict(narrow.named_modules())
    for (path, name), fact in (build(found) or {}).items():
        if type(fact) is int and type(wanted.get((path, name))) is int:
            modules[path].__dict__[name] = fact


def fitting(given: Any, build: Callable[[Any], Facts | None], known: Facts, wanted: Facts, weights: Any) -> Any:
    """Return nested data like `given` with numbers of which `build` makes the `wanted` facts, or None.

    `known` are the facts of the full network. Those that differ at the end must have `weights` of less than 1 together.
    """
    leaves, shape = tree_flatten_with_path(given)

    def edited(edits: Edits) -> Any:
        return tree_unflatten([edits.get(i, value) for i, (_, value) in enumerate(leaves)], shape)

    def misfits(edits: Edits) -> tuple[float, int]:
        built = build(edited(edits)) or {}
        return sum(weight for key, weight in weights.items() if built.get(key) != wanted.get(key)), len(edits)

    options = _options(leaves, known, wanted)
    guess = {i: values[0] for i, values in options.items() if counts_channels(_name(leaves[i][0]))}
    tried = (_descend(start, options, misfits) for start in (guess, {}))
    return next((edited(edits) for edits in tried if misfits(edits)[0] < 1), None)


def _options(leaves: Any, known: Facts, wanted: Facts) -> dict[int, list[float]]:
    """Return what numbers may have become, the likeliest first: as sizes like them have, or in proportion."""
    pairs: Counter[tuple[int, int]] = Counter()
    for key in known.keys() & wanted.keys():
        full, narrow = known[key], wanted[key]
        both = zip(full, narrow, strict=True) if isinstance(full, torch.Size) else [(full, narrow)]
        pairs.update((one, two) for one, two in both if type(one) is int and one != two)
    likely = [pair for pair, _ in pairs.most_common()]
    found: dict[int, list[float]] = {}
    for i, (path, value) in enumerate(leaves):
        if type(value) is int and value > 1 and "label" not in str(path):
            same = [two for one, two in likely if one == value]
            shares = [value * two // one for one, two in likely if value * two % one == 0]
            found[i] = [each for each in dict.fromkeys([*same, *shares]) if 0 < each < value]
        elif type(value) is float and re.search("factor|mult|ratio|width", _name(path)):
            found[i] = [value * two / one for one, two in likely[:4]]
    return {i: values for i, values in found.items() if values}


def _descend(edits: Edits, options: Mapping[int, list[float]], misfits: Any) -> Edits:
    """Change one number at a time for as long as there are fewer misfits, or as few with fewer changes."""
    least, improved = misfits(edits), True
    while improved:
        improved = False
        for i, values in options.items():
            others = {j: value for j, value in edits.items() if j != i}
            for tried in (others, *({**others, i: value} for value in values if least[0])):
                if tried != edits and (score := misfits(tried)) < least:
                    least, edits, improved = score, tried, True
    return edits


def facts(model: nn.Module) -> Facts:
    """Return the shapes of all tensors, and the numbers that modules hold, in a model with or without widths."""
    found: Facts = {}
    for path, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        found.update({(path, name): tensor.shape for name, tensor in tensors.items() if tensor is not None})
        found.update({(path, name): value for name, value in vars(module).items() if type(value) in (int, float)})
    return found


def _update(model: Any, old: dict[str, Any], new: dict[str, Any]) -> None:
    if not hasattr(model.config, "from_dict"):
        model.register_to_config(**new)
        return
    pending = [(model.config, *map(type(model.config).from_dict, (old, new)))]
    for own, *both in pending:  # which grows
        before, after = map(vars, both)
        pending += [(vars(own)[name], before[name], each) for name, each in after.items() if hasattr(each, "to_dict")]
        vars(own).update({n: each for n, each in after.items() if not hasattr(each, "to_dict") and each != before[n]})


def _name(path: tuple[Any, ...]) -> str:
    return next((str(step.key) for step in reversed(path) if isinstance(step, MappingKey)), "")
