"""Run a function in a process of its own, with a limit of time and of memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def guarded(function: Callable[[str], dict[str, Any]], name: str, seconds: float, gib: float) -> dict[str, Any]:
    """Return what `function(name)` returns, or {"error": ...} if it raises, takes too long or needs too much."""
    context = multiprocessing.get_context("fork")  # what is imported is there at once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, name, sender), daemon=True)
    process.start()
    sender.close()
    start = time.monotonic()
    result: dict[str, Any] | None = None
    while result is None:
        if receiver.poll(0.2):
            try:
                result = receiver.recv()
            except EOFError:
                process.join()
                result = {"error": f"the process ended with {process.exitcode}"}
        elif time.monotonic() - start > seconds:
            result = {"error": f"took more than {seconds:g} s"}
        elif _resident(process.pid) > gib * 2**30:
            result = {"error": f"needs more than {gib:g} GiB"}
    process.kill()
    process.join()
    return result


def _call(function: Callable[[str], dict[str, Any]], name: str, sender: Connection) -> None:
    gc.freeze()  # what was there before needs no second look
    try:
        result = function(name)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    sender.send(result)
    sender.close()


def _resident(pid: int | None) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, IndexError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
