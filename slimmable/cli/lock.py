"""The lock on a folder of results: one process writes into it at a time, and others are told which one.

The operating system drops the lock when the process ends, however it ends; a file left behind holds nothing.
"""

import errno
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slimmable._atomic import PARTIAL
from slimmable.cli.config import say
from slimmable.errors import CheckpointError, UsageError

LOCK = ".lock"
_held: set[str] = set()  # folders of this process, which the system would let it lock again


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


def _take(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 2**20, os.SEEK_SET)  # what is locked cannot be read, so a byte behind the text
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by processes that read images
