"""Runs of pre-training: the network, a timm backbone with a method around it, what it starts from, and the folder."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

import slimmable._small_resnet  # noqa: F401  adds it to timm's models
from slimmable import methods
from slimmable._atomic import read_tensors, write_tensors
from slimmable._checks import check_matrices
from slimmable._convert import extract, slimify
from slimmable._tables import differences, listed, listing
from slimmable._width import widths_of
from slimmable.cli.config import DIGITS, PretrainConfig, kind_of, printable, read_text, suggestion
from slimmable.errors import CheckpointError, ConversionError, SlimmableError, UsageError, explained
from slimmable.files.description import Tensors
from slimmable.files.model import load, read_weights, save
from slimmable.gating import gate
from slimmable.view.state import is_slim

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
MODEL = "model.safetensors"
CLASSIFIER = "classifier.safetensors"
_FORMAT = "slimmable pretrain 1"
TRAINING = "training."  # before the names of what a checkpoint holds besides the state dict of the network
_SOURCES = ("hf-hub:", "local-dir:")  # of models, as timm names them


@dataclass(frozen=True)
class Start:
    """Weights to start from: of the backbone, slimmable or plain, and of its linear classifier, if it has one."""

    backbone: Tensors
    slim: bool
    classifier: Tensors


def new_method(
    config: PretrainConfig, channels: int, classes: int, start: Start | None = None, teacher: nn.Module | None = None
) -> methods.Method:
    """Return the method of `config`, for so many classes or those of `teacher`, with random weights or `start`'s."""
    torch.manual_seed(config.seed)
    backbone, _ = make_backbone(config, channels)
    if teacher is not None:
        taught = output_for((channels, config.image_size, config.image_size), teacher, str(config.teacher))
        check_matrices(f"--teacher {config.teacher}", output=taught)
        classes = taught.shape[1]
        if start is not None and config.teach != "scores":  # perhaps it learns from the network that it starts from
            start = replace(start, classifier={"weight": torch.eye(classes), "bias": torch.zeros(classes)})
    method = build_method(config, backbone, channels, classes, start)
    if teacher is None:
        return method
    kind: Any = config.teach
    return methods.Distillation(method.encoder, teacher, kind=kind, temperature=config.temperature)


