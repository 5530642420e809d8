"""What a run folder holds, and what is done with a trained network: evaluation and sub-networks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from slimmable._atomic import write_aside
from slimmable._convert import extract
from slimmable._profile import profile
from slimmable.cli.checkpoint import load_checkpoint, load_exactly, save_weights
from slimmable.cli.config import PretrainConfig
from slimmable.cli.evaluation import evaluate_backbone, finetuned_accuracies, pixels_accuracy
from slimmable.cli.gates import evaluate_networks
from slimmable.cli.images import Images
from slimmable.cli.networks import new_method
from slimmable.cli.report import UNTRAINED, Row, to_markdown, write_report
from slimmable.errors import CheckpointError
from slimmable.evaluation.evaluate import ProbeName

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
PROBES: tuple[ProbeName, ...] = ("knn", "linear")


def read_config(folder: Path) -> PretrainConfig:
    """Return the configuration of the run in `folder`.

    Raises: CheckpointError: if there is none.
    """
    path = folder / CONFIG
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder} is not the folder of a pre-training run: {path} cannot be read") from error
    return PretrainConfig.from_json(text, path)


def trained_backbone(config: PretrainConfig, folder: Path, channels: int, digest: str | None = None) -> nn.Module:
    """Return the converted backbone of the run in `folder` with its last weights, in eval mode.

    Raises:
        CheckpointError: if there is no checkpoint, or one of another model.
        UsageError: if `digest` is given and the run had other images.
    """
    path = folder / CHECKPOINT
    checkpoint = load_checkpoint(path)
    if digest is not None:
        checkpoint.check_images(config.data, digest)
    classes = len(checkpoint.network.get("projector.bias", (0,)))  # of supervised training; others have no classifier
    method = new_method(config, channels, classes)
    load_exactly(method.encoder, checkpoint.network, str(path))
    return method.backbone.eval()


def save_subnetworks(folder: Path, backbone: nn.Module, widths: Sequence[float]) -> None:
    """Write the plain backbone of each width as `width-<width>.safetensors`."""
    for width in widths:
        write_aside(folder / f"width-{width}.safetensors", partial(save_weights, module=extract(backbone, width)))


def evaluate_run(
    config: PretrainConfig,
    folder: Path,
    backbone: nn.Module,
    images: Images,
    probes: Sequence[ProbeName] = PROBES,
    finetune_epochs: int = 0,
    workers: int = 0,
) -> str:
    """Evaluate `backbone` and the same network untrained, write the report, and return the table as Markdown."""
    device = next(backbone.parameters()).device
    untrained = new_method(config, images.channels, len(images.classes)).to(device).backbone
    title = f"{config.model}, {config.epochs} epochs of {config.method}"
    if config.gate_budget is None:
        rows = _widths_of_run(config, backbone, untrained, images, probes, finetune_epochs, workers)
    else:
        rows = evaluate_networks(config, backbone, untrained, images, probes, finetune_epochs, workers)
        title += f", gated to {config.gate_budget:g}"
    pixels = pixels_accuracy(config, images)
    write_report(folder, rows, pixels, title)
    return to_markdown(rows, pixels)


def _widths_of_run(
    config: PretrainConfig,
    backbone: nn.Module,
    untrained: nn.Module,
    images: Images,
    probes: Sequence[ProbeName],
    finetune_epochs: int,
    workers: int,
) -> list[Row]:
    """Evaluate every width."""
    shares: dict[float, dict[str, float]] = {width: {} for width in config.widths}
    for prefix, network in (("", backbone), (UNTRAINED, untrained)):
        found = evaluate_backbone(config, network, images, probes, workers)
        for width, accuracy in found.items():
            shares[width] |= {prefix + probe: getattr(accuracy, probe) for probe in probes}
        if finetune_epochs and not prefix:
            networks = {width: extract(network, width) for width in config.widths}
            for width, share in finetuned_accuracies(config, networks, images, finetune_epochs).items():
                shares[width]["finetuned"] = share
    size = (images.channels, config.image_size, config.image_size)
    return [
        Row(row.width, row.parameters, row.macs, shares[row.width]) for row in profile(backbone, size, repeats=0).rows
    ]
