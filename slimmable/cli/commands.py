"""The commands: from parsed arguments to what they do; each returns the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slimmable._errors import UsageError
from slimmable._widths import check_widths
from slimmable.cli.config import FOLDER_IMAGE_SIZE, PretrainConfig
from slimmable.cli.files import write_aside
from slimmable.cli.networks import timm_backbone
from slimmable.cli.progress import say


def pretrain(output: str, resume: bool, device: str | None, **given: Any) -> int:
    """Pre-train, evaluate, and fill the run folder."""
    from slimmable.cli.pretrain import pretrain as run
    from slimmable.cli.run import read_config

    folder = Path(output)
    if "widths" in given:
        given["widths"] = check_widths(given["widths"])
    if resume:
        config = read_config(folder)
        config.check_same(given)
    else:
        if "data" in given:
            given.setdefault("image_size", FOLDER_IMAGE_SIZE)
        config = PretrainConfig(**given)
    return run(config, folder, find_device(device), resume)


def evaluate(run: str, device: str | None) -> int:
    """Evaluate the last weights of a run again and replace its report."""
    from slimmable.cli.run import evaluate_run, load_images, read_config, trained_network

    folder = Path(run)
    config = read_config(folder)
    images = load_images(config)
    network = trained_network(config, folder, images.channels).to(find_device(device))
    say(evaluate_run(config, folder, network, images))
    return 0


def extract(run: str, width: float, format: Sequence[str] | None, output: str | None) -> int:
    """Write one width of a run's backbone as programs."""
    from slimmable.cli.export import export_run

    for path in export_run(Path(run), width, format, Path(output or run)):
        say(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB), which gives the model's own features")
    return 0


def profile(name: str, image_size: int | None, widths: Sequence[float] | None, csv: str | None) -> int:
    """Print what each width of a timm model costs."""
    from slimmable.convert import slimify
    from slimmable.profile import profile as measure

    model, shape = _timm_model(name, image_size)
    table = measure(slimify(model, widths or PretrainConfig.widths, example_inputs=torch.zeros(2, *shape)), shape)
    say(str(table))
    if csv is not None:
        write_aside(Path(csv), table.to_csv)
    return 0


def plan(name: str, image_size: int | None, widths: Sequence[float] | None) -> int:
    """Print what of a timm model would be slimmed."""
    from slimmable.convert import plan as make_plan

    model, shape = _timm_model(name, image_size)
    say(str(make_plan(model, widths or PretrainConfig.widths, example_inputs=torch.zeros(2, *shape))))
    return 0


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
