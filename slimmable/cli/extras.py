"""Optional packages, with an error that says how to install them, and lines on the terminal."""

from __future__ import annotations

import importlib
from typing import Any

from slimmable.errors import SlimmableError


class MissingPackageError(SlimmableError, ImportError):
    """A package that a command needs is not installed."""


def require(module: str, package: str, extra: str | None = "cli") -> Any:
    """Import and return `module`, or raise MissingPackageError that names the extra, if any, that installs `package`.

    >>> require("json", "python").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        way = f"pip install {package}" if extra is None else f'pip install ".[{extra}]" (in a clone of slimmable)'
        raise MissingPackageError(
            f"this command needs {package}, which cannot be imported ({error}). Install it with: {way}"
        ) from error


def say(text: str) -> None:
    """Print a line immediately, even into a pipe."""
    print(text, flush=True)
