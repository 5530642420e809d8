"""`slimmable.export`: one width, or all in one file, for `torch.export.load`, an ONNX runtime or `slimmable.load`."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from slimmable._atomic import write_aside
from slimmable._checks import check_whole, checked
from slimmable._convert import copy_of, extract
from slimmable._inputs import Inputs
from slimmable._modules import in_eval_mode
from slimmable._profile import profile
from slimmable._width import at_width, widths_of
from slimmable._widths import check_widths
from slimmable.deploy.onnx import join
from slimmable.deploy.programs import (
    ONNX_PACKAGES,
    TOLERANCE,
    Program,
    batch_of,
    difference,
    load_onnx,
    names_of,
    save_onnx,
    save_pt2,
    to_onnx,
    trace,
)  # fmt: skip
from slimmable.deploy.pt2 import Programs, save_programs
from slimmable.errors import SlimmableError, UsageError, require
from slimmable.files.model import full_network, load, read, save

FORMATS = ("pt2", "onnx", "safetensors")


class Written(NamedTuple):
    """What is known of a file that was written."""

    off: float  # largest difference from the model's outputs, relative to the largest output
    any_batch: bool  # whether it takes any number of images, or only one per call


@checked
def export(
    model: nn.Module,
    path: str | Path,
    *,
    width: float | None = None,
    widths: Iterable[float] | None = None,
    example_inputs: Any = None,
) -> None:
    """Write a converted model as one file for other programs: all its widths, or a single one.

    The file is loaded again and run, and kept only if its outputs are those of the model in evaluation mode, within
    1e-5 of the largest. It takes any number of images, if the forward does.

    Args:
        model: a converted model; it is not changed.
        path: its suffix is the format. `.onnx`: for an ONNX runtime; with all widths, it has one more input, `width`,
            an int64 scalar: the position in the list of widths that stands in its metadata, as JSON, under
            `slimmable.widths`. The weights stand once, at full size; those of 2 GB or more in `<path>.data`. `.pt2`:
            with all widths, for `slimmable.deploy.Programs`; a single one for `torch.export.load`. `.safetensors`: for
            `slimmable.load`.
        width: a single width, as the plain network that `extract` gives.
        widths: those in the file, with 1.0 among them; by default, all that the model has.
        example_inputs: as for `slimify`; timm models need none. The inputs of a program have the names of the forward's
            parameters, a single one with four axes is `images`; a single output is `output`.

    Raises: UsageError: if the suffix is another one, or both `width` and `widths` are given. WidthError: if the model
        does not have a width. SlimmableError: if torch or onnxruntime cannot follow the model. MissingPackageError:
        without the extra `onnx`.

    >>> import numpy, onnxruntime, slimmable, tempfile
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> path = Path(tempfile.mkdtemp(), "net.onnx")
    >>> slimmable.export(slim, path, example_inputs=torch.zeros(2, 4))
    >>> session = onnxruntime.InferenceSession(path)
    >>> session.run(None, {"input": numpy.ones((3, 4), numpy.float32), "width": numpy.array(1)})[0].shape
    (3, 2)
    """
    write(model, Path(path), width, widths, example_inputs)


def write(
    model: nn.Module,
    path: Path,
    width: float | None = None,
    widths: Iterable[float] | None = None,
    example_inputs: Any = None,
    **saving: Any,
) -> Written:
    """Write a file as `export` does, and tell how far it is off; `saving` is for `slimmable.save`."""
    check_whole("export", model)
    kind, known = path.suffix[1:], widths_of(model)
    if kind not in FORMATS:
        raise UsageError(f"export: {path} must end in {', '.join(f'.{each}' for each in FORMATS)}, which is the format")
    if width is not None and widths is not None:
        raise UsageError(f"export: width={width!r} is a single one and widths={widths!r} are several; give one of both")
    chosen = known if widths is None else check_widths(widths)
    if kind == "safetensors" and width is None and chosen != known:
        raise UsageError(f"export: a .safetensors file holds all widths, {known}; leave out widths={chosen}")
    for package in ONNX_PACKAGES if kind == "onnx" else ():
        require(package, package, extra="onnx")
    if any(tensor.device.type != "cpu" for tensor in model.state_dict().values()):
        model = copy_of(model).cpu()
    network = model if width is None else extract(model, width)
    found = list[Written]()

    def fill(aside: Path) -> None:
        one, three = (_numbers(batch_of(network, example_inputs, size)) for size in (1, 3))
        if kind == "safetensors":
            save(network, aside, **saving)
            program, any_batch = _loaded(aside, network), True
        elif width is None:
            program, any_batch = _save_all(network, chosen, aside, three)
        else:
            traced = trace(network, three)
            names = names_of(network, traced, three)
            program = save_pt2(traced, aside) if kind == "pt2" else save_onnx(traced, aside, names)
            any_batch = _any_batch(traced)
        for each in chosen if width is None else (None,):
            with nullcontext() if each is None else at_width(network, each):
                run = program if each is None else partial(program, at=each)
                off = difference(network, run, one, *([three] if any_batch else []))
            if not off <= TOLERANCE:
                where = "" if each is None else f" at width {each}"
                by = f"{off:.1e} of the largest output{where} (allowed: {TOLERANCE:g})"
                raise SlimmableError(f"{path.name} differs from the model by {by}; no file was written")
            found.append(Written(off, any_batch))

    with in_eval_mode(network):
        write_aside(path, fill)
    return max(found)


def _loaded(path: Path, network: nn.Module) -> Program:
    """Return a file of `slimmable.save` as a program; one of all widths is called with `at`, one of them."""
    own = load(path, None if read(path)[0]["recipe"] else full_network(network))

    def run(*args: Any, at: float | None = None, **kwargs: Any) -> Any:
        with nullcontext() if at is None else at_width(own, at):
            return own(*args, **kwargs)

    return run


def _save_all(model: nn.Module, widths: Sequence[float], path: Path, example: Inputs) -> tuple[Program, bool]:
    """Write .pt2 or .onnx; return it as loaded, called with one of the widths as `at`, and if it takes any batch."""
    traced = []
    for width in widths:
        with at_width(model, width):
            traced.append(trace(model, example))
    any_batch = all(map(_any_batch, traced))
    names = names_of(model, traced[0], example)
    if path.suffix == ".pt2":
        save_programs(traced, widths, path)
        loaded = Programs(path)
        return lambda *args, at, **kwargs: loaded(*args, width=at, **kwargs), any_batch
    written = [to_onnx(each, names, optimize=False) for each in traced]
    costs = profile(model, example_inputs=batch_of(model, example, 1), repeats=0).rows
    macs = {row.width: row.macs for row in costs}
    written[0].model = join([each.model for each in written], widths, macs=[macs.get(width) for width in widths])
    written[0].save(path)
    run = load_onnx(path)
    return lambda *args, at, **kwargs: run(*args, kwargs, torch.tensor(widths.index(at))), any_batch


def _any_batch(program: ExportedProgram) -> bool:
    return bool(program.range_constraints)  # its number of images has a range


def _numbers(example: Inputs) -> Inputs:
    """Return the example with random numbers instead of zeros of floats, which would hide differences."""
    generator = torch.Generator().manual_seed(0)

    def filled(tensor: Tensor) -> Tensor:
        plain = tensor.to("cpu")
        if not tensor.is_floating_point() or tensor.any():
            return plain
        return torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)

    args, kwargs = tree_map_only(Tensor, filled, (example.args, example.kwargs))
    return Inputs(*args, **kwargs)
