"""Exceptions of the library; each is also a subclass of the matching built-in exception."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "CheckpointError", "ConversionError", "DataError", "DivergedError", "InputError", "MissingPackageError",
    "RuleError", "SlimmableError", "TraceError", "UsageError", "WidthError",
]  # fmt: skip


class SlimmableError(Exception):
    """Base of every error that `slimmable` raises on purpose."""


class WidthError(SlimmableError, ValueError):
    """An invalid width or list of widths."""


class ConversionError(SlimmableError, RuntimeError):
    """A model that cannot be converted, or that was changed after its conversion."""


class TraceError(ConversionError):
    """A model whose forward cannot be traced; the message names the operation and the module; `module` is its path."""

    module: str = ""  # the model itself


class RuleError(ConversionError):
    """A rule of an operation, registered by `slimmable.register_rule`, that fails; the message names it."""


class CheckpointError(SlimmableError, RuntimeError):
    """A checkpoint that does not belong to the model, or a file that cannot be read or written."""


class DataError(SlimmableError, ValueError):
    """Unusable input data: an empty image folder, a tensor of the wrong shape."""


class InputError(DataError, RuntimeError):
    """A tensor that a layer cannot read at its active width."""


class UsageError(SlimmableError, ValueError):
    """A call that makes no sense: an unknown name, a number out of range, steps in the wrong order."""


class MissingPackageError(SlimmableError, ImportError):
    """A package that a function or command needs is not installed."""


class DivergedError(SlimmableError, ArithmeticError):
    """Training whose loss or weights became infinite or NaN."""


@contextmanager
def explained(what: str, advice: str = "", kind: type[SlimmableError] = SlimmableError) -> Iterator[None]:
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
        raise kind(f"{what} ({type(cause).__name__}: {first}){advice}") from error


def require(module: str, package: str, extra: str | None = "cli") -> Any:
    """Import and return `module`, or raise MissingPackageError that says how to install `package`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        way = f"pip install {package}" if extra is None else f'pip install ".[{extra}]" (in a clone of slimmable)'
        raise MissingPackageError(f"this needs {package} ({error}); install it with: {way}") from error
