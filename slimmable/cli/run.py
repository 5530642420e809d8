"""Runs of pre-training: the network, a timm backbone with a method around it, and the folder.

The folder holds the settings, a checkpoint, and the trained networks as files. The checkpoint is one safetensors file,
a state dict of the converted network and, under names with `training.` in front, what else resuming needs.
"""

import copy
import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import slimmable._small_resnet  # noqa: F401  adds it to timm's models
from slimmable import methods
from slimmable._convert import extract, slimify
from slimmable._tables import listed, listing
from slimmable.cli.config import PretrainConfig, explained, fits, printable, read_text
from slimmable.errors import CheckpointError, ConversionError, SlimmableError, UsageError
from slimmable.files.description import differences
from slimmable.files.model import save
from slimmable.files.tensors import read_tensors, write_tensors
from slimmable.gating import gate

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
MODEL = "model.safetensors"
_FORMAT = "slimmable pretrain 1"
_TRAINING = "training."
_MOST_BYTES = 2**20  # of a configuration
_NEVER_NEGATIVE = ("num_batches_tracked", "running_var", "step", "exp_avg_sq", "square_avg")


def new_method(config: PretrainConfig, channels: int, classes: int) -> methods.Method:
    """Return the method of `config` with weights from its seed; supervised training tells `classes` classes apart."""
    torch.manual_seed(config.seed)
    backbone = timm_backbone(config.model, channels, config.image_size, num_classes=0)
    return build_method(config, backbone, channels, classes)


