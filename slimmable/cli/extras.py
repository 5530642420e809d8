"""Optional packages, errors of other packages, and lines on the terminal."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slimmable.errors import SlimmableError


class MissingPackageError(SlimmableError, ImportError):
    """A package that a command needs is not installed."""


def require(module: str, package: str, extra: str | None = "cli") -> Any:
    """Import and return `module`, or raise MissingPackageError that says how to install `package`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        way = f"pip install {package}" if extra is None else f'pip install ".[{extra}]" (in a clone of slimmable)'
        raise MissingPackageError(
            f"this command needs {package}, which cannot be imported ({error}). Install it with: {way}"
        ) from error


@contextmanager
def explained(what: str, advice: str = "") -> Iterator[None]:
    """Raise an error of any kind, as other packages raise, as one that says `what`, its first cause, and `advice`."""
    try:
        yield
    except SlimmableError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = (str(cause).strip() or "no message").splitlines()[0][:300]
        raise SlimmableError(f"{what} ({type(cause).__name__}: {first}){advice}") from error


def say(text: str) -> None:
    """Print a line immediately, even into a pipe."""
    print(text, flush=True)
