"""The processes of a run: when one of them fails or is killed, the others say which, and end."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from slimmable.cli.faults import explained_fault
from slimmable.errors import SlimmableError

_PAUSE = 0.5  # seconds between two signs of life of a process
_SILENCE = 15.0  # seconds without one after which a process is lost, well before torchrun kills the others
_ALARM = 4.0  # the same when communication has failed
_LEFT = "left"  # the last sign of life; the others are numbers


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, if any, and yield the device of this one.

    Raises: SlimmableError: if another one fails or ends inside the block; it says which and why.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    own = _Signs(dist.get_rank(), dist.get_world_size())
    _signs.append(own)
    try:
        yield device
        own.end()
        dist.destroy_process_group()  # not after an error, when it might wait for the others
    except BaseException as error:
        fault = explained_fault(error)
        own.end(error)
        if fault is None or isinstance(error, SlimmableError):
            raise
        raise SlimmableError(fault) from error
    finally:
        _signs.remove(own)


def lost_process() -> str | None:
    """Return which process of the run is lost and why, after communication has failed, or None if all are there."""
    for own in _signs:
        return own.search()
    return None


class _Signs:
    """Signs of life of this process, which a thread gives to the next one while it watches for those of the last.

    Communication by gloo fails when a process is gone, though not in all others, and that by NCCL waits. So the
    processes also talk through the store by which they met. Whoever finds one lost tells all; one that does not end by
    itself then, since it waits in communication, is ended.
    """

    def __init__(self, rank: int, count: int) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_ALARM))
        self._store = PrefixStore(f"slimmable/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self._own, self._watched = str(rank), str((rank - 1) % count)
        self._ended = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self, error: BaseException | None = None) -> None:
        """Stop, and tell the others if this is because of an error."""
        self._ended.set()
        self._thread.join(_ALARM)
        with suppress(RuntimeError):  # the store is in another process
            if error is not None:
                error = error.__cause__ if isinstance(error.__cause__, SlimmableError) else error
                text, kind = str(error).partition("\n")[0], type(error).__name__
                reason = text if isinstance(error, SlimmableError) else f"{kind} {text}".strip()
                self._store.compare_set("lost", "", f"process {self._own} failed: {reason}")
            self._store.set(self._own, _LEFT)
        if error is not None and self._own == "0":
            time.sleep(2 * _PAUSE)  # without torchrun, this process has the store, in which the others now look

    def search(self) -> str | None:
        """Alarm all processes, and return what they find within the time in which a living one gives a sign."""
        with suppress(RuntimeError):
            self._store.set("alarm", "")
        end = time.monotonic() + 2 * _ALARM
        while (found := self._found()) is None and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def _found(self) -> str | None:
        try:
            return self._store.get("lost").decode() if self._store.check(["lost"]) else None
        except RuntimeError:
            return "process 0 or torchrun, by which the processes met, has ended"

    def _run(self) -> None:
        beats, last, unchanged = 0, "", 0
        while not self._ended.wait(_PAUSE):
            beats += 1
            with suppress(RuntimeError):
                self._store.set(self._own, str(beats))
                alarm = self._store.check(["alarm"])
                seen = self._store.get(self._watched).decode() if self._store.check([self._watched]) else last
                unchanged = 0 if seen != last or (seen == _LEFT and not alarm) else unchanged + 1
                last = seen
                if unchanged * _PAUSE > (_ALARM if alarm else _SILENCE):
                    how = "has ended" if seen == _LEFT else "was killed or hangs"
                    self._store.compare_set("lost", "", f"process {self._watched} {how}")
            if self._found() and not self._ended.wait(2 * _ALARM) and (found := self._found()):
                print(f"slimmable: {found}", file=sys.stderr, flush=True)
                os._exit(1)


_signs: list[_Signs] = []  # of the run that this process takes part in
