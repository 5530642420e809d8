"""What a run starts from: the weights of `--init`, and the network of `--teacher`."""

import os
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slimmable._convert import extract
from slimmable._width import widths_of
from slimmable.cli.config import PRETRAINED, PretrainConfig, explained
from slimmable.cli.run import CONFIG, Start, check_model, make_timm, read_config, timm_backbone, trained_method
from slimmable.errors import CheckpointError, UsageError
from slimmable.files.model import load
from slimmable.methods import Encoder
from slimmable.view.state import is_slim


def read_start(config: PretrainConfig, channels: int) -> Start:
    """Return the weights of `--init`, all of which `new_method` compares with the network before it uses them."""
    name = str(config.init)
    with torch.device("meta"):
        names = [
            {*timm_backbone(config.model, channels, config.image_size, num_classes=n).state_dict()} for n in (2, 0)
        ]
    of_head = names[0] - names[1]
    if not os.path.exists(name) and name != PRETRAINED:
        raise UsageError(f"--init {name} is neither {PRETRAINED}, nor a file of weights, nor the folder of a run")
    if os.path.isfile(name) and not _is_saved(name):
        tensors = read_weights(Path(name), "--init")
        slim = any(".narrow." in key for key in tensors)
    else:
        network = _network(config.model if name == PRETRAINED else name, channels, config.image_size)
        slim = any(map(is_slim, network.modules())) and len(widths_of(network)) > 1
        tensors = network.state_dict()
        if isinstance(network, Encoder):
            tensors, of_head = network.backbone.state_dict() | network.projector.state_dict(), {"weight", "bias"}
    head = {key.rpartition(".")[2]: tensors.pop(key) for key in of_head & tensors.keys()}
    return Start(tensors, slim, head, f"timm's weights of {config.model}" if name == PRETRAINED else name)


def make_teacher(config: PretrainConfig, channels: int) -> nn.Module:
    """Return the plain network of `--teacher`: images in, class scores out, or features."""
    network = _network(str(config.teacher), channels, config.image_size)
    network = extract(network, 1.0) if any(map(is_slim, network.modules())) else network
    if config.teach == "scores":
        if getattr(network, "num_classes", None) == 0:
            raise UsageError(f"--teach scores: {config.teacher} has no classifier; choose cosine or mse")
    elif isinstance(network, Encoder):
        network = network.backbone
    else:
        network.reset_classifier(0)  # type: ignore[operator]
    return network


def _network(source: str, channels: int, image_size: int) -> nn.Module:
    """Return the encoder or backbone of a run, the network in a file, or a timm model with its own weights."""
    path = Path(source)
    if os.path.exists(path / CONFIG):
        method = trained_method(config := read_config(path), path, channels)
        return method.encoder if config.method == "supervised" else method.backbone
    if os.path.isfile(path):
        return load(path)
    check_model(source)
    return make_timm(source, {"in_chans": channels, "pretrained": True}, image_size)[0]


def _is_saved(path: str) -> bool:
    """Return whether a file calls itself one of `slimmable.save`."""
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("format")).startswith("slimmable ")
    except (SafetensorError, OSError):
        return False


def read_weights(path: Path, option: str) -> dict[str, Tensor]:
    """Return the tensors in a file of torch.save or safetensors, floats as float32; `option` has named it."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{option}: there is no file {path}")
    with explained(f"{path} is not a file of weights"):
        tensors: dict[str, Tensor] = timm.models.load_state_dict(str(path), weights_only=True)
    if not all(map(_is_plain, tensors.values())):
        raise CheckpointError(f"{path} is not a file of weights: it holds more than plain tensors")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _is_plain(value: object) -> bool:
    """Return whether a value is a tensor of numbers on the CPU, whose memory holds each of them."""
    if not isinstance(value, Tensor) or value.is_quantized or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()
