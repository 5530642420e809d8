"""Options as fields of a dataclass, the one source of the parser, the checks and the tables in the docs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from math import inf
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from slimmable.errors import UsageError

_METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}
_JSON_TYPES: dict[type, tuple[type, ...]] = {float: (int, float), tuple: (list,)}


@dataclass(frozen=True)
class Range:
    """The numbers that an option accepts, and how a message describes them after "must be"."""

    text: str
    holds: Callable[[float], bool]


POSITIVE = Range("positive", lambda value: 0 < value < inf)
NOT_NEGATIVE = Range("0 or more", lambda value: 0 <= value < inf)
FRACTION = Range("in [0, 1]", lambda value: 0 <= value <= 1)


def at_least(least: int) -> Range:
    """Return the range of numbers from `least` up."""
    return Range(f"at least {least}", lambda value: value >= least)


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Sequence[str] = (),
    within: Range | None = None,
    group: str = "",
    shown: str = "",
    **parsing: Any,
) -> Any:
    """Return a dataclass field that is an option of a command.

    Without a default it is a positional argument, or with `required=True` a required option. It accepts `choices`, one
    or several depending on the field's type, or numbers `within` a range, and None if the type allows it. `group` is
    the heading above this option and those after it, `shown` the default in words, where its value does not say enough,
    and `parsing` holds further arguments for `ArgumentParser.add_argument`.
    """
    known = {"help": help, "choices": choices, "within": within, "group": group, "shown": shown, "parsing": parsing}
    return field(default=default, metadata=known)


def flag(name: str) -> str:
    """Return the option of a field.

    >>> flag("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add every option of the dataclass `settings`; an option that is not given is absent from the parsed arguments."""
    kinds: dict[str, Any] = get_type_hints(settings)
    group: argparse._ActionsContainer = parser
    for each in fields(settings):
        if each.metadata["group"]:
            group = parser.add_argument_group(each.metadata["group"])
        parsing = dict(each.metadata["parsing"])
        if kinds[each.name] is bool:
            parsing["action"] = "store_true"
        else:
            (kind,) = (part for part in _parts(kinds[each.name]) if part is not NoneType)
            several = get_origin(kind) is tuple
            if several and "action" not in parsing:
                parsing["nargs"] = "+"
            one = get_args(kind)[0] if several else kind
            parsing.setdefault("type", one)
            if each.metadata["choices"]:
                parsing["choices"] = each.metadata["choices"]
            else:
                parsing.setdefault("metavar", _METAVARS.get(one))
        positional = each.default is MISSING and not parsing.get("required")
        name = each.name if positional else flag(each.name)
        group.add_argument(name, default=argparse.SUPPRESS, help=help_text(each), **parsing)


def help_text(each: Field[Any]) -> str:
    """Return the help text of an option, with its range and default."""
    within, default = each.metadata["within"], each.metadata["shown"]
    if not default and each.default is not MISSING and each.default is not None and each.default is not False:
        default = " ".join(map(str, each.default)) if isinstance(each.default, tuple) else str(each.default)
    more = "; ".join(([within.text] if within else []) + ([f"default: {default}"] if default else []))
    return f"{each.metadata['help']} ({more})" if more else str(each.metadata["help"])


def check(settings: Any) -> None:
    """Raise UsageError if a value of a dataclass of options is not one of its choices, or outside its range."""
    for each in fields(settings):
        value, choices, within = getattr(settings, each.name), each.metadata["choices"], each.metadata["within"]
        for one in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
            if choices and one not in choices:
                raise UsageError(f"{flag(each.name)} cannot be {one}; choose from {', '.join(choices)}")
            if within and not within.holds(one):
                raise UsageError(f"{flag(each.name)} must be {within.text}, got {one}")


def fits(settings: type, name: str, value: object) -> bool:
    """Return whether a value read from JSON has the type of the field `name`."""
    kinds: dict[str, Any] = get_type_hints(settings)
    parts = [get_origin(part) or part for part in _parts(kinds[name])]
    return any(isinstance(value, _JSON_TYPES.get(part, (part,))) for part in parts)


def _parts(kind: Any) -> tuple[Any, ...]:
    """Return the types in a union, or the single type."""
    return (kind,) if get_origin(kind) is tuple else get_args(kind) or (kind,)
