"""`slimmable.pretrain`: the command as a function of Python, with its options as keyword arguments."""

import inspect
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimmable.cli.commands import COMMANDS, parse, run
from slimmable.cli.config import flag, help_text, kind_of, suggestion
from slimmable.cli.faults import explained_fault
from slimmable.cli.report import Row, read_rows
from slimmable.errors import SlimmableError, UsageError

_OPTIONS = {each.name: each for options in COMMANDS["pretrain"] for each in fields(options)}


@dataclass(frozen=True)
class Run:
    """A finished run of `pretrain`; `str(run)` is the table of its report."""

    folder: Path

    @property
    def rows(self) -> list[Row]:
        """One row per width, or per network of a gated run: `width`, `parameters`, `macs` and `shares`, by probe."""
        return read_rows(self.folder)

    def load(self) -> nn.Module:
        """Return the trained backbone with all its widths, at the full one, in evaluation mode, on the CPU."""
        from slimmable.cli.export import run_source

        with _as_in_a_new_process():
            return run_source(self.folder).model

    def __str__(self) -> str:
        return (self.folder / "metrics.md").read_text()


def pretrain(**options: Any) -> Run:
    """Pre-train a slimmable network, evaluate every width, and fill the run folder, as `slimmable pretrain` does.

    The arguments are the options of the command, with underscores: those that take several values are sequences, those
    without a value True or False. The run is the command's, bit for bit. The caller's random numbers, default device
    and type, and signal handlers are as before. After Ctrl-C or another signal a checkpoint is written, and then the
    program gets the signal; `resume=True` continues. Under `torchrun`, all processes must call it. Where processes that
    read images are spawned, call it under `if __name__ == "__main__":`, or with `workers=0`.

    Raises: SlimmableError: where the command ends with exit code 2, in its words, with its names of the options.
        MissingPackageError: without the extra `cli`.

    >>> import tempfile
    >>> options = dict(method="simclr", num_images=16, batch_size=8, epochs=1, widths=(1.0, 0.5), device="cpu")
    >>> run = slimmable.pretrain(**options, workers=0, output=tempfile.mkdtemp(), quiet=True)
    >>> [row.width for row in run.rows]
    [1.0, 0.5]
    >>> features = run.load()(torch.zeros(2, 1, 24, 24))
    """
    words, unsaid = ["pretrain"], {}  # no word says None, False, or that there are none
    for name, value in options.items():
        if name not in _OPTIONS:
            raise UsageError(f"pretrain: there is no option {name}{suggestion(name, _OPTIONS)}")
        (one, several), default = kind_of(_OPTIONS[name]), _OPTIONS[name].default
        if value is default in (None, False) or (default == () and value in ((), [])):
            unsaid[name] = default
        elif several and isinstance(value, (tuple, list)):
            words += [flag(name), *map(str, value)]
        elif one in (str, Path) and not isinstance(value, (str, Path)):
            raise UsageError(f"pretrain: {flag(name)} must be a text, got {value!r:.80}")
        else:
            words.append(flag(name) if one is bool and value is True else f"{flag(name)}={value}")
    with _as_in_a_new_process():
        try:
            code = run("pretrain", parse(words)[1] | unsaid)
        except Exception as error:
            if (fault := explained_fault(error)) is None:
                raise
            kind = type(error) if isinstance(error, SlimmableError) else SlimmableError
            raise kind(f"pretrain: {fault}") from error
    if code:
        signal.raise_signal(code - 128)
        raise KeyboardInterrupt(code - 128)  # if the program ignores the signal
    return Run(Path(options.get("output", _OPTIONS["output"].default)))


@contextmanager
def _as_in_a_new_process() -> Iterator[None]:
    """Run the block with torch's default device, type and modes of a new process, and put back the caller's."""
    dtype, elsewhere = torch.get_default_dtype(), torch.get_default_device().type != "cpu"
    random = torch.random.fork_rng(range(torch.cuda.device_count()))
    with random, torch.inference_mode(False), torch.enable_grad(), torch.device("cpu") if elsewhere else nullcontext():
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


_MEANINGS = "".join(f"        {name}: {help_text(each)}\n" for name, each in _OPTIONS.items())
pretrain.__doc__ = (pretrain.__doc__ or "").replace("    Raises:", f"    Args:\n{_MEANINGS}\n    Raises:")
_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_SHOWN = [inspect.Parameter(own.name, _KEYWORD, default=own.default, annotation=own.type) for own in _OPTIONS.values()]
pretrain.__signature__ = inspect.Signature(_SHOWN, return_annotation=Run)  # type: ignore[attr-defined]
