"""Matching names of modules with patterns."""

from __future__ import annotations

from fnmatch import fnmatchcase


def is_under(name: str, pattern: str) -> bool:
    """Tell whether a module's name, or that of a module above it, matches a pattern of `fnmatch`.

    >>> is_under("layer1.0.conv1", "layer1*"), is_under("layer1.0.conv1", "layer1"), is_under("layer10", "layer1")
    (True, True, False)
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: count + 1]), pattern) for count in range(len(parts)))