def make_backbone(config: PretrainConfig, channels: int, classes: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """Return a backbone of `config` as `make_timm` does, without a classifier, or with timm's for `classes`."""
    local = {"dynamic_img_size": True} if config.local_crops else {}  # if it can
    return make_timm(config.model, {"num_classes": classes, **local, "in_chans": channels}, config.image_size)


def build_method(
    config: PretrainConfig, backbone: nn.Module, channels: int, classes: int, start: Start | None = None
) -> methods.Method:
    """Return the method of `config` around `backbone`, which is converted together with its head; see `new_method`."""
    example = torch.zeros(2, channels, config.image_size, config.image_size)
    order = config.importance if start is not None and not start.slim and config.importance != "none" else None
    if start is not None and not start.slim:
        load_exactly(backbone, start.backbone, f"--init {config.init}")
    output = output_for(example.shape[1:], backbone, config.model)
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise UsageError(f"{config.model} does not output one feature vector per image; choose another --model")
    if config.local_crops:
        local = channels, config.local_crop_size, config.local_crop_size
        output_for(local, backbone, config.model, "--local-crop-size")
    features = output.shape[1]
    hidden, dim = config.proj_hidden_dim or features, config.proj_dim
    patches = getattr(backbone, "patch_embed", None)  # a vision transformer
    backbone.train()
    name = "supervised" if config.method == "distillation" else config.method  # it learns once it has a teacher
    kind: Any = {each.lower(): getattr(methods, each) for each in methods.__all__}[name]
    head: dict[str, Any] = {"batch_norm": patches is None} if name == "dino" else {}
    last: dict[str, Any] = {}
    if name == "mocov3" and isinstance(patches, nn.Module):
        patches.requires_grad_(False)  # frozen at random, it trains more stably (Chen et al. 2021, section 4)
        head, last = {"layers": 3}, {"last_norm": True}
    sizes = (features, classes) if name == "supervised" else (features, hidden, dim)
    projector = kind.projector(*sizes, **head)
    for layer in projector.modules():
        if isinstance(layer, nn.Linear) and config.head_std is not None:
            nn.init.normal_(layer.weight, std=config.head_std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if start is not None and not differences(projector.state_dict(), start.classifier):
        projector.load_state_dict(start.classifier)
    gated = config.gate_budget is not None
    if gated and len(config.widths) > 1:  # a head that takes the features of every width
        whole = methods.Encoder(copy.deepcopy(backbone), projector)
        projector = _slimmed(config, whole, example, order).get_submodule("projector")
    plain = backbone if gated else methods.Encoder(backbone, projector)  # the head has no gates, no cost
    encoder = _slimmed(config, plain, example, order)
    if start is not None and start.slim:
        load_exactly(backbone, start.backbone, f"--init {config.init}")
    if gated:
        try:
            encoder = methods.Encoder(gate(encoder, example_inputs=example, inplace=True), projector)
        except ConversionError as error:
            raise UsageError(f"--gate-budget needs a --model that can be gated: {error}") from error
    parts = [encoder]
    if hasattr(kind, "predictor"):
        inner = max(1, dim // 4) if name == "simsiam" else hidden
        parts.append(_slimmed(config, kind.predictor(inner, dim, **last), torch.zeros(2, dim)))
    known = {**asdict(config), "momentum": config.ema_momentum, "bn_splits": config.key_parts}
    known["freeze"] = 1 / config.epochs
    method: methods.Method = kind(*parts, **{each: known[each] for each in signature(kind).parameters if each in known})
    return method


def _slimmed(config: PretrainConfig, network: nn.Module, example: Tensor, order: str | None = None) -> nn.Module:
    rules: dict[str, Any] = {"universal": config.universal, "importance": order, "inplace": True}
    rules |= {"rounding": config.rounding, "round_to": config.round_to}
    return slimify(network, config.widths, example_inputs=example, **rules)


def output_for(image: Sequence[int], model: nn.Module, name: str, option: str = "--image-size") -> Any:
    """Return the output of `model` in eval mode, or raise SlimmableError if it does not accept images of this shape."""
    size, images = " x ".join(map(str, image[1:])), torch.zeros(2, *image)
    with torch.no_grad(), explained(f"{name} does not accept images of {size} pixels", f"; choose another {option}"):
        return model.eval()(images)


def make_timm(name: str, settings: Mapping[str, Any], image_size: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the timm model `name` and the settings it took, with `image_size` if it is for images of one size."""
    check_name(name)
    pretrained = settings.get("pretrained")
    if pretrained and not name.startswith(_SOURCES) and not getattr(timm.get_pretrained_cfg(name), "has_weights", 0):
        raise UsageError(f"timm has no pretrained weights for {name}; leave them out, or give a file of them")
    sized = {**settings} if image_size is None else {**settings, "img_size": image_size}
    asked = f" with {', '.join(f'{key}={value!r}' for key, value in sized.items())}" if sized else ""
    advice = "; where its weights cannot be downloaded, give a file: --checkpoint or --init" if pretrained else ""
    sizes = [key for key in ("dynamic_img_size", "img_size") if key in sized]
    with explained(f"timm cannot make the model {name!r}{asked}", advice, UsageError):
        while True:
            try:
                return timm.create_model(name, **sized), sized
            except TypeError:  # a model for images of any size has neither
                if not sizes:
                    raise
                del sized[sizes.pop(0)]


def check_name(name: str) -> None:
    """Raise UsageError if timm has no model of this name, unless it is of the Hub or a folder; suggest one."""
    architecture = name.split(".")[0]
    if not name.startswith(_SOURCES) and not timm.is_model(architecture):
        similar = suggestion(architecture, timm.list_models())
        raise UsageError(f"timm has no model {name!r}; timm.list_models() lists the names{similar}")


def read_config(folder: Path) -> PretrainConfig:
    """Return the configuration of the run in `folder`, or raise SlimmableError if there is none, or names differ."""
    path = folder / CONFIG
    if not os.path.isfile(path):
        raise CheckpointError(f"{folder} is not the folder of a pre-training run: there is no {path}")
    with explained(f"{path} is not the configuration of a run"):
        values = dict(json.loads(read_text(path, 2**20)))
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


def save_checkpoint(path: Path, tensors: Tensors, step: int, images: str | None = None) -> None:
    """Write the checkpoint, or raise CheckpointError and leave an earlier one at `path` as it was."""
    metadata = {"format": _FORMAT, "step": str(step)} | ({} if images is None else {"images": images})
    write_tensors(path, tensors, metadata)


def load_checkpoint(path: Path, images: str | None = None) -> tuple[dict[str, Tensor], int]:
    """Return the tensors that `save_checkpoint` wrote and the number of steps done; refuse those of other images."""
    metadata, tensors = read_tensors(path, _FORMAT, "slimmable pretrain")
    with explained(f"{path} is damaged", kind=CheckpointError):
        step = int(metadata["step"])
    if images and images != (then := metadata.get("images", images)):
        files = f"the files of the run (then {then}; now {images})"
        raise UsageError(f"--data no longer holds {files}; put them back, or start a new run")
    return tensors, step


def check_alike(expected: Tensors, given: Tensors, what: str) -> None:
    """Raise CheckpointError unless the tensors have the expected names, shapes and types, and are finite."""
    if found := differences(expected, given, most=10):
        raise CheckpointError(f"{what} belongs to another model or other widths:{found}")
    pairs = [(name, own, given[name]) for name, own in expected.items()]
    types = [f"{name} {its.dtype}, expected {own.dtype}" for name, own, its in pairs if its.dtype != own.dtype]
    broken = [name for name, own, its in pairs if own.isfinite().all() and not its.isfinite().all()]
    if found := listing({"of another type": types, "infinite or NaN": broken}, 10):
        raise CheckpointError(f"{what} holds what no training leaves:{found}")


def load_exactly(module: nn.Module, tensors: Tensors, what: str) -> None:
    """Load `tensors` into `module`, or change nothing and raise CheckpointError with the differences."""
    check_alike(module.state_dict(), tensors, what)
    module.load_state_dict(dict(tensors))


def trained_method(config: PretrainConfig, folder: Path, channels: int, digest: str | None = None) -> methods.Method:
    """Return the method of the run in `folder` with trained weights, in eval mode; `digest` is that of its images."""
    tensors, _ = load_checkpoint(folder / CHECKPOINT, digest)
    network = {name: tensor for name, tensor in tensors.items() if not name.startswith(TRAINING)}
    method = new_method(config, channels, len(network.get("projector.bias", ())))  # the size of a classifier
    load_exactly(method.encoder, network, str(folder / CHECKPOINT))
    return method.eval()


def save_networks(folder: Path, config: PretrainConfig, method: methods.Method, channels: int) -> list[str]:
    """Write each width as a plain network, and whole ones as timm makes them; return those that timm cannot make."""
    backbone, left_out = method.backbone, []
    for width in config.widths:
        save(extract(backbone, width), folder / f"width-{width}.safetensors")
    if config.gate_budget is not None:
        save(backbone, folder / MODEL)
        return []
    images = torch.rand(2, channels, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    whole = {MODEL: backbone} | ({CLASSIFIER: method.encoder} if config.method == "supervised" else {})
    for name, trained in whole.items():
        head: dict[str, Tensor] = {} if trained is backbone else method.encoder.get_submodule("projector").state_dict()
        plain, _ = make_backbone(config, channels, len(head.get("bias", ())))
        network, state = _slimmed(config, plain, images), backbone.state_dict()
        for key in network.state_dict().keys() - state.keys() if head else ():
            state[key] = head.get(key.rpartition(".")[2], head["bias"])
        if not differences(network.state_dict(), state):
            network.load_state_dict(state)
            at = ([extract(each, width).cpu().eval()(images) for each in (network, trained)] for width in config.widths)
            if all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) for ours, theirs in at):
                save(network, folder / name)
                continue
        left_out.append(name)
    return left_out


def read_start(config: PretrainConfig, channels: int) -> Start:
    """Return the weights of `--init`, all of which `new_method` compares with the network before it uses them."""
    name = str(config.init)
    if name != "pretrained" and not os.path.exists(name):
        raise UsageError(f"--init {name} is neither pretrained, nor a file of weights, nor the folder of a run")
    with torch.device("meta"):
        whole, bare = (make_backbone(config, channels, classes)[0].state_dict() for classes in (2, 0))
    of_head = whole.keys() - bare.keys()
    try:
        network = _network(config.model if name == "pretrained" else name, channels, config.image_size)
        slim = any(map(is_slim, network.modules())) and len(widths_of(network)) > 1
        tensors = network.state_dict()
        if isinstance(network, methods.Encoder):
            tensors, of_head = network.backbone.state_dict() | network.projector.state_dict(), {"weight", "bias"}
    except CheckpointError:
        if not os.path.isfile(name):
            raise
        tensors = read_weights(name, "--init")
        slim = any(".narrow." in key for key in tensors)
    classifier = {key.rpartition(".")[2]: tensors.pop(key) for key in of_head & tensors.keys()}
    return Start(tensors, slim, classifier)


def make_teacher(config: PretrainConfig, channels: int) -> nn.Module:
    """Return the plain network of `--teacher`, on images as the run has them: class scores out, or features."""
    name, run = str(config.teacher), Path(str(config.teacher))
    model = _network(name, channels, config.image_size)
    own = read_config(run) if os.path.exists(run / CONFIG) else normalised(replace(config, mean=None, std=None), model)
    model = extract(model, 1.0) if any(map(is_slim, model.modules())) else model
    if config.teach == "scores":
        if getattr(model, "num_classes", None) == 0:
            raise UsageError(f"--teach scores: {name} has no classifier; choose cosine or mse")
    elif isinstance(model, methods.Encoder):
        model = model.backbone
    else:
        model.reset_classifier(0)  # type: ignore[operator]
    both = [(torch.tensor(each.mean or (0.0,)), torch.tensor(each.std or (1.0,))) for each in (config, own)]
    (mean, std), (own_mean, own_std) = both
    return nn.Sequential(v2.Normalize(((own_mean - mean) / std).tolist(), (own_std / std).tolist()), model)


def normalised(config: PretrainConfig, network: nn.Module) -> PretrainConfig:
    """Return the settings with the mean and the standard deviation that timm has for the network, if none are given."""
    known: Any = {} if config.data == DIGITS else network.pretrained_cfg
    found = [tuple(known.get(name, (usual,))) for name, usual in (("mean", 0.0), ("std", 1.0))]
    if config.channels == 1:
        found = [(sum(values) / len(values),) for values in found]
    return replace(config, mean=config.mean or found[0], std=config.std or found[1])


def _network(source: str, channels: int, image_size: int) -> nn.Module:
    """Return the encoder or backbone of a run, the network in a file, or a timm model with its own weights."""
    path = Path(source)
    if os.path.exists(path / CONFIG):
        method = trained_method(config := read_config(path), path, channels)
        return method.encoder if config.method == "supervised" else method.backbone
    if os.path.isfile(path):
        return load(path)
    return make_timm(source, {"in_chans": channels, "pretrained": True}, image_size)[0]
