"""The parser of the program `slimmable`, and its commands: dataclasses of options, which import torch when they run."""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import shtab

import slimmable
from slimmable._widths import width_index
from slimmable.cli import config as settings
from slimmable.cli.config import FROM_0, FROM_1, POSITIVE, WIDTHS, checked_widths, flag, option, say, suggestion
from slimmable.errors import UsageError, WidthError, explained

ALL, _FORMATS = "all", ("pt2", "onnx", "safetensors")
_UNSEEN = re.compile("[\0-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8


def width(text: str) -> float | str:
    """Return the number that a word says, or `ALL`; the parser's message about other words has this function's name."""
    return text if text == ALL else float(text)


_WIDTH: dict[str, Any] = {"help": "width to write, or all; can be repeated", "type": width, "action": "append"}
_WIDTH |= {"shown": "this, --all-widths or a limit must be given", "metavar": "W", "group": "what to write"}


@dataclass(frozen=True, kw_only=True)
class _Machine:
    workers: int | None = option(None, "processes that read images", within=(0, 256), shown="up to 8", group="machine")
    device: str | None = option(None, "torch device, such as cpu or cuda", shown="cuda if available")

    def _found_device(self) -> Any:
        import torch

        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with explained(f"--device {name} cannot be used", "; choose another, such as cpu"):
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # fails on the meta device, which has no numbers
            if str(device) != name:  # torch counts devices modulo 256
                raise ValueError(f"torch takes it for {device}")
        return device

    def count_workers(self) -> int:
        """Return how many processes read images, for each process of a run."""
        shared = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return min(8, max(0, shared - 1)) if self.workers is None else self.workers


@dataclass(frozen=True)
class Pretrain(_Machine):
    """Pre-train a slimmable network, evaluate every width, and fill the run folder."""

    preset: str | None = option(None, "published settings, such as byol-imagenet; options override them", group="run")
    output: Path = option(Path("runs/pretrain"), "run folder to create; if it exists, it must be empty", metavar="RUN")
    resume: bool = option(False, "continue an interrupted run to the same result; its settings can be left out")
    log_every: int = option(10, "steps between log entries", within=FROM_1, metavar="STEPS")
    knn_every: int | None = option(None, "epochs between kNN tests; 0: none", within=FROM_0, shown="0; gated: a tenth")
    quiet: bool = option(False, "tell of faults only, not of the progress and the results")
    diagnostics: bool = option(False, "sample the gradients of the widths: their imbalance and divergence")

    def _run(self, **given: Any) -> int:
        from slimmable.cli import pretrain, processes, run

        if self.resume:
            config = run.read_config(self.output)
            config.check_same(settings.with_preset(given, self.preset))
        else:
            config = settings.configure(given, self.preset)
        with processes.process_group(self._found_device()) as device:
            return pretrain.pretrain(config, self, device)


@dataclass(frozen=True)
class Evaluate(_Machine):
    """Evaluate the final weights of a run again, and replace its report."""

    run: Path = option(help="folder of a pre-training run", metavar="RUN", group="evaluation")
    probes: tuple[str, ...] = option(
        ("knn", "linear"),
        "linear: one per width; slimmable: one for all; ridge: closed form; published: one per width, on random crops",
        choices=("knn", "linear", "slimmable", "ridge", "published"),
    )
    label_fraction: tuple[float, ...] = option((), "fractions of the labels to train on, too", within=settings.SHARE)
    k: int = option(20, "neighbours that vote in kNN", within=FROM_1, metavar="N")
    knn_metric: str = option("cosine", "how near features are in kNN", choices=("cosine", "euclidean"))
    knn_temperature: float = option(0.1, "of the votes in kNN; the larger, the more equal", within=POSITIVE)
    probe_epochs: int | None = option(None, "epochs of published", within=FROM_1, shown="90; mocov2: 100")
    probe_lr: float | None = option(None, "its rate, for 256 images", within=POSITIVE, shown="0.1; mocov2: 15")
    probe_batch_size: int = option(256, "its images per step", within=FROM_1)

    def _run(self) -> None:
        from slimmable.cli import data, evaluation, processes, run

        config = run.read_config(self.run)
        if config.gate_budget is not None and "published" in self.probes:
            raise UsageError(f"--probes published is for a run with widths, and {self.run} has gates; leave it out")
        with processes.locked(self.run):
            images = data.load_images(config)
            method = run.trained_method(config, self.run, images.channels, images.digest).to(self._found_device())
            say(evaluation.report_run(config, evaluation.rows_of_run(config, method, images, self), images, self))
            for path in self.run.glob("published*.safetensors"):
                path.unlink()


@dataclass(frozen=True)
class _Network:
    model: str = option(help="a timm model, a file of slimmable.save, or the folder of a run", metavar="MODEL_OR_RUN")
    widths: tuple[float, ...] | None = option(None, **WIDTHS, group="for a timm model; a file takes --image-size, too")
    rounding: str | None = option(None, **settings.ROUNDING, shown="nearest")
    round_to: int | None = option(None, **settings.ROUND_TO, shown="1")
    checkpoint: Path | None = option(None, "weights, plain or converted, by torch.save or safetensors", metavar="FILE")
    pretrained: bool = option(False, "use timm's own weights, trained at the full width only")
    num_classes: int | None = option(None, "size of the classifier; 0: features come out", within=FROM_0)
    image_size: int | None = option(None, "height and width in pixels", within=(1, 4096), shown="the model's own")

    def _source(self, asked: Sequence[float | str] = (ALL,)) -> tuple[Any, list[float], Path]:
        """Return the network, as a `Source`, the widths of it that are asked for, and where to write what is made."""
        if self.pretrained and self.checkpoint is not None:
            raise UsageError("--pretrained is not allowed with --checkpoint: both say where the weights come from")
        from slimmable.cli.export import file_source, run_source, timm_source
        from slimmable.cli.run import CONFIG, check_name

        path = Path(self.model)
        if os.path.exists(path / CONFIG):
            self._leave_out("the folder of a run", "image_size")
            source, folder = run_source(path), path
        elif os.path.isfile(path):
            self._leave_out("a saved model")
            source, folder = file_source(path, self.image_size), Path("runs/export", path.stem)
        else:
            try:
                check_name(self.model)
            except UsageError as error:
                raise UsageError(f"{self.model} is neither a folder with {CONFIG} nor a file, and {error}") from error
            known = checked_widths(self.widths)
            if unknown := [each for each in asked if each not in (ALL, *known)]:
                raise WidthError(f"--width {unknown[0]} is not one of --widths {known}; add it there")
            source, folder = timm_source(self), Path("runs/export", Path(self.model.rpartition(":")[2]).name)
        widths = source.widths if ALL in asked else asked
        return source, [source.widths[width_index(float(each), source.widths)] for each in widths], folder

    def _leave_out(self, what: str, *more: str) -> None:
        """Raise UsageError if an option is given that `what` determines: one for timm's models, or of `more`."""
        names = ("widths", "rounding", "round_to", "checkpoint", "pretrained", "num_classes", *more)
        if settled := [flag(name) for name in names if getattr(self, name) is not getattr(_Network, name)]:
            raise UsageError(f"{self.model} is {what}, which already determines {', '.join(settled)}; leave it out")


@dataclass(frozen=True, kw_only=True)
class Export(_Network):
    """Write widths of a timm model, a saved model or a run as files for other programs, with a model card."""

    width: tuple[float | str, ...] = option((), **_WIDTH)
    format: tuple[str, ...] | None = option(
        None, "of the files; can be repeated", choices=_FORMATS, shown="pt2, and onnx if installed", action="append"
    )
    all_widths: bool = option(False, "write all widths into one file, with one set of weights, instead of --width")
    budget: float | None = option(None, "instead, the widest one of at most this share of the MACs", within=(1e-6, 1))
    latency: float | None = option(None, "instead, the widest one of at most these ms here", within=POSITIVE)
    output: Path | None = option(None, "where to write", shown="the run folder, or runs/export/MODEL", metavar="FOLDER")

    def _run(self) -> None:
        limited = self.budget is not None or self.latency is not None
        if bool(self.width) + self.all_widths + limited != 1:
            raise UsageError("--width, --all-widths and --budget or --latency each say what to write; give one of them")
        from slimmable._profile import profile
        from slimmable.cli.export import export as write
        from slimmable.cli.processes import locked

        source, widths, folder = self._source((ALL,) if self.all_widths or limited else self.width)
        folder = self.output or folder
        if limited:
            rows = profile(source.model, source.image, repeats=0 if self.latency is None else 5).rows
            costs = [(row.width, row.macs / rows[0].macs, row.latency_ms or 0.0) for row in rows]
            fits = [own for own, macs, ms in costs if macs <= (self.budget or 1) and ms <= (self.latency or math.inf)]
            if not fits:
                least = "{} costs {:.3f} of the MACs and {:.3g} ms".format(*costs[-1])
                raise UsageError(f"--budget or --latency is too little: the narrowest width {least}; allow more")
            widths = fits[:1]
        with locked(folder):
            files = write(source, () if self.all_widths else widths, self.format, folder)
        for file in files:
            note = "" if file.any_batch else "; it takes one image per call"
            size = f"{file.size / 1e6:.2f} MB"
            say(f"wrote {folder / file.name} ({size}), off by {file.off:.0e} of the largest output{note}")
        say(f"wrote {folder / 'README.md'}, the model card")


@dataclass(frozen=True, kw_only=True)
class _Timed(_Network):
    batch: int = option(1, "images in a forward", within=(1, 4096), group="timing")
    threads: int | None = option(None, "threads that run it", within=(1, 1024), shown="all; for latency 1")
    runtime: str = option("torch", "what runs it", choices=("torch", "onnx"))

    def _timed(self, threads: int | None = None) -> tuple[Any, Any]:
        """Return the network and a batch of images, and set the number of threads."""
        import torch

        source, *_ = self._source()
        torch.set_num_threads(self.threads or threads or torch.get_num_threads())
        return source.model, torch.zeros(self.batch, *source.image)


@dataclass(frozen=True, kw_only=True)
class Latency(_Timed):
    """Measure the layers of a timm model, a saved model or a run on this machine, for `slimmable.search` on any."""

    output: Path = option(Path("latency.json"), "file to write; it is replaced", metavar="FILE.json", group="table")

    def _run(self) -> None:
        from slimmable.deploy.latency import LatencyTable

        if self.output.suffix != ".json":
            raise UsageError(f"--output {self.output} must end in .json")
        LatencyTable.measure(*self._timed(1), "onnxruntime" if self.runtime == "onnx" else "torch").save(self.output)
        say(f"wrote {self.output}, for the argument table of slimmable.search")


@dataclass(frozen=True, kw_only=True)
class Plan(_Network):
    """Print what is slimmed in a timm model, a saved model or a run, and what stays full and why."""

    json: Path | None = option(None, "also write the plan as JSON", metavar="FILE", group="plan")

    def _run(self) -> None:
        from slimmable._convert import plan_of

        plan: Any = plan_of(self._source()[0].model)
        _write("--json", self.json, lambda path: path.write_text(json.dumps(plan.to_dict())))
        say(str(plan))


@dataclass(frozen=True, kw_only=True)
class Profile(_Timed):
    """Print parameters, MACs, activations and latency of a timm model, a saved model or a run per width."""

    csv: Path | None = option(None, "also write the table as CSV", metavar="FILE", group="table")
    json: Path | None = option(None, "also write the table as JSON", metavar="FILE")

    def _run(self) -> None:
        from slimmable._profile import profile as measure
        from slimmable.deploy.latency import in_onnxruntime

        model, images = self._timed()
        table = measure(model, example_inputs=images, repeats=0 if self.runtime == "onnx" else 5)
        table = in_onnxruntime(model, images, table, self.threads or 0) if self.runtime == "onnx" else table
        _write("--csv", self.csv, table.to_csv)
        _write("--json", self.json, lambda path: path.write_text(json.dumps(table.to_dict())))
        say(str(table))


def _write(option: str, path: Path | None, write: Callable[[Path], object]) -> None:
    if path is not None:
        from slimmable._atomic import write_aside

        if os.path.lexists(path) and not path.is_file():
            raise UsageError(f"{option} {path} exists and is no file; choose another name")
        write_aside(path, write)


# the dataclasses of the options of each command; the last one runs it, and has its name
_CLASSES = ((settings.PretrainConfig, Pretrain), (Evaluate,), (Export,), (Latency,), (Profile,), (Plan,))
COMMANDS: dict[str, tuple[type, ...]] = {classes[-1].__name__.lower(): classes for classes in _CLASSES}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        raise UsageError(message + (suggestion(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else ""))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the program `slimmable`."""
    about = "Slimmable networks: one set of weights, several widths."
    parser = _Parser(prog="slimmable", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"slimmable {slimmable.__version__}")
    shtab.add_argument_to(parser, "--print-completion")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, classes in COMMANDS.items():
        text, example = classes[-1].__doc__, f"example: slimmable {name} {settings.EXAMPLES[name]}"
        own = commands.add_parser(name, help=text, description=text, epilog=example, allow_abbrev=False)
        for options in classes:
            settings.add_options(own, options)
    return parser


def parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the command and the given options of a command line; without words, show the help and exit with 2."""
    option = ""
    for word in argv:
        where, _, value = word.partition("=") if word.startswith("--") and "=" in word else (option, "", word)
        if not value.strip() or len(word) > 4096 or _UNSEEN.search(word):
            what = f"{where:.40} {value!a:.80}".strip() if where.isprintable() else f"{word!a:.80}"
            raise UsageError(f"{what} is empty, longer than 4,096 characters, or not text")
        option = word if word.startswith("--") else option
    parser = make_parser()
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    arguments, unknown = parser.parse_known_args(argv)
    given = vars(arguments)
    name, _ = given.pop("command"), given.pop("print_completion")
    if unknown:
        typed = unknown[0].partition("=")[0]
        known = ["--help", *(flag(each.name) for options in COMMANDS[name] for each in fields(options))]
        raise UsageError(f"there is no option {typed}{suggestion(typed, known)}")
    return name, given


def run(name: str, given: dict[str, Any]) -> int:
    """Check the given options, run the command of this name, and return its exit code."""
    *_, command = COMMANDS[name]
    own = command(**{each.name: given.pop(each.name) for each in fields(command) if each.name in given})
    settings.check(own)
    return own._run(**given) or 0  # only that of `pretrain` returns one
