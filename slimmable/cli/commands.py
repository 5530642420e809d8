"""The commands: from parsed arguments to what they do; each returns the exit code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slimmable._atomic import write_aside
from slimmable._widths import check_widths
from slimmable.cli.arguments import ALL
from slimmable.cli.config import PretrainConfig
from slimmable.cli.networks import timm_backbone
from slimmable.cli.progress import say
from slimmable.errors import UsageError, WidthError
from slimmable.evaluation.evaluate import ProbeName


def pretrain(
    output: str,
    resume: bool,
    device: str | None,
    workers: int | None,
    log: Sequence[str],
    log_every: int,
    knn_every: int | None,
    diagnostics: bool,
    preset: str | None,
    **given: Any,
) -> int:
    """Pre-train, evaluate, and fill the run folder."""
    from slimmable.cli.presets import configure, named
    from slimmable.cli.pretrain import Options
    from slimmable.cli.pretrain import pretrain as run
    from slimmable.cli.processes import process_group
    from slimmable.cli.run import read_config

    folder = Path(output)
    if log_every < 1:
        raise UsageError(f"--log-every must be at least 1, got {log_every}")
    if knn_every is not None and knn_every < 0:
        raise UsageError(f"--knn-every must be 0 or more, got {knn_every}")
    if "widths" in given:
        given["widths"] = _checked(given["widths"])
    if resume:
        config = read_config(folder)
        config.check_same(named(given, preset))
    else:
        config = configure(given, preset)
    with process_group(find_device(device)) as own:
        options = Options(own, resume, number_of_workers(workers), log, log_every, knn_every, diagnostics)
        return run(config, folder, options)


def evaluate(run: str, probes: Sequence[ProbeName], finetune: int, device: str | None, workers: int | None) -> int:
    """Evaluate the last weights of a run again and replace its report."""
    from slimmable.cli.data import load_images
    from slimmable.cli.run import evaluate_run, read_config, trained_backbone

    folder = Path(run)
    config = read_config(folder)
    if finetune < 0:
        raise UsageError(f"--finetune must be 0 or more, got {finetune}")
    images = load_images(config)
    backbone = trained_backbone(config, folder, images.channels, images.digest).to(find_device(device))
    chosen = list(dict.fromkeys(probes))
    say(evaluate_run(config, folder, backbone, images, chosen, finetune, number_of_workers(workers)))
    return 0


def compare(runs: Sequence[str], output: str) -> int:
    """Join the reports of several runs in one table and plot."""
    from slimmable.cli.compare import compare as join

    say(join([Path(run) for run in runs], Path(output)))
    say(f"wrote compare.csv, compare.md and compare.png to {output}")
    return 0


def export(
    model: str,
    width: Sequence[float | str],
    format: Sequence[str] | None,
    output: str | None,
    widths: Sequence[float] | None,
    **settings: Any,
) -> int:
    """Write widths of a timm model, a saved model or a run as files for other programs, with a model card."""
    from slimmable.cli.export import export as write
    from slimmable.cli.source import file_source, kind_of, run_source, timm_source

    kind = kind_of(model)
    if kind == "timm":
        known = _checked(widths)
        for asked in width:
            if asked != ALL and asked not in known:
                raise WidthError(
                    f"--width {asked} is not one of --widths {known}, which {model} is converted to; add it"
                )
        source, default = timm_source(model, known, **settings), f"runs/export/{model}"
    else:
        size = settings.pop("image_size") if kind == "file" else None
        own = {"widths": widths, **settings}
        given = ", ".join(
            f"--{name.replace('_', '-')}" for name, value in own.items() if value is not None and value is not False
        )
        if given:
            what = "the folder of a run" if kind == "run" else "a saved model"
            raise UsageError(f"{model} is {what}, which settles what {given} would say; leave it away")
        if kind == "run":
            source, default = run_source(Path(model)), model
        else:
            source, default = file_source(Path(model), size), f"runs/export/{Path(model).stem}"
    folder = Path(output or default)
    chosen = source.widths if ALL in width else [asked for asked in width if not isinstance(asked, str)]
    for file in write(source, chosen, format, folder):
        taken = "" if file.any_batch else "; it takes one image a call"
        say(
            f"wrote {folder / file.name} ({file.size / 1e6:.2f} MB), off by {file.off:.0e} of the largest output{taken}"
        )
    say(f"wrote {folder / 'README.md'}, the model card")
    return 0


extract = export  # as the command was called when it knew runs only


def profile(name: str, image_size: int | None, widths: Sequence[float] | None, csv: str | None) -> int:
    """Print what each width of a timm model costs."""
    from slimmable._convert import slimify
    from slimmable._profile import profile as measure

    model, shape = _timm_model(name, image_size)
    table = measure(slimify(model, _checked(widths), example_inputs=torch.zeros(2, *shape)), shape)
    say(str(table))
    if csv is not None:
        write_aside(Path(csv), table.to_csv)
    return 0


def plan(name: str, image_size: int | None, widths: Sequence[float] | None) -> int:
    """Print what of a timm model would be slimmed."""
    from slimmable._convert import plan as make_plan

    model, shape = _timm_model(name, image_size)
    say(str(make_plan(model, _checked(widths), example_inputs=torch.zeros(2, *shape))))
    return 0


def _checked(widths: Sequence[float] | None) -> tuple[float, ...]:
    """Return the widths of the option, or its default.

    Raises: WidthError: if they cannot be used.
    """
    try:
        return check_widths(widths or PretrainConfig.widths)
    except WidthError as error:
        raise WidthError(f"--widths: {error}") from error


def _timm_model(name: str, image_size: int | None) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """Return a timm model and the shape of its input image."""
    model = timm_backbone(name, channels=3, image_size=image_size)
    if image_size is not None:
        return model, (3, image_size, image_size)
    channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index]
    return model, (channels, height, width)


def find_device(name: str | None) -> torch.device:
    """Return the device of this name, or the accelerator if there is one.

    Raises: UsageError: if there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used ({str(error).splitlines()[0]})") from error
    return device


def number_of_workers(given: int | None) -> int:
    """Return how many processes read images: one beside a process that trains, more where there are processors.

    Raises: UsageError: if a number below 0 was given.
    """
    if given is not None and given < 0:
        raise UsageError(f"--workers must be 0 or more, got {given}")
    shared = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(0, shared - 1)) if given is None else given
