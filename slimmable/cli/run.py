"""What a run folder holds, and what is done with a trained network: evaluation and sub-networks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from slimmable._errors import CheckpointError
from slimmable._files import write_aside
from slimmable.cli.checkpoint import load_checkpoint, load_exactly, save_weights
from slimmable.cli.config import PretrainConfig
from slimmable.cli.digits import cluttered_digits
from slimmable.cli.folder import folder_images
from slimmable.cli.images import Images
from slimmable.cli.networks import PretrainNetwork, build_network
from slimmable.cli.progress import say
from slimmable.cli.report import Row, to_markdown, write_report
from slimmable.convert import extract, slimify
from slimmable.profile import profile
from slimmable.training.evaluate import evaluate_widths
from slimmable.training.knn import knn_accuracy

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"


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


def load_images(config: PretrainConfig) -> Images:
    """Make or read the images of `config`; the split does not depend on the run's seed."""
    if config.data is None:
        return cluttered_digits(config.images, config.images // 4, config.image_size)
    return folder_images(Path(config.data), config.image_size, seed=0, say=say)


def new_network(config: PretrainConfig, channels: int) -> PretrainNetwork:
    """Return the converted network of `config` with fresh weights."""
    example = torch.zeros(2, channels, config.image_size, config.image_size)
    network = slimify(build_network(config, channels), config.widths, example_inputs=example, inplace=True)
    assert isinstance(network, PretrainNetwork)
    return network


def trained_network(config: PretrainConfig, folder: Path, channels: int) -> PretrainNetwork:
    """Return the network of the run in `folder` with its last weights.

    Raises: CheckpointError: if there is no checkpoint, or one of another model.
    """
    network = new_network(config, channels)
    path = folder / CHECKPOINT
    load_exactly(network, load_checkpoint(path).network, str(path))
    return network.eval()


def save_subnetworks(folder: Path, backbone: nn.Module, widths: Sequence[float]) -> None:
    """Write the plain backbone of each width as `width-<width>.safetensors`."""
    for width in widths:
        write_aside(folder / f"width-{width}.safetensors", partial(save_weights, module=extract(backbone, width)))


def evaluate_run(config: PretrainConfig, folder: Path, network: PretrainNetwork, images: Images) -> str:
    """Evaluate `network` and the same network untrained, write the report, and return the table as Markdown."""
    device = next(network.parameters()).device
    data = (images.train, images.train_labels, images.test, images.test_labels)
    trained = evaluate_widths(network.backbone, *data)
    untrained = evaluate_widths(new_network(config, images.channels).to(device).backbone, *data)
    cost = profile(network.backbone, (images.channels, images.size, images.size), repeats=0)
    rows = [
        Row(row.width, row.parameters, row.macs, now.knn, now.linear, before.knn, before.linear)
        for row in cost.rows
        for now, before in [(trained[row.width], untrained[row.width])]
    ]
    pixels = knn_accuracy(*data)
    write_report(folder, rows, pixels, f"{config.model}, {config.epochs} epochs of SlimCLR")
    return to_markdown(rows, pixels)
