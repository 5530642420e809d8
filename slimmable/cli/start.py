"""What a run starts from: the weights of `--init`, and the network of `--teacher`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from slimmable._convert import extract
from slimmable._width import widths_of
from slimmable.cli.config import DIGITS, PretrainConfig
from slimmable.cli.run import CONFIG, Start, make_timm, read_config, timm_backbone, trained_method
from slimmable.errors import CheckpointError, UsageError, explained
from slimmable.files.model import load
from slimmable.methods import Encoder
from slimmable.view.state import is_slim


def read_start(config: PretrainConfig, channels: int) -> Start:
    """Return the weights of `--init`, all of which `new_method` compares with the network before it uses them."""
    name = str(config.init)
    if name != "pretrained" and not os.path.exists(name):
        raise UsageError(f"--init {name} is neither pretrained, nor a file of weights, nor the folder of a run")
    with torch.device("meta"):
        whole, bare = (timm_backbone(config.model, channels, config.image_size, num_classes=n) for n in (2, 0))
    of_head = whole.state_dict().keys() - bare.state_dict().keys()
    try:
        network = _network(config.model if name == "pretrained" else name, channels, config.image_size)
        slim = any(map(is_slim, network.modules())) and len(widths_of(network)) > 1
        tensors = network.state_dict()
    except CheckpointError:
        if not os.path.isfile(name):
            raise
        tensors = read_weights(Path(name), "--init")
        slim = any(".narrow." in key for key in tensors)
    else:
        if isinstance(network, Encoder):
            tensors, of_head = network.backbone.state_dict() | network.projector.state_dict(), {"weight", "bias"}
    classifier = {key.rpartition(".")[2]: tensors.pop(key) for key in of_head & tensors.keys()}
    return Start(tensors, slim, classifier)


def make_teacher(config: PretrainConfig, channels: int) -> nn.Module:
    """Return the plain network of `--teacher`, on images as the run has them: class scores out, or features."""
    name, run = str(config.teacher), Path(str(config.teacher))
    network = _network(name, channels, config.image_size)
    own = normalised(replace(config, mean=None, std=None), network)
    own = read_config(run) if os.path.exists(run / CONFIG) else own
    network = extract(network, 1.0) if any(map(is_slim, network.modules())) else network
    if config.teach == "scores":
        if getattr(network, "num_classes", None) == 0:
            raise UsageError(f"--teach scores: {name} has no classifier; choose cosine or mse")
    elif isinstance(network, Encoder):
        network = network.backbone
    else:
        network.reset_classifier(0)  # type: ignore[operator]
    both = [(torch.tensor(each.mean or (0.0,)), torch.tensor(each.std or (1.0,))) for each in (config, own)]
    (mean, std), (own_mean, own_std) = both
    return nn.Sequential(v2.Normalize(((own_mean - mean) / std).tolist(), (own_std / std).tolist()), network)


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
