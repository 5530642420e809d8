"""Atomic writes: no interruption, full disk or other writer destroys what was there before."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from slimmable.errors import CheckpointError

PARTIAL = ".partial-"  # how the names of temporary folders begin; only a killed process leaves one


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file of this name in a temporary folder, flush it to disk, and only then replace `path`."""
    if not path.name:
        raise CheckpointError(f"{path} is a folder; pass the path of a file")
    try:
        with _moved_up(path.parent) as aside:
            write(aside / path.name)
    except (OSError, SafetensorError) as error:
        kept = "; the previous one is unharmed" if os.path.exists(path) else ""
        raise CheckpointError(f"cannot write {path} ({error}){kept}") from error


def fill_aside(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` make files in a temporary folder inside `folder`, and move them up when all are done."""
    made = not os.path.exists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _moved_up(folder) as aside:
            fill(aside)
        made = False
    except OSError as error:
        raise CheckpointError(f"cannot write into the folder {folder} ({error})") from error
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _moved_up(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `folder`; then flush its files to disk and move them into `folder`."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder, ignore_cleanup_errors=True) as name:
        aside = Path(name)
        empty = aside / "empty"
        empty.touch()
        mode = empty.stat().st_mode & 0o777  # the default for new files; safetensors makes private ones
        empty.unlink()
        yield aside
        files = list(aside.iterdir())
        for file in files:
            file.chmod(mode)
            _sync(file)
        for file in files:
            file.replace(folder / file.name)
    if os.name == "posix":
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
