"""`slimmable export`: widths of a model as files for other programs, checked against it, with a model card."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimmable._atomic import filled_aside
from slimmable._convert import slimify
from slimmable._profile import profile
from slimmable._width import widths_of
from slimmable.cli import run as runs
from slimmable.cli.commands import _Network
from slimmable.cli.config import DIGITS, checked_widths
from slimmable.cli.report import DENSE, read_rows
from slimmable.deploy.export import File, export as write
from slimmable.errors import CheckpointError
from slimmable.files.hub import model_card
from slimmable.files.model import full_state_dict, load, read, read_weights, skeleton
from slimmable.view.state import is_slim


@dataclass(frozen=True)
class Source:
    """A network to export."""

    name: str  # of the architecture
    model: nn.Module  # converted, in evaluation mode
    widths: tuple[float, ...]
    image: tuple[int, int, int]  # channels, height and width
    arguments: Mapping[str, object] | None  # of `timm.create_model` for the plain network; None if timm cannot make it
    weights: str  # their origin, in words
    mean: tuple[float, ...]  # subtracted from values in [0, 1]
    std: tuple[float, ...]  # by which they are divided then
    base: str | None = None  # the model on the Hugging Face Hub that the weights come from
    accuracy: Mapping[float, Mapping[str, float]] = field(default_factory=dict)  # by width and probe


def run_source(run: Path) -> Source:
    """Return the backbone of the run in `run` with its final weights."""
    config = runs.read_config(run)
    channels, size = config.channels, config.image_size
    with torch.device("meta"):
        _, arguments = runs.make_backbone(config, channels)
    data = f"the images in `{Path(config.data).name}`" if config.data != DIGITS else f"embedded {config.data}"
    labels = "with" if config.method == "supervised" else "without"
    weights = f"{config.epochs} epochs of {config.method}, {labels} labels, on {data}."
    model = runs.trained_method(config, run, channels).backbone
    accuracy = {row.width: row.shares for row in read_rows(run) if row.kind in ("", DENSE)}
    image, mean, std = (channels, size, size), config.mean or (0.0,), config.std or (1.0,)
    return Source(config.model, model, config.widths, image, arguments, weights, mean, std, accuracy=accuracy)


def file_source(path: Path, image_size: int | None = None) -> Source:
    """Return the converted timm model that `slimmable.save` wrote to `path`, for images of its own size by default."""
    recipe: Mapping[str, Any] | None = read(path)[0].get("recipe")
    if recipe is None:
        raise CheckpointError(f"{path} holds a network that timm cannot make; extract and export it in Python")
    model = load(path)
    if not is_slim(model):
        raise CheckpointError(f"{path} holds a single narrow network; load it with slimmable.load, and export that")
    known: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    arguments = recipe["arguments"]
    channels, *size = known["input_size"]
    size = image_size or arguments.get("img_size", size)
    height, width = size if isinstance(size, list) else (size, size)
    image = (arguments.get("in_chans", channels), height, width)
    with torch.device("meta"):
        runs.output_for(image, skeleton(recipe, model.state_dict()), f"the model in {path}")
    mean, std = tuple(known["mean"]), tuple(known["std"])
    return Source(recipe["timm"], model, widths_of(model), image, arguments, f"`{path.name}`.", mean, std)


def timm_source(options: _Network) -> Source:
    """Return the timm model that the options name, converted, with weights from a file, from timm, or random ones."""
    name, size, checkpoint = options.model, options.image_size, options.checkpoint
    settings: dict[str, object] = {} if options.num_classes is None else {"num_classes": options.num_classes}
    weights = "Random: this is an architecture, not a trained network."
    if options.pretrained:
        weights = f"timm's own for `{name}`, trained at the full width only: narrower widths are untrained."
        settings["pretrained"] = True
    torch.manual_seed(0)
    model, used = runs.make_timm(name, settings, size)
    known: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    channels, height, width = known["input_size"]
    image = (channels, size or height, size or width)
    rules: Any = {"rounding": options.rounding or "nearest", "round_to": options.round_to or 1, "inplace": True}
    model = slimify(model.eval(), checked_widths(options.widths), example_inputs=torch.zeros(2, *image), **rules)
    if checkpoint is not None:
        weights, tensors = f"`{checkpoint.name}`.", read_weights(checkpoint, "--checkpoint")
        slimmed = any(".narrow." in key for key in tensors)  # otherwise each width's norms get their part
        runs.check_alike(model.state_dict() if slimmed else full_state_dict(model), tensors, str(checkpoint))
        model.load_state_dict(tensors)
    arguments = {key: value for key, value in used.items() if key != "pretrained"}
    base = known.get("hf_hub_id") if options.pretrained else None
    mean, std = tuple(known["mean"]), tuple(known["std"])
    return Source(name, model, widths_of(model), image, arguments, weights, mean, std, base)


def export(source: Source, widths: Sequence[float], formats: Sequence[str] | None, output: Path) -> list[File]:
    """Write files of `source`, one for each width or, without any, for all, and a model card; all or nothing."""
    formats = formats or (("pt2", "onnx") if importlib.util.find_spec("onnxscript") else ("pt2",))
    example = torch.zeros(2, *source.image)
    arguments = None if ":" in source.name else source.arguments  # if timm reads more of them
    files: list[File] = []
    with filled_aside(output) as folder:
        for width, kind in product(dict.fromkeys(widths) or [None], dict.fromkeys(formats)):
            path = folder / f"{'all-widths' if width is None else f'width-{width}'}.{kind}"
            files.append(write(source.model, path, width=width, example_inputs=example, arguments=arguments))
        one = {Path(file.name).suffix[1:]: file.name for file in reversed(files)}  # of each format
        card = model_card(profile(source.model, source.image, repeats=0), files=files, example=one, **vars(source))
        (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    return files
