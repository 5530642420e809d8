"""Other processes: those of a run say which of them is lost, and end; any other cannot write into the same folder."""

import errno
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from threading import Event, Thread

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

from slimmable._atomic import PARTIAL
from slimmable._distributed import in_group
from slimmable.cli.config import say
from slimmable.cli.faults import explained_fault
from slimmable.errors import CheckpointError, SlimmableError, UsageError

LOCK = ".lock"
_held: set[str] = set()  # folders of this process, which the system would let it lock again
_PAUSE = 0.5  # seconds between two signs of life of a process
_SILENCE = 10.0  # seconds without one after which a process is lost; torchrun kills the others after 30
_LONGEST = timedelta(days=7)  # to wait for the others, since those that are lost are noticed by their silence
_LEFT = "left"  # the last sign of life; the others are numbers


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, unless they have a group, and yield the device of this one.

    Raises: SlimmableError: if another one fails or ends inside the block; it says which and why.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or in_group():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, world = _met()
    name = f"slimmable/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_runs)}"
    backend, own_keys = "nccl" if device.type == "cuda" else "gloo", PrefixStore(f"{name}/group", store)
    dist.init_process_group(backend, store=own_keys, rank=rank, world_size=world, timeout=_LONGEST)
    own = _Signs(rank, world, name)
    _signs.append(own)
    try:
        yield device
        own.end()
        dist.destroy_process_group()  # not after an error, when it might wait for the others
    except BaseException as error:
        fault = explained_fault(error)
        own.end(fault or f"{type(error).__name__} {error}")
        if fault is None or isinstance(error, SlimmableError):
            raise
        raise SlimmableError(fault) from error
    finally:
        _signs.clear()


def lost_process() -> str | None:
    """Return which process of the run is lost and why, after communication has failed, or None if all are there."""
    return _signs[0].search() if _signs else None


class _Signs:
    """Signs of life of this process, which a thread gives to the next one while it watches for those of the last.

    Communication by gloo fails when a process is gone, though not in all others, and that by NCCL waits. So the
    processes also talk through the store by which they met. Whoever finds one lost tells all; one that does not end by
    itself then, since it waits in communication, is ended.
    """

    def __init__(self, rank: int, count: int, name: str) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SILENCE))
        self._store = PrefixStore(name, store)
        self._own, self._watched = str(rank), str((rank - 1) % count)
        self._ended = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self, fault: str = "") -> None:
        """Stop, and tell the others if this is because of a fault."""
        self._ended.set()
        self._thread.join(_SILENCE)
        key, how = ("lost", f"failed: {fault.splitlines()[0]}") if fault else ("left", "has ended")
        with suppress(RuntimeError):  # the store is in another process
            self._store.compare_set(key, "", f"process {self._own} {how}")
            self._store.set(self._own, _LEFT)
        if fault and self._own == "0":
            time.sleep(2 * _PAUSE)  # without torchrun, this process has the store, in which the others now look

    def search(self) -> str | None:
        """Return which process is lost, as the one that watches it will soon say, or else which has left."""
        end = time.monotonic() + 1.5 * _SILENCE
        while (lost := self._read("lost")) is None and time.monotonic() < end:
            time.sleep(0.1)
        return lost or self._read("left")

    def _read(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:
            return "process 0 or torchrun, by which the processes met, has ended"

    def _run(self) -> None:
        last, unchanged = self._read(self._watched), 0
        for beat in count():
            if self._ended.wait(_PAUSE):
                return
            with suppress(RuntimeError):
                self._store.set(self._own, str(beat))
                last, before = self._read(self._watched), last
                unchanged = unchanged + 1 if last == before != _LEFT else 0
                if unchanged * _PAUSE > _SILENCE:
                    self._store.compare_set("lost", "", f"process {self._watched} was killed or hangs")
            if self._read("lost") and not self._ended.wait(_SILENCE) and (found := self._read("lost")):
                print(f"slimmable: {found}", file=sys.stderr, flush=True)
                os._exit(1)


_met = cache(lambda: next(rendezvous("env://")))  # the store for all runs, the rank of this process, and the number
_runs = count()  # of this process, with one set of keys in the store for each
_signs: list[_Signs] = []  # of the run that this process takes part in


# -- the lock on a folder of results
@contextmanager
def locked(folder: Path, new: bool = False) -> Iterator[None]:
    """Hold a folder, made if necessary, and remove what a killed process left half-written; a new one must be empty.

    Raises: UsageError: if another process holds it, or a new one has files. CheckpointError: if it cannot be written.
    """
    path, place = folder / LOCK, os.path.realpath(folder)
    if place in _held:
        raise UsageError(f"{folder} is in use by this process; wait until it is done, or choose another")
    made = [each for each in (folder, *folder.parents) if not os.path.exists(each)]  # pathlib fails for long names
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise CheckpointError(f"cannot write into the folder {folder} ({error}); choose another") from error
    with file:
        try:
            _take(file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UsageError(f"{folder} is in use by {holder}; wait until it ends, or choose another") from error
            say(f"{folder} is on a file system without locks; make sure that no other process writes into it")
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise UsageError(f"{folder} was in use until now; try again")  # the other has just removed this file
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        _held.add(place)
        try:
            for rest in folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(rest, ignore_errors=True)
            if new and any(each.name != LOCK for each in folder.iterdir()):
                raise UsageError(f"{folder} exists; add --resume to continue that run, or choose another with --output")
            yield
        finally:
            _held.discard(place)
            with suppress(OSError):  # while it is held, or it could be another's; Windows keeps open files
                path.unlink()
                for each in made:
                    each.rmdir()  # unless it has files


def _take(handle: int) -> None:  # what the system drops when the process ends, however it ends
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 2**20, os.SEEK_SET)  # what is locked cannot be read, so a byte behind the text
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by processes that read images
