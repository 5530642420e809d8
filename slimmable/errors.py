"""Errors of the library; each one also is the built-in error that older ``except`` clauses expect."""

__all__ = [
    "CheckpointError",
    "ConversionError",
    "DataError",
    "DivergedError",
    "SlimmableError",
    "TraceError",
    "UsageError",
    "WidthError",
]


class SlimmableError(Exception):
    """Base of every error that `slimmable` raises on purpose."""


class WidthError(SlimmableError, ValueError):
    """A width, or a list of widths, that cannot be used."""


class ConversionError(SlimmableError, RuntimeError):
    """A model that cannot be converted, or that was changed after its conversion."""


class TraceError(ConversionError):
    """A model whose forward cannot be traced; the message names the operation and the module.

    `module` is the path of the module, "" for the model itself.
    """

    module: str = ""


class CheckpointError(SlimmableError, RuntimeError):
    """A checkpoint that does not belong to the model, or a file that cannot be read or written."""


class DataError(SlimmableError, ValueError):
    """Input data that cannot be used: an empty image folder, a tensor of the wrong shape."""


class UsageError(SlimmableError, ValueError):
    """A call without meaning: an unknown name, a number outside its range, steps in the wrong order."""


class DivergedError(SlimmableError, ArithmeticError):
    """A training whose loss or weights are infinite or not a number."""
