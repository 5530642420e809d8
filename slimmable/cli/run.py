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
from dataclasses import asdict, dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import slimmable._small_resnet  # noqa: F401  adds it to timm's models
from slimmable import methods
from slimmable._atomic import read_tensors, write_tensors
from slimmable._checks import check_matrices
from slimmable._convert import extract, slimify
from slimmable._tables import listed, listing
from slimmable.cli.config import PretrainConfig, kind_of, printable, read_text
from slimmable.errors import CheckpointError, ConversionError, SlimmableError, UsageError, explained
from slimmable.files.description import differences
from slimmable.files.model import save
from slimmable.gating import gate
from slimmable.methods.published import TeacherKind

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
MODEL = "model.safetensors"
CLASSIFIER = "classifier.safetensors"
_FORMAT = "slimmable pretrain 1"
_TRAINING = "training."
_MOST_BYTES = 2**20  # of a configuration
_SOURCES = ("hf-hub:", "local-dir:")  # of models, as timm names them
_NEVER_NEGATIVE = ("num_batches_tracked", "running_var", "step", "exp_avg_sq", "square_avg")


@dataclass(frozen=True)
class Start:
    """Weights to start from: of the backbone, slimmable or plain, and of its linear classifier, if it has one."""

    backbone: Mapping[str, Tensor]
    slim: bool
    classifier: Mapping[str, Tensor]


def new_method(
    config: PretrainConfig, channels: int, classes: int, start: Start | None = None, teacher: nn.Module | None = None
) -> methods.Method:
    """Return the method of `config` with random weights from its seed, or those of `start`.

    Supervised training tells `classes` classes apart; distillation has as many outputs, or as many as its `teacher`.
    """
    torch.manual_seed(config.seed)
    backbone = timm_backbone(config.model, channels, config.image_size, **backbone_settings(config))
    if teacher is None:
        return build_method(config, backbone, channels, classes, start)
    taught = output_for(torch.zeros(2, channels, config.image_size, config.image_size), teacher, str(config.teacher))
    check_matrices(f"--teacher {config.teacher}", output=taught)
    encoder = build_method(config, backbone, channels, taught.shape[1], start).encoder
    return methods.Distillation(encoder, teacher, kind=cast(TeacherKind, config.teach), temperature=config.temperature)


def backbone_settings(config: PretrainConfig, classes: int = 0) -> dict[str, Any]:
    """Return timm's arguments for a backbone, without a classifier, which takes local crops as well, if it can."""
    return {"num_classes": classes} | ({"dynamic_img_size": True} if config.local_crops else {})


