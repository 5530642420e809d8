"""Entry point of the program `slimmable`, also run by `python -m slimmable`."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from slimmable.cli.faults import exit_code, explained_fault, on_signals, stop


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for unusable input and a machine that does not do what it should.

    It is 130, 143 or 129 if the program was asked to stop by Ctrl-C, SIGTERM or SIGHUP.

    >>> main(["plan", "resnet1"])
    2
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with on_signals(stop):
            from slimmable.cli.commands import parse, run  # here, so that what happens meanwhile is answered, too

            command, given = parse(arguments)
            return run(command, given)
    except KeyboardInterrupt as error:
        with on_signals(lambda number: None):
            return _end(arguments, "interrupted", exit_code(error))
    except BrokenPipeError:  # as in `slimmable plan NAME | head`
        return 1
    except Exception as error:
        if (fault := explained_fault(error)) is None:
            raise
        return _end(arguments, fault, 2)
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if they were closed from the start
            try:
                stream.flush()
            except (OSError, ValueError):  # nobody reads it any more, so drop the rest, or Python would fail at its end
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def program() -> NoReturn:
    """Run `main` as a program of its own."""
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of Python takes a while, and would show a traceback
    sys.exit(code)


def _end(arguments: Sequence[str], message: str, code: int) -> int:
    first = str(arguments[0]) if isinstance(arguments, (list, tuple)) and arguments else ""
    with suppress(OSError):  # the terminal may be gone
        print(f"slimmable{f' {first:.80}' if first.isalpha() else ''}: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    program()
