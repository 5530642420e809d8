"""Programs of `torch.export`: one of one width, or one for each of several in a file that has their weights once."""

import hashlib
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from slimmable._checks import check_path
from slimmable._inputs import Inputs, example_of, named_tensors, output_tensors, tensors
from slimmable._modules import swapped, trust_distributions
from slimmable._widths import width_index
from slimmable.errors import CheckpointError, SlimmableError, explained

TOLERANCE = 1e-5  # of the largest output
Program = Callable[..., Any]
_INDEX, _WEIGHTS = "widths.json", "weights.pt"
Names = tuple[Sequence[str], Sequence[str]]  # of inputs and outputs


def batch_of(model: nn.Module, example_inputs: Any, size: int) -> Inputs:
    """Return `size` of the examples, in turn, on the CPU, with random numbers instead of zeros, which hide differences.

    A batch axis is a first one as long as that of the first tensor.
    """
    example, generator = example_of(model, example_inputs), torch.Generator().manual_seed(0)
    length = next((len(tensor) for tensor in tensors(example) if tensor.ndim), 0)

    def resized(tensor: Tensor) -> Tensor:
        if length and tensor.ndim and len(tensor) == length:
            tensor = tensor[torch.arange(size, device="cpu") % length]
        if tensor.is_floating_point() and not tensor.any():
            return torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype, device="cpu")
        return tensor.cpu()

    args, kwargs = tree_map_only(Tensor, resized, example)
    return Inputs(*args, **kwargs)


def trace(model: nn.Module, example_inputs: Any) -> ExportedProgram:
    """Return `model`, in evaluation mode, as a program for any number of examples like these, or else for one."""
    one, two = (batch_of(model, example_inputs, size) for size in (1, 2))
    shapes, batch = ShapesCollection(), Dim("batch")  # type: ignore[no-untyped-call]
    for single, pair in zip(tensors((one.args, one.kwargs)), tensors((two.args, two.kwargs)), strict=True):
        if single.shape != pair.shape:
            shapes[pair] = {0: batch}
    saved = swapped([(vars(each), "_non_persistent_buffers_set", set()) for each in model.modules()])  # to be whole
    with torch.no_grad(), quiet(), saved, explained(f"torch.export cannot follow {type(model).__name__}.forward"):
        model(*one.args, **one.kwargs)  # so that caches hold numbers, not what stands for them while it is recorded
        right = False
        with suppress(Exception):  # many kinds of errors tell of a forward that depends on the number of images
            dynamic = shapes.dynamic_shapes(model, two.args, two.kwargs)  # type: ignore[no-untyped-call]
            program = torch.export.export(model, two.args, two.kwargs, dynamic_shapes=dynamic)
            right = difference(model, program.module(), one) <= TOLERANCE
        if not right:
            program = torch.export.export(model, one.args, one.kwargs)
    program._example_inputs = None  # like the stack traces, which name local paths, it would be stored in the file
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def names_of(model: nn.Module, program: ExportedProgram, example: Inputs) -> Names:
    """Return names for a program's inputs and outputs, as `export` says; of several, such as `logits`, `output.0`."""
    inputs = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]  # others are constants
    if not example.kwargs and [tensor.ndim for tensor in tensors(example.args)] == [4]:
        inputs = ["images"]
    with torch.no_grad():
        found = [name for name, _ in named_tensors(model(*example.args, **example.kwargs))]
    plain = [name if name.isidentifier() and name not in inputs else f"output.{name}".rstrip(".") for name in found]
    return inputs, plain


def save_pt2(program: ExportedProgram, path: Path) -> Program:
    """Write `program` for `torch.export.load`, and return it as loaded from the file."""
    with quiet():
        torch.export.save(program, file := io.BytesIO())
        path.write_bytes(file.getbuffer())
        return torch.export.load(path).module()


@torch.no_grad()
def difference(model: nn.Module, program: Program, *batches: Any) -> float:
    """Return the largest difference between the outputs of both, of equal shapes, relative to the model's largest."""
    found = []
    for batch in batches:
        args, kwargs = example_of(model, batch)
        expected = output_tensors(model(*args, **kwargs))
        with explained("the written program does not run"):
            outputs = output_tensors(program(*args, **kwargs))
        if [output.shape for output in outputs] != [output.shape for output in expected]:
            raise SlimmableError(f"the outputs of the written program have shapes other than {type(model).__name__}'s")
        pairs = ((out.double(), got.double()) for out, got in zip(expected, outputs, strict=True))
        found += [(got - out).abs().max() / out.abs().max().clamp(min=1e-12) for out, got in pairs]
    return float(torch.stack(found).max())  # NaN if any is


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and log messages, which are meant for developers of torch, and checks of distributions."""
    with warnings.catch_warnings(), ExitStack() as after:
        warnings.simplefilter("ignore")
        after.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        trust_distributions(after)
        yield


class Programs:
    """A file with the programs of all its `widths`, as `slimmable.export` writes it, and one set of weights for them.

    `programs(images, width=0.5)` returns what the model does at this width. Load only files that you trust.
    Raises: CheckpointError: if there is no such file. WidthError: of a call at another width.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> path = Path(tempfile.mkdtemp(), "net.pt2")
    >>> file = slimmable.export(slim, path, example_inputs=torch.zeros(2, 4))
    >>> slimmable.deploy.Programs(path)(torch.zeros(3, 4), width=0.5).shape
    torch.Size([3, 2])
    """

    def __init__(self, path: str | Path) -> None:
        check_path("Programs", path=path)
        what = f"{path} cannot be read as a .pt2 file of all widths, which slimmable.export writes"
        with explained(what, kind=CheckpointError), quiet(), zipfile.ZipFile(path) as file:
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


def save_programs(programs: Sequence[ExportedProgram], widths: Sequence[float], path: Path) -> Programs:
    """Write the programs of these widths, whose weights are taken out of them, into one file; return it as loaded."""
    weights, keys, names = dict[str, Tensor](), dict[object, str](), list[dict[str, str]]()
    with zipfile.ZipFile(path, "w") as file, quiet():
        for at, program in enumerate(programs):
            names.append({})
            for held in (program.state_dict, program.constants):
                for name, tensor in [*held.items()]:
                    if isinstance(tensor, Tensor):
                        numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                        known = tensor.dtype, tensor.shape, hashlib.sha256(numbers.data).digest()
                        key = keys.setdefault(known, name if name not in weights else f"{name}@{at}")
                        weights.setdefault(key, tensor.detach().contiguous())
                        names[-1][name], empty = key, tensor.new_empty(0)
                        held[name] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
            torch.export.save(program, buffer := io.BytesIO())
            file.writestr(f"{at}.pt2", buffer.getbuffer())
        torch.save(weights, buffer := io.BytesIO())
        file.writestr(_WEIGHTS, buffer.getbuffer())
        file.writestr(_INDEX, json.dumps({"widths": list(widths), "names": names}))
    return Programs(path)
