"""Checkpoints of the published SlimCLR code, loaded as slimmable timm networks."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimmable._convert import copy_of, slimify
from slimmable._tables import differences
from slimmable._widths import WIDTHS, check_widths
from slimmable.errors import CheckpointError
from slimmable.files.model import filled, is_plain, read_weights
from slimmable.layers import SwitchableProbe

_BLOCKS = (3, 4, 6, 3)  # per stage of ResNet-50; the published code numbers them consecutively


def load_slimclr(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any], *, widths: Iterable[float] = WIDTHS
) -> nn.Module:
    """Return timm's `resnet50`, made slimmable, with the weights of a checkpoint of the published SlimCLR code.

    Pre-training checkpoints (MoCo v2, MoCo v3, SimCLR) yield the trained encoder without its projection head:
    (N, 3, H, W) -> features (N, kept of 2048). The momentum encoder, predictor, queue and optimizer are left out.
    Linear-evaluation checkpoints have one classifier per width, which become the `SwitchableProbe` `model.fc`:
    (N, 3, H, W) -> scores (N, 1000). Call `model.reset_classifier(0)` to remove it; `save` then accepts the model.
    Checkpoints of supervised training keep their sliced classifier.

    The model is on the CPU, in float32, at its full width and in evaluation mode. Prepare images as the authors did:
    shorter side 256, center crop 224, ImageNet mean and standard deviation.

    Args:
        checkpoint: path of the file, or the result of `torch.load` or `state_dict`, with or without the `module.`
            prefix of parallel training and the other entries of a training checkpoint. Nothing in a file is executed.
        widths: those of the training; by default, of the released networks. Sub-networks must share their weights
            (`overlap_weight` 1, as in the authors' scripts), which a checkpoint does not show.

    Raises: CheckpointError: if the file is missing, damaged or holds other objects, or is of another network.

    Source: Zhao et al., Slimmable Networks for Contrastive Self-supervised Learning, IJCV 2024, arXiv 2209.15525.

    >>> part = {"module.encoder_q.features.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    >>> load_slimclr({"epoch": 200, "state_dict": part})
    Traceback (most recent call last):
    slimmable.errors.CheckpointError: the checkpoint has 1 residual block; only ResNet-50, with 16, can be loaded
    """
    import timm

    checked, source = check_widths(widths), "the checkpoint"
    if isinstance(checkpoint, (str, os.PathLike)):
        source, tensors = str(checkpoint), read_weights(checkpoint, "load_slimclr")
    else:
        tensors = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    given = _encoder(source, tensors)
    switched = "fc.linears.0.weight" in given
    scores = given.get("fc.linears.0.weight" if switched else "fc.weight")
    classes = 0 if scores is None else next(iter(scores.shape), 0)
    with torch.device("meta"):  # no memory before all tensors have been compared
        plain = timm.create_model("resnet50", num_classes=0 if switched else classes)
        model = slimify(plain, checked, rounding="floor", inplace=True)
        if switched:
            model.fc = SwitchableProbe(2048, classes, checked, rounding="floor")
            vars(model)["num_classes"] = classes
    own = {_published(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    if differing := differences(own, given):
        what = f"{source} is not a ResNet-50 of the published SlimCLR code with widths {checked}"
        raise CheckpointError(f"{what}; if it has others, pass widths={differing}")
    return copy_of(model, {id(own[name]): filled(own[name], given[name], own[name].dtype) for name in own}).eval()


def _published(name: str) -> str:
    """Return the published name of an entry: `features.3.shortcut.1.bn.1` for `layer2.0.downsample.1.narrow.0`."""
    name = re.sub(r"^layer(\d)\.(\d+)", lambda at: f"features.{sum(_BLOCKS[: int(at[1]) - 1]) + int(at[2])}", name)
    name = name.replace("downsample", "shortcut")
    name = re.sub(r"narrow\.(\d+)", lambda at: f"bn.{int(at[1]) + 1}", name)
    return re.sub(r"(bn\d|shortcut\.1)\.(?!bn)", r"\1.bn.0.", name)


def _encoder(source: str, tensors: Any) -> dict[str, Tensor]:
    """Return the entries that belong to the published code's ResNet-50, without a projection head, or refuse it."""
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{source} holds no state dict, but a {type(tensors).__name__}")
    if other := [f"{name!s:.80}" for name, each in tensors.items() if not (isinstance(name, str) and is_plain(each))]:
        raise CheckpointError(f"{source} holds more than named plain tensors: {', '.join(other[:5])}")
    names = {re.sub(r"^(module\.)+", "", name): tensor for name, tensor in tensors.items()}
    head = r"fc\.\d"  # a projection head is a sequence of layers
    for prefix in ("encoder_q.", "base_encoder."):  # MoCo v2 and SimCLR, MoCo v3
        if part := {name.removeprefix(prefix): each for name, each in names.items() if name.startswith(prefix)}:
            names, head = part, r"fc\."  # under these prefixes, any `fc` is a projection head
    network = {name: tensor for name, tensor in names.items() if not re.match(head, name)}
    blocks = {name.split(".")[1] for name in network if name.startswith("features.")}
    if not blocks:
        hint = "it has names such as features.0.conv1.weight and bn1.bn.0.weight"
        if any(name.startswith("layer1.") for name in network):
            hint = "this may be a network that is not slimmable; load it into one that slimmable.slimify has converted"
        found = ", ".join(list(network)[:3]) or "nothing"
        raise CheckpointError(f"{source} has no network of the published SlimCLR code: it holds {found}; {hint}")
    if len(blocks) != sum(_BLOCKS):
        count = f"{len(blocks)} residual block{'s' * (len(blocks) > 1)}"
        raise CheckpointError(f"{source} has {count}; only ResNet-50, with {sum(_BLOCKS)}, can be loaded")
    return network
