"""What every command uses: a line on the terminal, and optional packages, whose absence is explained."""

from __future__ import annotations

import importlib
from typing import Any

from slimmable.errors import SlimmableError


class MissingPackageError(SlimmableError, ImportError):
    """A package that a command needs is not installed."""


def require(module: str, package: str, extra: str | None = "cli") -> Any:
    """Import and return `module`.

    Raises: MissingPackageError: if it is not installed; the message names the extra that installs `package`, if one
        does.

    >>> require("json", "python").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        way = f"pip install {package}" if extra is None else f'pip install ".[{extra}]" (in the clone of slimmable)'
        raise MissingPackageError(
            f"this command needs {package}, which cannot be imported ({error}). Install it with: {way}"
        ) from error


def say(text: str) -> None:
    """Print a line at once, also through a pipe."""
    print(text, flush=True)
