"""Safetensors files with a checksum, which are the same byte for byte if their contents are the same."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimmable._atomic import write_aside
from slimmable.errors import CheckpointError


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write strided tensors and texts to one file, or raise CheckpointError and leave an earlier one as it was."""
    plain = _plain(tensors)
    described = {**metadata, "checksum": _checksum(plain, metadata)}

    def write(aside: Path) -> None:
        save_file(plain, aside, described)
        with aside.open("r+b") as file:  # put the texts in order, which safetensors writes in a random one
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
            if len(ordered) == length:
                file.seek(8)
                file.write(ordered)

    write_aside(path, write)


def read_tensors(path: Path, form: str, made_by: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and tensors of a safetensors file; refuse it if its metadata do not name this format.

    The tensors are parts of the file as the system maps it, which takes no memory; copy what is to be kept.
    """
    if not os.path.isfile(path):  # also of a name that is no path
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != form:
                raise CheckpointError(f"{path} was not written by {made_by}, or by another version of it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read; it is damaged, or not a safetensors file ({error})") from error
    if metadata.pop("checksum", None) != _checksum(tensors, metadata):
        raise CheckpointError(f"{path} is damaged or was changed: its checksum is missing or that of other contents")
    return metadata, tensors


def _plain(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors on the CPU and contiguous; a copy where they are not, or share their memory."""
    found, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        kind = type(tensor.detach() if isinstance(tensor, Tensor) else tensor)
        if kind is not Tensor or tensor.is_meta or tensor.layout != torch.strided:
            said = kind.__name__ if kind is not Tensor else f"a tensor on {tensor.device}"
            raise CheckpointError(f"{name} is {said}, not a plain tensor with values, and cannot be saved")
        plain = tensor.detach().to("cpu").contiguous()
        memory = plain.untyped_storage()
        alone = memory.nbytes() == plain.nbytes and memory.data_ptr() not in seen
        found[name] = plain if alone else plain.clone(memory_format=torch.contiguous_format)
        seen.add(memory.data_ptr())
    return found


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of all texts and tensors with their names, types and shapes, in the order of their names."""
    found = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
