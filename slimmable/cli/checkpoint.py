"""The checkpoint of a pre-training run: one safetensors file with the network and everything that resuming needs.

The network's tensors have their own names, so the file loads as a state dict of the converted network once the names
with the prefix `training.` (key encoder, queue, optimiser) are left out. Every step seeds its own random numbers, so
the number of steps done is all there is to know about them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from slimmable._atomic import plain_copies, write_aside
from slimmable.cli.extras import require
from slimmable.errors import CheckpointError, UsageError

_FORMAT = "slimmable pretrain 1"
_TRAINING = "training."


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of the network and of the training around it, number of steps done, and `Images.digest`, if known."""

    network: dict[str, Tensor]
    training: dict[str, Tensor]
    step: int
    images: str | None = None

    def check_images(self, data: str, digest: str | None) -> None:
        """Refuse other images than those of the run: another split, and another order.

        Raises: UsageError: if `digest` is not that of the checkpoint; `data` is for the message.
        """
        if self.images is not None and digest != self.images:
            raise UsageError(
                f"--data {data} does not hold the files of the run any more (then {self.images}; now {digest}); "
                "take back what was added, removed or renamed there, or begin another run"
            )


def save_checkpoint(
    path: Path, network: nn.Module, training: Mapping[str, Tensor], step: int, images: str | None = None
) -> None:
    """Write the checkpoint; an earlier one at `path` survives whatever goes wrong.

    Raises: CheckpointError: if it cannot be written.
    """
    tensors = plain_copies(network.state_dict() | {_TRAINING + name: tensor for name, tensor in training.items()})
    metadata = {"format": _FORMAT, "step": str(step)} | ({} if images is None else {"images": images})
    safetensors = require("safetensors.torch", "safetensors")
    write_aside(path, lambda aside: safetensors.save_file(tensors, aside, metadata))


def save_weights(path: Path, module: nn.Module, **metadata: str) -> None:
    """Write the state dict of `module` as a safetensors file, tensors that share memory one by one.

    Raises: OSError or SafetensorError: if it cannot be written.
    """
    tensors = plain_copies(module.state_dict())
    require("safetensors.torch", "safetensors").save_file(tensors, path, {"format": "pt"} | metadata)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote.

    Raises: CheckpointError: if the file is missing, damaged, or no checkpoint of a pre-training run.
    """
    safetensors = require("safetensors", "safetensors")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a mapping
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of a pre-training run")
        step = int(metadata["step"])
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    training = {name[len(_TRAINING) :]: tensors.pop(name) for name in list(tensors) if name.startswith(_TRAINING)}
    return Checkpoint(tensors, training, step, metadata.get("images"))


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load `tensors` into `module` if names and shapes are the same; otherwise change nothing.

    Raises: CheckpointError: listing what differs.
    """
    own = module.state_dict()
    differences = [f"{name} is missing" for name in own if name not in tensors]
    differences += [f"{name} is not part of the model" for name in tensors if name not in own]
    differences += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model's has {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if differences:
        shown = "".join(f"\n  {line}" for line in differences[:10])
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise CheckpointError(f"{what} belongs to another model or other widths:{shown}{more}")
    module.load_state_dict(dict(tensors))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as tensors named `<number of the parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; learning rates are set by the schedule."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:  # fused optimisers need state that lies in memory as its parameter does
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
