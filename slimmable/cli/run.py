"""Run folder of a pre-training: its settings, its checkpoint, and the trained networks as files.

The checkpoint is one safetensors file with the network and everything that resuming needs. Without the tensors whose
names begin with `training.` (key encoder, queue, optimizer), it is a state dict of the converted network. It stores no
random state, because every step seeds its own random numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slimmable._atomic import plain_copies, write_aside
from slimmable._convert import extract
from slimmable.cli.config import PretrainConfig
from slimmable.cli.networks import converted_backbone, new_method
from slimmable.errors import CheckpointError, UsageError
from slimmable.files.construction import differences
from slimmable.files.model import read_tensors, save

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
MODEL = "model.safetensors"
_FORMAT = "slimmable pretrain 1"
_TRAINING = "training."


def refuse_existing(folder: Path) -> None:
    """Raise UsageError if a new run would overwrite something in `folder`."""
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists; add --resume to continue that run, or choose another folder with --output")


def start_folder(folder: Path, config: PretrainConfig) -> None:
    """Create the run folder with its configuration, or raise CheckpointError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot create the run folder {folder} ({error})") from error
    write_aside(folder / CONFIG, lambda path: path.write_text(config.to_json()))


def read_config(folder: Path) -> PretrainConfig:
    """Return the configuration of the run in `folder`, or raise CheckpointError if there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is not the folder of a pre-training run: there is no {path}")
    return PretrainConfig.from_json(path)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of the network and of its training, the number of steps done, and `Images.digest`, if known."""

    network: dict[str, Tensor]
    training: dict[str, Tensor]
    step: int
    images: str | None = None

    def check_images(self, data: str, digest: str | None) -> None:
        """Raise UsageError if `digest` differs from the checkpoint's, as split and order of the images would differ."""
        if self.images is not None and digest != self.images:
            raise UsageError(
                f"--data {data} no longer holds the files of the run (then {self.images}; now {digest}); "
                "undo what was added, removed or renamed there, or start a new run"
            )


def save_checkpoint(
    path: Path, network: nn.Module, training: Mapping[str, Tensor], step: int, images: str | None = None
) -> None:
    """Write the checkpoint, or raise CheckpointError and leave an earlier one at `path` as it was."""
    tensors = plain_copies(network.state_dict() | {_TRAINING + name: tensor for name, tensor in training.items()})
    metadata = {"format": _FORMAT, "step": str(step)} | ({} if images is None else {"images": images})
    write_aside(path, lambda aside: save_file(tensors, aside, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote, or raise CheckpointError if that is missing, damaged or something else."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    metadata, tensors = read_tensors(path, _FORMAT, "slimmable pretrain")
    training = {name[len(_TRAINING) :]: tensors.pop(name) for name in list(tensors) if name.startswith(_TRAINING)}
    return Checkpoint(tensors, training, int(metadata["step"]), metadata.get("images"))


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load `tensors` into `module`, or change nothing and raise CheckpointError with the differences."""
    found = differences(module.state_dict(), tensors, most=10)
    if found:
        raise CheckpointError(f"{what} belongs to another model or other widths:{found}")
    module.load_state_dict(dict(tensors))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named `<index of the parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    named = {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}
    return {name: torch.as_tensor(value) for name, value in named.items() if value is not None}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned; the schedule sets the learning rates."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:  # fused optimizers need the memory layout of the parameter
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def trained_backbone(config: PretrainConfig, folder: Path, channels: int, digest: str | None = None) -> nn.Module:
    """Return the converted backbone of the run in `folder` with its final weights, in eval mode.

    If `digest` is given, the run must have had the same images.
    """
    path = folder / CHECKPOINT
    checkpoint = load_checkpoint(path)
    if digest is not None:
        checkpoint.check_images(config.data, digest)
    classes = len(checkpoint.network.get("projector.bias", (0,)))  # only supervised training has a classifier
    method = new_method(config, channels, classes)
    load_exactly(method.encoder, checkpoint.network, str(path))
    return method.backbone.eval()


def save_networks(folder: Path, config: PretrainConfig, backbone: nn.Module, channels: int) -> bool:
    """Write the networks of a run for `slimmable.load`: each width as a plain network, and one network of all widths.

    Returns: whether the latter was written. Without gates the backbone was converted together with its head; in the
        rare case that a backbone converted alone keeps other channels, that file is left out.
    """
    plain = {width: extract(backbone, width) for width in config.widths}
    for width, network in plain.items():
        save(network, folder / f"width-{width}.safetensors")
    alone = backbone
    if config.gate_budget is None:
        alone = converted_backbone(config, channels)
        try:
            load_exactly(alone, backbone.state_dict(), MODEL)
        except CheckpointError:
            return False
        for width, network in plain.items():
            ours, theirs = extract(alone, width).state_dict(), network.state_dict()
            if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name].cpu()) for name in ours):
                return False
    save(alone, folder / MODEL)
    return True
