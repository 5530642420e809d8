"""Changes to bytes and to JSON data, which the readers' inputs are made with."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_DEEP = "\0 nested "  # stands for brackets nested so deeply that `json.dumps` would give up
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**9, 10**12, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e-320, 1e308,
    float("nan"), float("inf"), -float("inf"), "", "weight", "relu", "__class__", "a\0b", "../../ran", "/etc/passwd",
    "x" * 300, "x" * 100_000, "\ud800", "nan", "1.0", [], {}, [[1]], [[]], {"a": 1}, {"": {}}, [None], [1.5, "a"],
    [10**6] * 4, [1] * 10_000, _DEEP + "100", _DEEP + "100000",
]  # fmt: skip


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Return the bytes with a few of them flipped, cut out, repeated, zeroed, put in or cut off."""
    for _ in range(draw.choice([1, 1, 1, 2, 5, 50])):
        at = draw.randrange(len(data) + 1)
        if draw.random() < 0.5:  # headers are at the beginning
            at = min(at, draw.choice([8, 64, 1024]))
        length = min(draw.choice([1, 1, 2, 8, 100, 10_000]), len(data) - at)
        part = data[at : at + length]
        other = draw.choice([b"", bytes(length), part + part, draw.randbytes(length), part[::-1], b"\xff" * length])
        data = data[:at] + other + data[at + length :]
        if draw.random() < 0.1:
            data = data[:at]
    return data


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything inside nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(draw: random.Random, value: Any) -> tuple[Any, str]:
    """Return a copy of JSON data with something else in one place, and which."""
    value = copy.deepcopy(value)
    found: dict[int, list[tuple[Any, ...]]] = {}
    for each in places(value):
        found.setdefault(len(each), []).append(each)
    if not found:
        return draw.choice(JUNK), "all"
    path = draw.choice(found[draw.choice(sorted(found))])  # by depth first: there are few at the top
    *above, last = path
    holder = value
    for key in above:
        holder = holder[key]
    how = draw.choice(["junk", "junk", "junk", "gone", "twice", "moved", "scaled"])
    if how == "gone":
        del holder[last]
    elif how == "twice" and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(holder[last]))
    elif how == "moved":
        other = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], holder[last]
    elif how == "scaled" and type(holder[last]) in (int, float):
        holder[last] = draw.choice([holder[last] + 1, -holder[last], holder[last] * 1000, float(holder[last])])
    else:
        holder[last] = copy.deepcopy(draw.choice(JUNK))
    return value, f"{how} at {'/'.join(map(str, path))}"


def text(value: Any) -> str:
    """Return JSON data as text, in which "nested deeply" is nested deeply."""
    written = json.dumps(value)
    for depth in (100, 100_000):
        written = written.replace(json.dumps(f"{_DEEP}{depth}"), "[" * depth + "]" * depth)
    return written