def build_method(
    config: PretrainConfig, backbone: nn.Module, channels: int, classes: int, start: Start | None = None
) -> methods.Method:
    """Return the method of `config` around `backbone`, which is converted together with its head; see `new_method`."""
    example = torch.zeros(2, channels, config.image_size, config.image_size)
    order = config.importance if start is not None and not start.slim and config.importance != "none" else None
    if start is not None and not start.slim:
        load_exactly(backbone, start.backbone, f"--init {config.init}")
    output = output_for(example, backbone, config.model)
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise UsageError(f"{config.model} does not output one feature vector per image; choose another --model")
    if config.local_crops:
        local = torch.zeros(2, channels, config.local_crop_size, config.local_crop_size)
        output_for(local, backbone, config.model, "--local-crop-size")
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
        gated = config.gate_budget is not None
        if gated and len(config.widths) > 1:  # a head that takes the features of every width
            whole = methods.Encoder(copy.deepcopy(backbone), projector)
            projector = _slimmed(config, whole, example, order).get_submodule("projector")
        plain = backbone if gated else methods.Encoder(backbone, projector)  # the head has no gates, no cost
        slim = _slimmed(config, plain, example, order)
        if start is not None and start.slim:
            load_exactly(backbone, start.backbone, f"--init {config.init}")
        if not gated:
            return slim
        try:
            return methods.Encoder(gate(slim, example_inputs=example, inplace=True), projector)
        except ConversionError as error:
            raise UsageError(f"--gate-budget needs a --model that can be gated: {error}") from error

    if config.method in ("supervised", "distillation"):  # the latter learns once it has a teacher
        classifier = methods.Supervised.projector(features, classes)
        if start is not None and not differences(classifier.state_dict(), start.classifier):
            classifier.load_state_dict(start.classifier)
        return methods.Supervised(encoder(classifier))
    kind: Any = {name.lower(): getattr(methods, name) for name in methods.__all__}[config.method]
    known = {**asdict(config), "momentum": config.ema_momentum, "bn_splits": config.key_parts}
    known["freeze"] = 1 / config.epochs
    settings = {name: known[name] for name in signature(kind).parameters if name in known}
    head: dict[str, Any] = {"batch_norm": patches is None} if config.method == "dino" else {}
    last: dict[str, Any] = {}
    if config.method == "mocov3" and isinstance(patches, nn.Module):
        patches.requires_grad_(False)  # frozen at random, it trains more stably (Chen et al. 2021, section 4)
        head, last = {"layers": 3}, {"last_norm": True}
    slim = [encoder(kind.projector(features, hidden, dim, **head))]
    if hasattr(kind, "predictor"):
        inner = max(1, dim // 4) if config.method == "simsiam" else hidden
        slim.append(_slimmed(config, kind.predictor(inner, dim, **last), torch.zeros(2, dim)))
    method: methods.Method = kind(*slim, **settings)
    return method


def converted_backbone(config: PretrainConfig, channels: int, classes: int = 0) -> nn.Module:
    """Return a fresh backbone of `config`, converted without the head of the method, or with timm's classifier."""
    backbone = timm_backbone(config.model, channels, config.image_size, **backbone_settings(config, classes))
    return _slimmed(config, backbone, torch.zeros(2, channels, config.image_size, config.image_size))


def _slimmed(config: PretrainConfig, network: nn.Module, example: Tensor, order: str | None = None) -> nn.Module:
    rules: dict[str, Any] = {"rounding": config.rounding, "universal": config.universal, "importance": order}
    return slimify(network, config.widths, example_inputs=example, inplace=True, **rules)


def output_for(images: Tensor, model: nn.Module, name: str, option: str = "--image-size") -> Any:
    """Return the output of `model` in eval mode, or raise SlimmableError if it does not accept images of this size."""
    size = " x ".join(map(str, images.shape[2:]))
    with torch.no_grad(), explained(f"{name} does not accept images of {size} pixels", f"; choose another {option}"):
        return model.eval()(images)


def timm_backbone(name: str, channels: int, image_size: int | None, **settings: object) -> nn.Module:
    """Return the timm model `name`; see `make_timm`."""
    return make_timm(name, {"in_chans": channels, **settings}, image_size)[0]


def make_timm(name: str, settings: Mapping[str, Any], image_size: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the timm model `name` and the settings it took, with `image_size` if it is for images of one size."""
    check_name(name)
    pretrained = settings.get("pretrained")
    if pretrained and not name.startswith(_SOURCES) and not getattr(timm.get_pretrained_cfg(name), "has_weights", 0):
        raise UsageError(f"timm has no pretrained weights for {name}; leave them out, or give a file of them")
    sized = {**settings} if image_size is None else {**settings, "img_size": image_size}
    asked = ", ".join(f"{key}={value!r}" for key, value in sized.items())
    sizes = [key for key in ("dynamic_img_size", "img_size") if key in sized]
    try:
        while True:
            try:
                return timm.create_model(name, **sized), sized
            except TypeError:  # a model for images of any size has neither
                if not sizes:
                    raise
                del sized[sizes.pop(0)]
    except OSError:  # of the Hub or a folder
        what = f"the pretrained weights of {name} cannot be downloaded" if pretrained else f"timm has no model {name!r}"
        with explained(what, "; download them elsewhere, and give the file: --checkpoint" if pretrained else ""):
            raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{name} cannot be made with {asked} ({error})") from error


def check_name(name: str) -> None:
    """Raise UsageError if timm has no model of this name, unless it is of the Hub or a folder; suggest similar ones."""
    architecture = name.split(".")[0]
    if not name.startswith(_SOURCES) and not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else "timm.list_models() lists the names."
        raise UsageError(f"timm has no model {name!r}. {hint}")


def read_config(folder: Path) -> PretrainConfig:
    """Return the configuration of the run in `folder`, or raise SlimmableError if there is none, or names differ."""
    path = folder / CONFIG
    if not os.path.isfile(path):
        raise CheckpointError(f"{folder} is not the folder of a pre-training run: there is no {path}")
    with explained(f"{path} is not the configuration of a run"):
        values = dict(json.loads(read_text(path, _MOST_BYTES)))
    if differing := sorted({each.name for each in fields(PretrainConfig)} ^ set(values)):
        names = listed([f"{printable(name):.60}" for name in differing], 10)
        raise CheckpointError(f"{path} was written by another version: {names} missing or unknown")
    for each in fields(PretrainConfig):
        (one, several), value = kind_of(each), values[each.name]
        kinds = {list} if several else {int, float} if one is float else {one}
        if type(value) not in kinds | {type(each.default)}:  # a bool is no int
            raise CheckpointError(f"{path}: {each.name} cannot be {value!r:.80}")
    try:
        return PretrainConfig(**values)
    except SlimmableError as error:
        raise CheckpointError(f"{path}: {error}") from error


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
            raise UsageError(f"--data {data} no longer holds {files}; put them back, or start a new run")


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
    """Return the optimizer's state as tensors named `<parameter>.<name>`."""
    state = {name: optimizer.state.get(tensor, {}) for name, tensor in _parameters_of(optimizer).items()}
    found = {f"{parameter}.{name}": value for parameter, values in state.items() for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def load_optimizer_tensors(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], steps: Mapping[str, int], skipped: bool = False
) -> None:
    """Load what `optimizer_tensors` returned; the schedule sets the learning rates.

    Raises CheckpointError, and loads nothing, unless they are like those that a step of this optimizer makes, of the
    parameters in `steps`, which says how many steps each took, of which some may be `skipped`.
    """
    example, what = copy.deepcopy(optimizer), "the optimizer's state in the checkpoint"
    example.state.clear()
    for name, parameter in _parameters_of(example).items():
        parameter.grad = torch.zeros_like(parameter) if name in steps else None
    type(example).step.__wrapped__(example)  # type: ignore[attr-defined]  # without the hooks that watch all optimizers
    check_alike(optimizer_tensors(example), tensors, what)
    for name, count in steps.items():
        done = tensors.get(f"{name}.step")
        most = min(count, 2**24)  # where a float32 stops to count
        if done is not None and not (done <= most if skipped else done == most):
            raise CheckpointError(f"{what} counts {done:g} steps of {name}, the checkpoint {count}")
    for name, own in optimizer_tensors(example).items():  # in their memory layout, which fused optimizers need
        own.copy_(tensors[name])
    optimizer.load_state_dict(example.state_dict())


def _parameters_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the parameters in their order, by the optimizer's names for them."""
    groups = optimizer.param_groups
    return {name: each for group in groups for name, each in zip(group["param_names"], group["params"], strict=True)}


def trained_method(config: PretrainConfig, folder: Path, channels: int, digest: str | None = None) -> methods.Method:
    """Return the method of the run in `folder` with trained weights, in eval mode; `digest` is that of its images."""
    checkpoint = load_checkpoint(folder / CHECKPOINT)
    checkpoint.check_images(config.data, digest)
    scores = checkpoint.network.get("projector.bias", torch.empty(0))
    method = new_method(config, channels, scores.numel())  # the size of a classifier
    load_exactly(method.encoder, checkpoint.network, str(folder / CHECKPOINT))
    return method.eval()


def save_networks(folder: Path, config: PretrainConfig, method: methods.Method, channels: int) -> list[str]:
    """Write the networks of a run for `slimmable.load`: each width as a plain network, and networks of all widths.

    Returns: those of the latter that are left out, as timm's network keeps other channels, or does more with features.
    """
    backbone = method.backbone
    for width in config.widths:
        save(extract(backbone, width), folder / f"width-{width}.safetensors")
    if config.gate_budget is not None:
        save(backbone, folder / MODEL)
        return []
    whole = {MODEL: backbone} | ({CLASSIFIER: method.encoder} if config.method == "supervised" else {})
    return [name for name, network in whole.items() if not _save_whole(folder / name, config, network, channels)]


def _save_whole(path: Path, config: PretrainConfig, trained: nn.Module, channels: int) -> bool:
    """Write all widths of a backbone, or of an encoder that classifies, as timm makes it; return whether it can."""
    if isinstance(trained, methods.Encoder):
        head, state = trained.projector.state_dict(), trained.backbone.state_dict()
        network = converted_backbone(config, channels, len(head["bias"]))
        missing = network.state_dict().keys() - state.keys()
        state |= {name: head.get(name.rpartition(".")[2], head["bias"]) for name in missing}
    else:
        network, state = converted_backbone(config, channels), trained.state_dict()
    if differences(network.state_dict(), state):
        return False
    network.load_state_dict(state)
    images = torch.rand(2, channels, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    for width in config.widths:
        ours, theirs = (extract(each, width).cpu().eval()(images) for each in (network, trained))
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
            return False
    save(network, path)
    return True
