"""Configurations of transformers' and diffusers' models, which must make the network that they come with.

What a configuration's integers do cannot be seen in it. So they are tried, on tensors without memory, until the class
makes a network with the tensors and integers of the extracted one.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import MappingKey, tree_flatten_with_path, tree_unflatten

from slimmable._described import counts_channels, read_by_forward

Facts: TypeAlias = "dict[tuple[str, str], Any]"  # module path and name -> the shape of a tensor, or a plain number
Edits: TypeAlias = "dict[int, int]"  # position of a configuration's leaf -> its new value


def follow_configs(model: nn.Module, small: nn.Module) -> None:
    """Let the configurations of an extracted network describe it, in place, or warn that they cannot.

    Args:
        model: the converted model.
        small: the network extracted from it, with its narrow tensors and all integers that the forward reads.
    """
    done: tuple[str, ...] = ()
    for path, narrow in small.named_modules():
        if hasattr(narrow, "save_pretrained") and hasattr(narrow, "config") and not path.startswith(done or "/"):
            done = (*done, f"{path}." if path else "")
            _follow_config(model.get_submodule(path), narrow)


def _follow_config(full: nn.Module, narrow: nn.Module) -> None:
    leaves, shape = tree_flatten_with_path(_plain(narrow.config))
    known, wanted = _facts(full), _facts(narrow)

    def build(edits: Edits) -> Facts | None:
        edited = tree_unflatten([edits.get(i, value) for i, (_, value) in enumerate(leaves)], shape)
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _facts(_made(narrow, edited))
        except Exception:  # constructors raise errors of all kinds
            return None

    def misfits(edits: Edits) -> tuple[float, int]:
        built = build(edits)
        return math.inf if built is None else sum(built.get(key) != wanted.get(key) for key in keys), len(edits)

    before = build({})
    tensors = {key for key, fact in known.items() if isinstance(fact, torch.Size) and key in wanted}
    if all(known[key] == wanted[key] for key in tensors):
        return
    if before is not None and any(before.get(key) != known[key] for key in tensors):
        return  # it does not describe the full network either
    read = {(path, name) for path, module in full.named_modules() for name in read_by_forward(module)}
    keys = [
        key
        for key, fact in (before or {}).items()
        if fact == known.get(key) and (key in tensors or key in read or isinstance(fact, float))
    ]
    options = _options(leaves, known, wanted)
    guess = {i: values[0] for i, values in options.items() if counts_channels(_name(leaves[i][0]))}
    saved = narrow.state_dict(keep_vars=True)  # the class computes other tensors anew, with other numbers
    computed = any(known[key] != wanted[key] and ".".join(filter(None, key)) not in saved for key in tensors)
    tried = () if computed or before is None else (_descend(start, options, misfits) for start in (guess, {}))
    found = next((edits for edits in tried if not misfits(edits)[0]), None)
    if found is None:
        warnings.warn(
            f"no config of {type(narrow).__name__} makes the extracted network, which keeps that of the full one; "
            "from_pretrained would refuse its weights, so save it with slimmable.save",
            stacklevel=5,
        )
        return
    _update(narrow, tree_unflatten([found.get(i, value) for i, (_, value) in enumerate(leaves)], shape))
    modules = dict(narrow.named_modules())
    for (path, name), fact in (build(found) or {}).items():
        if type(fact) is int and type(wanted.get((path, name))) is int:
            modules[path].__dict__[name] = fact


def _options(leaves: Any, known: Facts, wanted: Facts) -> dict[int, list[int]]:
    """Return what integers may have become, the likeliest first: as sizes like them have, or in proportion."""
    pairs: Counter[tuple[int, int]] = Counter()
    for key in known.keys() & wanted.keys():
        full, narrow = known[key], wanted[key]
        both = zip(full, narrow, strict=True) if isinstance(full, torch.Size) else [(full, narrow)]
        pairs.update((one, two) for one, two in both if type(one) is int and one != two)
    likely = [pair for pair, _ in pairs.most_common()]
    found: dict[int, list[int]] = {}
    for i, (path, value) in enumerate(leaves):
        if type(value) is int and value > 1 and "label" not in str(path):
            same = [two for one, two in likely if one == value]
            shares = [value * two // one for one, two in likely if value * two % one == 0]
            found[i] = [each for each in dict.fromkeys([*same, *shares]) if 0 < each < value]
    return {i: values for i, values in found.items() if values}


def _descend(edits: Edits, options: Mapping[int, list[int]], misfits: Any) -> Edits:
    """Change one integer at a time for as long as there are fewer misfits, or as few with fewer changes."""
    least, improved = misfits(edits), True
    while improved:
        improved = False
        for i, values in options.items():
            others = {j: value for j, value in edits.items() if j != i}
            for tried in (others, *({**others, i: value} for value in values if least[0])):
                if tried != edits and (score := misfits(tried)) < least:
                    least, edits, improved = score, tried, True
    return edits


def _facts(model: nn.Module) -> Facts:
    """Return the shapes of all tensors, and the numbers that modules hold, in a model with or without widths."""
    found: Facts = {}
    for path, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        found.update({(path, name): tensor.shape for name, tensor in tensors.items() if tensor is not None})
        found.update({(path, name): value for name, value in vars(module).items() if type(value) in (int, float)})
    return found


def _plain(config: Any) -> dict[str, Any]:
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def _made(model: nn.Module, plain: dict[str, Any]) -> nn.Module:
    """Return the network that the model's class makes with a configuration, given as a dict."""
    kind: Any = type(model)
    config: Any = model.config
    made: nn.Module = kind(type(config).from_dict(plain)) if hasattr(config, "from_dict") else kind.from_config(plain)
    return made


def _update(model: Any, plain: dict[str, Any]) -> None:
    """Change the configuration that a model and its modules share."""
    if not hasattr(model.config, "from_dict"):
        model.register_to_config(**plain)
        return
    pending = [(model.config, *(type(model.config).from_dict(each) for each in (_plain(model.config), plain)))]
    while pending:
        own, before, after = pending.pop()
        for name, value in vars(after).items():
            if hasattr(value, "to_dict"):
                pending.append((vars(own)[name], vars(before)[name], value))
            elif value != vars(before)[name]:
                vars(own)[name] = value


def _name(path: tuple[Any, ...]) -> str:
    return next((str(step.key) for step in reversed(path) if isinstance(step, MappingKey)), "")
