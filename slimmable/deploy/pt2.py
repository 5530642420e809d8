"""All widths as programs of `torch.export` in one file: a program for each, and their weights once."""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from slimmable._checks import check_path
from slimmable._widths import width_index
from slimmable.deploy.programs import quiet
from slimmable.errors import CheckpointError, explained

_INDEX, _WEIGHTS = "widths.json", "weights.pt"


class Programs:
    """A file with the programs of all widths, as `slimmable.export` writes it; each call names its width.

    `programs(images, width=0.5)` returns what the model does at this width. `widths` are those of the file. All share
    one set of weights in memory. torch loads the programs: load only files that you trust.

    Raises: CheckpointError: if there is no such file. WidthError: of a call at another width.

    >>> import slimmable, tempfile
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> path = Path(tempfile.mkdtemp(), "net.pt2")
    >>> slimmable.export(slim, path, example_inputs=torch.zeros(2, 4))
    >>> slimmable.deploy.Programs(path)(torch.zeros(3, 4), width=0.5).shape
    torch.Size([3, 2])
    """

    def __init__(self, path: str | Path) -> None:
        check_path("Programs", path=path)
        what = f"{path} cannot be read as a .pt2 file of all widths, which slimmable.export writes"
        with explained(what, kind=CheckpointError), ExitStack() as after:
            after.enter_context(quiet())
            file = after.enter_context(zipfile.ZipFile(path))
            index = json.loads(file.read(_INDEX))
            weights: dict[str, Tensor] = torch.load(io.BytesIO(file.read(_WEIGHTS)), weights_only=True)
            self.widths: tuple[float, ...] = tuple(index["widths"])
            self._modules: list[nn.Module] = []
            for at, names in enumerate(index["names"]):
                program = torch.export.load(io.BytesIO(file.read(f"{at}.pt2")))
                for name, key in names.items():
                    held: Any = program.state_dict if name in program.state_dict else program.constants
                    was = held[name]
                    held[name] = nn.Parameter(weights[key], False) if isinstance(was, nn.Parameter) else weights[key]
                self._modules.append(program.module())

    def __call__(self, *args: Any, width: float = 1.0, **kwargs: Any) -> Any:
        """Return the outputs at one of `widths`."""
        return self._modules[width_index(width, self.widths)](*args, **kwargs)


def save_programs(programs: Sequence[ExportedProgram], widths: Sequence[float], path: Path) -> None:
    """Write the programs of these widths into one file for `Programs`, and take their weights out of them."""
    weights, keys, names = dict[str, Tensor](), dict[object, str](), list[dict[str, str]]()
    with zipfile.ZipFile(path, "w") as file, quiet():
        for at, program in enumerate(programs):
            names.append({})
            for held in (program.state_dict, program.constants):
                for name, tensor in [*held.items()]:
                    if isinstance(tensor, Tensor):
                        key = keys.setdefault(_digest(tensor), name if name not in weights else f"{name}@{at}")
                        weights.setdefault(key, tensor.detach().contiguous())
                        names[-1][name], empty = key, tensor.new_empty(0)
                        held[name] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
            torch.export.save(program, buffer := io.BytesIO())
            file.writestr(f"{at}.pt2", buffer.getbuffer())
        torch.save(weights, buffer := io.BytesIO())
        file.writestr(_WEIGHTS, buffer.getbuffer())
        file.writestr(_INDEX, json.dumps({"widths": list(widths), "names": names}))


def _digest(tensor: Tensor) -> tuple[object, ...]:
    numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tensor.dtype, tensor.shape, hashlib.sha256(numbers.data).digest()
