"""Atomic writes: no interruption, full disk or other writer destroys what was there before; tensors with a checksum."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimmable.errors import CheckpointError

T = TypeVar("T")
PARTIAL = ".partial-"  # how the names of temporary folders begin; only a killed process leaves one
_ENTRY = "slimmable"  # the one entry of a file's metadata, all texts as JSON: several come in a random order


def write_aside(path: Path, write: Callable[[Path], T]) -> T:
    """Let `write` make a file aside, flush it to disk, and only then replace `path`; return what `write` returned."""
    if not path.name:
        raise CheckpointError(f"{path} is a folder; pass the path of a file")
    try:
        with _moved_up(path.parent) as aside:
            return write(aside / path.name)
    except (OSError, SafetensorError) as error:
        kept = "; the previous one is unharmed" if os.path.exists(path) else ""
        raise CheckpointError(f"cannot write {path} ({error}){kept}") from error


@contextmanager
def filled_aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `folder`, made if necessary, and move its files up when all are done."""
    made = not os.path.exists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _moved_up(folder) as aside:
            yield aside
    except OSError as error:
        raise CheckpointError(f"cannot write into the folder {folder} ({error})") from error
    finally:
        if made:
            with suppress(OSError):  # it has files
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


# -- tensors
def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write strided tensors and texts to a safetensors file, which is the same byte for byte if they are the same."""
    plain = plain_tensors(tensors)
    texts = json.dumps({**metadata, "checksum": checksum(plain, metadata)}, sort_keys=True)
    write_aside(path, lambda aside: save_file(plain, aside, {_ENTRY: texts}))


def read_tensors(path: Path, form: str, made_by: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and tensors of a safetensors file; refuse it if its metadata do not name this format.

    The tensors are parts of the file as the system maps it, which takes no memory; copy what is to be kept.
    """
    if not os.path.isfile(path):  # also of a name that is no path
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {name: str(text) for name, text in json.loads((file.metadata() or {}).get(_ENTRY, "{}")).items()}
            if metadata.get("format") != form:
                raise CheckpointError(f"{path} was not written by {made_by}, or by another version of it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read; it is damaged, or not a safetensors file ({error})") from error
    if metadata.pop("checksum", None) != checksum(tensors, metadata):
        raise CheckpointError(f"{path} is damaged or was changed: its checksum is missing or that of other contents")
    return metadata, tensors


def plain_tensors(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors on the CPU and contiguous; a copy where they are not, or share their memory."""
    found, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        kind = type(tensor.detach() if isinstance(tensor, Tensor) else tensor)
        unknown = kind is Tensor and tensor.dtype in (torch.complex32, torch.complex128)  # to safetensors
        if kind is not Tensor or unknown or tensor.is_meta or tensor.layout != torch.strided:
            said = kind.__name__ if kind is not Tensor else f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
            raise CheckpointError(f"{name} is {said}, not a plain tensor with values, and cannot be saved")
        plain = tensor.detach().to("cpu").contiguous()
        memory = plain.untyped_storage()
        alone = memory.nbytes() == plain.nbytes and memory.data_ptr() not in seen
        found[name] = plain if alone else plain.clone(memory_format=torch.contiguous_format)
        seen.add(memory.data_ptr())
    return found


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of all texts and tensors with their names, types and shapes, in the order of their names."""
    found = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
