"""Other processes: those of a run meet; any other cannot write into the same folder."""

import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from slimmable._atomic import PARTIAL
from slimmable._distributed import in_group
from slimmable.cli.config import say
from slimmable.errors import CheckpointError, UsageError, explained

LOCK = ".lock"
_LONGEST = timedelta(days=7)  # to wait for the others, as while the first evaluates; torchrun ends those left behind
_held: set[str] = set()  # folders of this process, which the system would let it lock again
_met = cache(lambda: next(rendezvous("env://")))  # the store for all runs, the rank of this process, and the number
_runs = count()  # of this process, with one set of keys in the store for each


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, unless they have a group, and yield the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or in_group():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, world = _met()
    keys = PrefixStore(f"slimmable/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_runs)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=keys, rank=rank, world_size=world, timeout=_LONGEST)
    yield device
    dist.destroy_process_group()  # not after an error, when it might wait for the others


# -- the lock on a folder of results
@contextmanager
def locked(folder: Path, new: bool = False) -> Iterator[None]:
    """Hold a folder, made if necessary, and remove what a killed process left half-written; a new one must be empty."""
    path, place = folder / LOCK, os.path.realpath(folder)
    if place in _held:
        raise UsageError(f"{folder} is in use by this process; wait until it is done, or choose another")
    made = [each for each in (folder, *folder.parents) if not os.path.exists(each)]  # pathlib fails for long names
    with explained(f"cannot write into the folder {folder}", "; choose another", CheckpointError):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            import fcntl  # which Windows lacks

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by what reads images
        except (OSError, ImportError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UsageError(f"{folder} is in use by {holder}; wait until it ends, or choose another") from error
            say(f"{folder} is on a system without locks; make sure that no other process writes into it")
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