def build_method(config: PretrainConfig, backbone: nn.Module, channels: int, classes: int) -> methods.Method:
    """Return the method of `config` around `backbone`, which is converted together with its head; see `new_method`."""
    example = torch.zeros(2, channels, config.image_size, config.image_size)
    output = output_for(example, backbone, config.model)
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise UsageError(f"{config.model} does not output one feature vector per image; choose another --model")
    features = output.shape[1]
    hidden, dim = config.proj_hidden_dim or features, config.proj_dim
    patches = getattr(backbone, "patch_embed", None)  # a vision transformer
    backbone.train()

    def encoder(projector: nn.Module) -> nn.Module:
        for layer in projector.modules():
            if isinstance(layer, nn.Linear) and config.head_std is not None:
                nn.init.normal_(layer.weight, std=config.head_std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if config.gate_budget is None:
            return _slimmed(config, methods.Encoder(backbone, projector), example)
        if len(config.widths) > 1:  # a head that takes the features of every width
            whole = methods.Encoder(copy.deepcopy(backbone), projector)
            projector = _slimmed(config, whole, example).get_submodule("projector")
        slim = _slimmed(config, backbone, example)  # the head has no gates, and its cost does not count
        try:
            return methods.Encoder(gate(slim, example_inputs=example, inplace=True), projector)
        except ConversionError as error:
            raise UsageError(f"--gate-budget needs a --model that can be gated: {error}") from error

    if config.method == "supervised":
        return methods.Supervised(encoder(methods.Supervised.projector(features, classes)))
    if config.method == "simclr":
        return methods.SimCLR(encoder(methods.SimCLR.projector(features, hidden, dim)), temperature=config.temperature)
    if config.method == "vicreg":
        return methods.VICReg(encoder(methods.VICReg.projector(features, hidden, dim)))
    both: dict[str, Any] = {"momentum": config.ema_momentum, "temperature": config.temperature}
    if config.method == "mocov2":
        slim = encoder(methods.MoCoV2.projector(features, hidden, dim))
        queue, parts = config.queue_size, config.key_parts
        return methods.MoCoV2(slim, proj_dim=dim, queue_size=queue, bn_splits=parts, **both)
    if config.method == "byol":
        online = encoder(methods.BYOL.projector(features, hidden, dim))
        predictor = _slimmed(config, methods.BYOL.predictor(hidden, dim), torch.zeros(2, dim))
        return methods.BYOL(online, predictor, momentum=config.ema_momentum)
    if isinstance(patches, nn.Module):
        patches.requires_grad_(False)  # frozen at random, it trains more stably (Chen et al. 2021, section 4)
    projector = methods.MoCoV3.projector(features, hidden, dim, layers=2 if patches is None else 3)
    predictor = methods.MoCoV3.predictor(hidden, dim, last_norm=patches is not None)
    slim = _slimmed(config, predictor, torch.zeros(2, dim))
    return methods.MoCoV3(encoder(projector), slim, **both)


def converted_backbone(config: PretrainConfig, channels: int) -> nn.Module:
    """Return a fresh backbone of `config`, converted without the head of the method."""
    backbone = timm_backbone(config.model, channels, config.image_size, num_classes=0)
    return _slimmed(config, backbone, torch.zeros(2, channels, config.image_size, config.image_size))


def _slimmed(config: PretrainConfig, network: nn.Module, example: Tensor) -> nn.Module:
    rules: dict[str, Any] = {"rounding": config.rounding, "universal": config.universal}
    return slimify(network, config.widths, example_inputs=example, inplace=True, **rules)


def output_for(images: Tensor, model: nn.Module, name: str) -> Any:
    """Return the output of `model` in eval mode, or raise SlimmableError if it does not accept images of this size."""
    size = " x ".join(map(str, images.shape[2:]))
    with torch.no_grad(), explained(f"{name} does not accept images of {size} pixels", "; choose another --image-size"):
        return model.eval()(images)


def timm_backbone(name: str, channels: int, image_size: int | None, **settings: object) -> nn.Module:
    """Return the timm model `name`; see `make_timm`."""
    return make_timm(name, {"in_chans": channels, **settings}, image_size)[0]


def make_timm(name: str, settings: Mapping[str, Any], image_size: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the timm model `name` and the settings it took, with `image_size` if it is for images of one size."""
    check_name(name)
    sized = {**settings} if image_size is None else {**settings, "img_size": image_size}
    try:
        try:
            return timm.create_model(name, **sized), sized
        except TypeError:  # a model for images of any size has no `img_size`
            return timm.create_model(name, **settings), {**settings}
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        asked = ", ".join(f"{key}={value!r}" for key, value in sized.items())
        raise UsageError(f"{name} cannot be made with {asked} ({error})") from error


def check_name(name: str) -> None:
    """Raise UsageError if timm has no model of this name; the message suggests similar ones."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else "timm.list_models() lists the names."
        raise UsageError(f"timm has no model {name!r}. {hint}")


def read_config(folder: Path) -> PretrainConfig:
    """Return the configuration of the run in `folder`, or raise CheckpointError if there is none, or names differ."""
    path = folder / CONFIG
    if not os.path.isfile(path):
        raise CheckpointError(f"{folder} is not the folder of a pre-training run: there is no {path}")
    try:
        values = dict(json.loads(read_text(path, _MOST_BYTES), object_pairs_hook=_named_once))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not the configuration of a run ({error})") from error
    if differing := sorted({each.name for each in fields(PretrainConfig)} ^ set(values)):
        names = listed([f"{printable(name):.60}" for name in differing], 10)
        raise CheckpointError(f"{path} was written by another version: {names} missing or unknown")
    for name, value in values.items():
        if not fits(PretrainConfig, name, value):
            raise CheckpointError(f"{path}: {name} cannot be {value!r:.80}")
    try:
        return PretrainConfig(**values)
    except SlimmableError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of the network and of its training, the number of steps done, and `Images.digest`, if known."""

    network: dict[str, Tensor]
    training: dict[str, Tensor]
    step: int
    images: str | None = None

    def check_images(self, data: str, digest: str | None) -> None:
        """Raise UsageError if `digest` is known and another than the checkpoint's, as the split would be another."""
        if None not in (digest, self.images) and digest != self.images:
            files = f"the files of the run (then {self.images}; now {digest})"
            way = "undo what was added, removed or renamed there, or start a new run"
            raise UsageError(f"--data {data} no longer holds {files}; {way}")


def save_checkpoint(
    path: Path, network: nn.Module, training: Mapping[str, Tensor], step: int, images: str | None = None
) -> None:
    """Write the checkpoint, or raise CheckpointError and leave an earlier one at `path` as it was."""
    tensors = network.state_dict() | {_TRAINING + name: tensor for name, tensor in training.items()}
    metadata = {"format": _FORMAT, "step": str(step)} | ({} if images is None else {"images": images})
    write_tensors(path, tensors, metadata)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote, or raise CheckpointError if that is missing, damaged or something else."""
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no checkpoint {path}")
    metadata, tensors = read_tensors(path, _FORMAT, "slimmable pretrain")
    step = metadata.get("step", "")
    if not re.fullmatch("[0-9]{1,18}", step):
        raise CheckpointError(f"{path} is damaged: the number of steps done is {step[:40]!r}")
    training = {name[len(_TRAINING) :]: tensors.pop(name) for name in list(tensors) if name.startswith(_TRAINING)}
    return Checkpoint(tensors, training, int(step), metadata.get("images"))


def check_alike(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError unless the tensors have the expected names, shapes and types, and possible values."""
    if found := differences(expected, given, most=10):
        raise CheckpointError(f"{what} belongs to another model or other widths:{found}")
    kinds: dict[str, list[str]] = {"of another type": [], "infinite or NaN": [], "negative": []}
    for name, tensor in expected.items():
        values = given[name]
        if values.dtype != tensor.dtype:
            kinds["of another type"].append(f"{name} {values.dtype}, expected {tensor.dtype}")
        if tensor.isfinite().all() and not values.isfinite().all():
            kinds["infinite or NaN"].append(name)
        if name.rpartition(".")[2] in _NEVER_NEGATIVE and (values < 0).any():
            kinds["negative"].append(name)
    if found := listing(kinds, 10):
        raise CheckpointError(f"{what} holds what no training leaves:{found}")


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load `tensors` into `module`, or change nothing and raise CheckpointError with the differences."""
    check_alike(module.state_dict(), tensors, what)
    module.load_state_dict(dict(tensors))


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named `<parameter>.<name>`; parameters without names are numbered."""
    state = {name: optimizer.state.get(tensor, {}) for name, tensor in _parameters_of(optimizer).items()}
    found = {f"{parameter}.{name}": value for parameter, values in state.items() for name, value in values.items()}
    return {name: torch.as_tensor(value) for name, value in found.items() if value is not None}


def load_optimizer_tensors(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], steps: Mapping[str, int] | None = None, skipped: bool = False
) -> None:
    """Load what `optimizer_tensors` returned; the schedule sets the learning rates.

    Raises CheckpointError, and loads nothing, unless the tensors are like those that a step of this optimizer makes. If
    `steps` is given, it has the parameters with state, and how many steps they took, of which some may be `skipped`.
    """
    parameters, what = _parameters_of(optimizer), "the optimizer's state in the checkpoint"
    asked = {key.rpartition(".")[0] for key in tensors} if steps is None else steps
    example = copy.deepcopy(optimizer)
    example.state.clear()
    for name, parameter in _parameters_of(example).items():
        parameter.grad = torch.zeros_like(parameter) if name in asked else None
    type(example).step.__wrapped__(example)  # type: ignore[attr-defined]  # without the hooks that watch all optimizers
    check_alike(optimizer_tensors(example), tensors, what)
    for name, count in (steps or {}).items():
        done = tensors.get(f"{name}.step")
        most = min(count, 2**24)  # where a float32 stops to count
        if done is not None and not (done <= most if skipped else done == most):
            raise CheckpointError(f"{what} counts {done:g} steps of {name}, the checkpoint {count}")
    state: dict[int, dict[str, Tensor]] = {}
    numbers = {name: number for number, name in enumerate(parameters)}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition(".")
        if tensor.shape == parameters[owner].shape:  # fused optimizers need the memory layout of the parameter
            tensor = torch.empty_like(parameters[owner], dtype=tensor.dtype).copy_(tensor)
        state.setdefault(numbers[owner], {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the parameters in their order, by the optimizer's names for them, or else by number."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    return dict(zip(names or map(str, range(len(parameters))), parameters, strict=True))


def trained_backbone(config: PretrainConfig, folder: Path, channels: int, digest: str | None = None) -> nn.Module:
    """Return the trained backbone of the run in `folder`, in eval mode; `digest` is that of its images, if known."""
    checkpoint = load_checkpoint(folder / CHECKPOINT)
    checkpoint.check_images(config.data, digest)
    scores = checkpoint.network.get("projector.bias", torch.empty(0))
    method = new_method(config, channels, scores.numel())  # only supervised training has a classifier
    load_exactly(method.encoder, checkpoint.network, str(folder / CHECKPOINT))
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
        if differences(alone.state_dict(), backbone.state_dict()):
            return False
        alone.load_state_dict(backbone.state_dict())
        for width, network in plain.items():
            ours, theirs = extract(alone, width).state_dict(), network.state_dict()
            if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name].cpu()) for name in ours):
                return False
    save(alone, folder / MODEL)
    return True
