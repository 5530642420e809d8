"""Refuse state dicts whose gates differ from the model's before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from slimmable.errors import CheckpointError

_PART = re.compile(r"(?:.*\.)?(?:(?P<gate>channel_gate(?:_\d+)?\.at)|gated)\.\d+(?=\.)")
_SHOWN = 4


def refuse_other_gates(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Refuse a state dict whose gates, or norms of the gated pass, differ from the module's.

    A hook for `register_load_state_dict_pre_hook` of the module that `gate` returned. A state dict without any gates is
    accepted: hooks cannot tell whether it is loaded with `strict=False`, as a dense checkpoint is.

    Raises: CheckpointError: naming gates that are missing, not in the model, or of other sizes.
    """
    given = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix) and _PART.match(name)}
    if not _gates(given):
        return
    tensors = {prefix + name: tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    own = {name: tensor for name, tensor in tensors.items() if _PART.match(name)}
    shapes = {name: (_shape(given[name]), _shape(tensor)) for name, tensor in own.items() if name in given}
    kinds = {
        "missing": _parts(name for name in _gates(own) if name not in given),
        "not in the model": _parts(name for name in given if name not in own),
        "of other sizes": [f"{name} {one}, in the model {two}" for name, (one, two) in shapes.items() if one != two],
    }
    lines = [f"  {kind}: {_listed(found)}" for kind, found in kinds.items() if found]
    if lines:
        first = f"the gates in this state dict differ from those of this {type(module).__name__}; nothing was loaded"
        advice = (
            "gate the model like the checkpoint's: the same model, widths, skip and separate_norms. To load only the "
            "other tensors, leave out those with channel_gate or gated in their names, and use strict=False"
        )
        raise CheckpointError("\n".join([first, *lines, advice]))


def _gates(names: Iterable[str]) -> list[str]:
    return [name for name in names if (found := _PART.match(name)) and found["gate"]]


def _parts(names: Iterable[str]) -> list[str]:
    """Return the gates and norms that tensors belong to, each once."""
    return list(dict.fromkeys(found.group() for name in names if (found := _PART.match(name))))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", ()))


def _listed(found: list[str]) -> str:
    more = len(found) - _SHOWN
    return ", ".join(found[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
