"""What can end a command from outside: signals, and a machine without memory, room or the processes it had."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slimmable.errors import SlimmableError

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "alloc_failed", "size calculation overflowed")
_NO_ANSWER = ("gloo", "nccl", "pair closure")  # errors of communication between processes


@contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with the number of each signal that asks the program to stop; after `nohup`, SIGHUP does not."""
    mine = [] if threading.current_thread() is not threading.main_thread() else STOPPING
    mine = [each for each in mine if each == signal.SIGINT or signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, frame: handle(number)) for number in mine}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number: int) -> None:
    """End the program as Ctrl-C does, unless it ends already: after a lost process, torchrun signals those left."""
    if not _lost_contact(sys.exc_info()[1]):
        raise KeyboardInterrupt(number)


def _lost_contact(error: BaseException | None) -> bool:
    """Tell whether communication between processes has failed in this error, or in what caused it."""
    if isinstance(error, RuntimeError):
        text = str(error).lower()
        if type(error).__name__.startswith("Dist") or any(sign in text for sign in _NO_ANSWER):
            return True
    return error is not None and _lost_contact(error.__cause__)


def exit_code(error: KeyboardInterrupt) -> int:
    """Return what a shell expects of a program that a signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + int(error.args[0] if error.args else signal.SIGINT)


def explained_fault(error: BaseException) -> str | None:
    """Return what happened, in one line, if the error tells of the machine; None for any other, such as a mistake."""
    if isinstance(error, SlimmableError):
        return str(error)
    if not isinstance(error, (MemoryError, OSError, RuntimeError)):
        return None
    lower, lines = str(error).lower(), str(error).strip().splitlines() or [type(error).__name__]
    text = lines[-1 if "Original Traceback" in str(error) else 0].strip()[:300]  # that of a worker is in front
    if isinstance(error, MemoryError) or any(sign in lower for sign in _NO_MEMORY):
        return f"out of memory ({text}); a smaller --batch-size or --image-size, or fewer --workers, need less"
    if "dataloader worker" in lower or "pin memory thread" in lower:
        return f"a process that reads images ended ({text}); if memory was short, use fewer --workers"
    if _lost_contact(error):
        return f"another process of this run ended, or cannot be reached ({text})"
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more"
    return text if isinstance(error, OSError) else None
