"""Entry point of the program `slimmable`, also run by `python -m slimmable`."""

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from slimmable.cli.faults import GO_ON, exit_code, explained_fault, flush_or_drop, on_signals, stop


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
        return _end(arguments, fault.replace(GO_ON, "then start it again"), 2)
    finally:
        flush_or_drop()


def program() -> NoReturn:
    """Run `main` as a program of its own."""
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of Python takes a while, and would show a traceback
    sys.exit(code)


def _end(arguments: Sequence[str], message: str, code: int) -> int:
    with suppress(OSError):  # the terminal may be gone
        print(f"{' '.join(['slimmable', *arguments[:1]])}: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    program()
