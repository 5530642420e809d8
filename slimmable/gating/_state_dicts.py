"""State dicts of other gates, refused before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from slimmable.errors import CheckpointError

_GATE = re.compile(r"(^|.*\.)channel_gate(_\d+)?\.at\.\d+(?=\.)")
_NORM = re.compile(r"(^|.*\.)gated\.\d+(?=\.)")
_SHOWN = 4


def refuse_other_gates(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Before a state dict is loaded: refuse gates, and norms of the gated pass, that the module does not have.

    A hook for `register_load_state_dict_pre_hook` of the module that `gate` was given. A state dict without any gate
    passes, as hooks are not told whether it is to be loaded with `strict=False`, as a dense checkpoint is.

    Raises: CheckpointError: naming gates that are missing, too many or of other sizes.
    """
    given = {name: _shape(value) for name, value in state_dict.items() if name.startswith(prefix)}
    if not any(_GATE.match(name) for name in given):
        return
    own = {prefix + name: _shape(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    missing = _parts(name for name in own if name not in given and _GATE.match(name))
    too_many = _parts(name for name in given if name not in own)
    sizes = [
        f"{name} {given[name]}, in the model {own[name]}"
        for name in own
        if name in given and given[name] != own[name] and _part(name) is not None
    ]
    kinds = {"missing": missing, "not in the model": too_many, "of other sizes": sizes}
    lines = [f"  {kind}: {_listed(found)}" for kind, found in kinds.items() if found]
    if lines:
        first = f"these are tensors of other gates than this {type(module).__name__} has; none was loaded"
        advice = (
            "gate the model as that of the checkpoint was: the same model, widths, skip and separate_norms. To load "
            "the other tensors alone, leave out those with channel_gate or gated in their names, with strict=False"
        )
        raise CheckpointError("\n".join([first, *lines, advice]))


def _listed(found: list[str]) -> str:
    more = len(found) - _SHOWN
    return ", ".join(found[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _part(name: str) -> str | None:
    """Return the gate, or the norm of the gated pass, that a tensor is of."""
    found = _GATE.match(name) or _NORM.match(name)
    return None if found is None else found.group()


def _parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(part for name in names if (part := _part(name)) is not None))


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))
