"""`slimmable.export`: one width, or all in one file, for `torch.export.load`, an ONNX runtime or `slimmable.load`."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from tqdm import tqdm

from slimmable._atomic import write_aside
from slimmable._checks import check_whole, checked
from slimmable._convert import copy_of, extract
from slimmable._inputs import Arguments, Inputs
from slimmable._modules import in_eval_mode
from slimmable._profile import profile
from slimmable._width import at_width, widths_of
from slimmable._widths import check_widths
from slimmable.deploy import onnx, programs
from slimmable.deploy.programs import TOLERANCE, Program, batch_of, difference
from slimmable.errors import SlimmableError, UsageError, require
from slimmable.files.model import full_network, load, read, save
from slimmable.training.batchnorm import ModelInput, batches_of

FORMATS = ("pt2", "onnx", "safetensors")


class File(NamedTuple):
    """A file that `export` has written."""

    name: str  # its suffix is the format
    width: float | None  # None: all
    size: int  # in bytes
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
    calibration: Iterable[ModelInput] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> File:
    """Write a converted model as one file for other programs, all its widths or a single one; return what it is.

    The file is loaded again and run, and kept only if its outputs are those of the model in evaluation mode, within
    1e-5 of the largest. It takes any number of images, if the forward does.

    Args:
        model: a converted model; it is not changed.
        path: its suffix is the format. `.onnx`: for an ONNX runtime; with all widths, it has one more input, `width`,
            an int64 scalar: the position in the list of widths that stands in its metadata, as JSON, under
            `slimmable.widths`. The weights stand once, at full size; those of 2 GB or more in `<path>.data`. `.pt2`:
            all for `slimmable.deploy.Programs`, one for `torch.export.load`. `.safetensors`: for `slimmable.load`.
        width: a single width, as the plain network that `extract` gives.
        widths: those in the file, with 1.0 among them; by default, all that the model has.
        example_inputs: as for `slimify`; timm models need none. The inputs of a program have the names of the forward's
            parameters, a single one with four axes is `images`; a single output is `output`.
        calibration: batches as for `calibrate_bn`, a few hundred images: a `.onnx` file then computes in int8, within a
            quarter of the largest output on the first batch, which also serves as `example_inputs`, or none is written.
        arguments: as for `save`; only a `.safetensors` file needs them.

    Raises: UsageError: if the suffix is another one, or both `width` and `widths` are given. DataError: if
        `calibration` is empty or holds anything other than batches. WidthError: if the model does not have a width.
        SlimmableError: if torch or onnxruntime cannot follow the model. MissingPackageError: without the extra `onnx`.

    >>> import numpy, onnxruntime, tempfile
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> path = Path(tempfile.mkdtemp(), "net.onnx")
    >>> slimmable.export(slim, path, example_inputs=torch.zeros(2, 4)).any_batch
    True
    >>> session = onnxruntime.InferenceSession(path)
    >>> session.run(None, {"input": numpy.ones((3, 4), numpy.float32), "width": numpy.array(1)})[0].shape
    (3, 2)
    """
    check_whole("export", model)
    path, known = Path(path), widths_of(model)
    kind = path.suffix[1:]
    if kind not in FORMATS:
        raise UsageError(f"export: {path} must end in {', '.join(f'.{each}' for each in FORMATS)}, which is the format")
    if width is not None and widths is not None:
        raise UsageError(f"export: width={width!r} is a single one and widths={widths!r} are several; give one of both")
    chosen = known if widths is None else check_widths(widths)
    if kind == "safetensors" and width is None and chosen != known:
        raise UsageError(f"export: a .safetensors file holds all widths, {known}; leave out widths={chosen}")
    if calibration is not None and kind != "onnx":
        given = f"{path} and calibration={calibration!r:.80}"
        raise UsageError(f"export: calibration is for int8, which needs a path that ends in .onnx; got {given}")
    for package in onnx.PACKAGES if kind == "onnx" else ():
        require(package, package, extra="onnx")
    if any(tensor.device.type != "cpu" for tensor in model.state_dict().values()):
        model = copy_of(model).cpu()
    batches, bound = list[Arguments](), TOLERANCE
    if calibration is not None:
        batches, bound = list(batches_of("export: calibration", model, calibration)), onnx.LARGEST
        example_inputs = Inputs(*batches[0][0], **batches[0][1])
    network = model if width is None else extract(model, width)
    runs: list[float | None] = [*chosen] if width is None else [None]

    def fill(aside: Path) -> File:
        one, three = (batch_of(network, example_inputs, size) for size in (1, 3))
        program: Program
        if kind == "safetensors":
            save(network, aside, arguments=arguments)
            own = load(aside, None if read(aside)[0]["recipe"] else full_network(network))
            program, any_batch = partial(_run, own), True
        else:
            traced = []
            for each in tqdm(runs, f"export {path.name}", leave=False, disable=None):  # on terminals
                with nullcontext() if each is None else at_width(network, each):
                    own = extract(network, each) if each is not None and batches else network
                    traced.append(programs.trace(own, three))
            any_batch = all(each.range_constraints for each in traced)  # the number of images has a range
            names = programs.names_of(network, traced[0], one)
            if kind == "pt2" and width is None:
                program = programs.save_programs(traced, chosen, aside)
            elif kind == "pt2":
                program = programs.save_pt2(traced[0], aside)
            else:
                single = width is not None  # cuts of shared weights must not be folded
                make = partial(onnx.to_onnx, optimize=single)
                if batches:
                    make = partial(onnx.quantized, batches=batches, known={})  # the widest comes first
                written = [make(each, names) for each in traced]
                if single:
                    program = onnx.save_onnx(written[0], aside)
                else:
                    macs = {row.width: row.macs for row in profile(network, example_inputs=one, repeats=0).rows}
                    program = onnx.save_joined(written, aside, names, {each: macs.get(each) for each in chosen})
        offs = []
        for each in runs:
            with nullcontext() if each is None else at_width(network, each):
                run = program if each is None else partial(program, width=each)
                offs.append(difference(network, run, one, *([three] if any_batch else [])))
            if not offs[-1] <= bound:
                where = "" if each is None else f" at width {each}"
                by = f"{offs[-1]:.1e} of the largest output{where} (allowed: {bound:g})"
                raise SlimmableError(f"{path.name} differs from the model by {by}; no file was written")
        return File(path.name, width, sum(part.stat().st_size for part in aside.parent.iterdir()), max(offs), any_batch)

    with in_eval_mode(network):
        return write_aside(path, fill)


def _run(model: nn.Module, *args: Any, width: float | None = None, **kwargs: Any) -> Any:
    """Run a model at a width; at None, it has none."""
    with nullcontext() if width is None else at_width(model, width):
        return model(*args, **kwargs)
