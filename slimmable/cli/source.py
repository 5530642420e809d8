"""Sources of `slimmable export`: a timm model by name, a saved model, or the folder of a pre-training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from slimmable._convert import slimify
from slimmable._width import widths_of
from slimmable.cli.config import PretrainConfig
from slimmable.cli.networks import check_name, make_timm
from slimmable.cli.report import Row, read_report
from slimmable.cli.run import CONFIG, load_exactly, read_config, trained_backbone
from slimmable.errors import CheckpointError, SlimmableError, UsageError
from slimmable.files.construction import build
from slimmable.files.model import load, read
from slimmable.view.state import is_slim


@dataclass(frozen=True)
class Source:
    """A network to export.

    Attributes:
        name: name of the architecture.
        model: the converted network in evaluation mode.
        widths: its widths.
        image: channels, height and width of an input image.
        arguments: arguments of `timm.create_model` for the plain network, or None if timm cannot make it.
        weights: origin of the weights, in words.
        values: scaling of the pixels, in words.
        base: the model on the Hugging Face Hub that the weights come from, or None.
        accuracy: measurements by width, if any.
    """

    name: str
    model: nn.Module
    widths: tuple[float, ...]
    image: tuple[int, int, int]
    arguments: Mapping[str, object] | None
    weights: str
    values: str
    base: str | None = None
    accuracy: Mapping[float, Row] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The Python code that makes the plain network."""
        given = "".join(f", {key}={value!r}" for key, value in (self.arguments or {}).items())
        return self.name if self.arguments is None else f'timm.create_model("{self.name}"{given})'


def kind_of(model: str) -> Literal["run", "file", "timm"]:
    """Return whether `model` is the folder of a run, a file of `slimmable.save`, or the name of a timm model.

    Raises: UsageError: if it is none of them.
    """
    path = Path(model)
    if (path / CONFIG).exists():
        return "run"
    if path.is_file():
        return "file"
    try:
        check_name(model)
    except UsageError as error:
        found = f"is a folder without {CONFIG}, not a run" if path.is_dir() else "is neither a folder nor a file"
        raise UsageError(f"{model} {found}, and not a model either: {error}") from error
    return "timm"


def run_source(run: Path) -> Source:
    """Return the backbone of the run in `run` with its final weights.

    Raises: CheckpointError: if its configuration or its checkpoint cannot be read.
    """
    config = read_config(run)
    channels = 3 if config.is_folder else 1
    with torch.device("meta"):
        _, arguments = make_timm(config.model, {"num_classes": 0, "in_chans": channels}, config.image_size)
    return Source(
        name=config.model,
        model=trained_backbone(config, run, channels),
        widths=config.widths,
        image=(channels, config.image_size, config.image_size),
        arguments=arguments,
        weights=_training(config),
        values="in [0, 1]",
        accuracy=read_report(run),
    )


def file_source(path: Path, image_size: int | None = None) -> Source:
    """Return the converted timm model that `slimmable.save` wrote to `path`.

    Args:
        path: path of the file.
        image_size: height and width of the images; None for the model's own.

    Raises:
        CheckpointError: if the file cannot be read, or holds another kind of model.
        UsageError: if the model does not accept images of `image_size`.
    """
    recipe: Mapping[str, Any] | None = read(path)[0].get("recipe")
    if recipe is None:
        raise CheckpointError(
            f"{path} holds a network that timm cannot make; load it in Python, and give torch.export what "
            "slimmable.extract returns"
        )
    model = load(path)
    if not is_slim(model):
        raise CheckpointError(f"{path} holds a single narrow network; load it with slimmable.load, and export that")
    known: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    channels, *size = known["input_size"]
    channels = recipe["arguments"].get("in_chans", channels)
    size = [image_size] * 2 if image_size is not None else recipe["arguments"].get("img_size", size)
    height, width = size if isinstance(size, list) else (size, size)
    try:
        with torch.device("meta"):
            build(recipe).eval()(torch.zeros(2, channels, height, width))
    except Exception as error:  # models raise many kinds of errors on a wrong size
        raise UsageError(
            f"the model in {path} does not accept images of {height} x {width} pixels ({error}); "
            "choose another --image-size"
        ) from error
    return Source(
        name=recipe["timm"],
        model=model,
        widths=widths_of(model),
        image=(channels, height, width),
        arguments=recipe["arguments"],
        weights=f"`{path.name}`.",
        values=_values(known),
    )


def timm_source(
    name: str,
    widths: Sequence[float],
    checkpoint: Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    image_size: int | None = None,
) -> Source:
    """Return the timm model `name`, converted to `widths`, with weights from a file, from timm, or random ones.

    Raises:
        UsageError: if timm does not know the name, has no weights for it, or cannot make it with these settings.
        CheckpointError: if `checkpoint` cannot be read or belongs to another model.
    """
    settings: dict[str, object] = {} if num_classes is None else {"num_classes": num_classes}
    torch.manual_seed(0)
    model, used = (_pretrained if pretrained else make_timm)(name, settings, image_size)
    known: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    channels, height, width = known["input_size"]
    image = (channels, image_size or height, image_size or width)
    tensors = {} if checkpoint is None else _read_weights(checkpoint)
    slimmed = any(".narrow." in key for key in tensors)
    if checkpoint is not None and not slimmed:
        load_exactly(model, tensors, str(checkpoint))
    model = slimify(model.eval(), widths, example_inputs=torch.zeros(2, *image), inplace=True)
    if checkpoint is not None and slimmed:
        load_exactly(model, tensors, str(checkpoint))
    return Source(
        name=name,
        model=model,
        widths=tuple(widths),
        image=image,
        arguments={key: value for key, value in used.items() if key != "pretrained"},
        weights=_origin(name, checkpoint, pretrained),
        values=_values(known),
        base=known.get("hf_hub_id") if pretrained else None,
    )


def _pretrained(
    name: str, settings: Mapping[str, object], image_size: int | None
) -> tuple[nn.Module, dict[str, object]]:
    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise UsageError(f"timm has no pretrained weights for {name}; leave out --pretrained, or use --checkpoint")
    try:
        return make_timm(name, {**settings, "pretrained": True}, image_size)
    except SlimmableError:
        raise
    except Exception as error:  # the libraries that download files raise many kinds of errors
        raise UsageError(
            f"the pretrained weights of {name} cannot be downloaded ({type(error).__name__}: {error}); "
            "download them elsewhere, and give the file with --checkpoint"
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        tensors: dict[str, Tensor] = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is not a file of weights ({reason})") from error
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} is not a file of weights: it holds more than tensors")
    return tensors


def _values(known: Mapping[str, Any]) -> str:
    return f"in [0, 1], minus the mean {known['mean']}, divided by the standard deviation {known['std']}"


def _origin(name: str, checkpoint: Path | None, pretrained: bool) -> str:
    if checkpoint is not None:
        return f"`{checkpoint.name}`."
    if pretrained:
        return f"timm's own for `{name}`, trained at the full width only: narrower widths are untrained."
    return "Random: this is an architecture, not a trained network."


def _training(config: PretrainConfig) -> str:
    data = f"the images in `{Path(config.data).name}`" if config.is_folder else f"embedded {config.data}"
    labels = "with" if config.method == "supervised" else "without"
    return f"{config.epochs} epochs of {config.method}, {labels} labels, on {data}."
