"""Fine-tune an extracted network together with a new classifier on top of it."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from slimmable._checks import check_classes, check_features, check_labelled, checked
from slimmable._modules import in_eval_mode
from slimmable.errors import DataError, UsageError
from slimmable.evaluation import as_input
from slimmable.view.state import is_slim


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return the outputs of `model` for all images, in eval mode and float32; its modes stay."""
    with in_eval_mode(model):
        return torch.cat([model(as_input(model, batch)).float() for batch in torch.split(images, batch_size)])


def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose largest class score is that of their label."""
    check_labelled("accuracy_of: images", images, labels)
    scores = outputs_of(model, images)
    check_features("accuracy_of: scores", scores, labels)
    return float((scores.argmax(1) == labels.to(scores.device)).float().mean())


@checked
def finetune(
    backbone: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    epochs: int = 30,
    batch_size: int = 128,
    learning_rate: float = 0.02,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> nn.Sequential:
    """Train a copy of an extracted network and a new linear classifier on top of it; `backbone` is not changed.

    Cross-entropy; SGD with Nesterov momentum 0.9; a learning rate that falls to 0 by a cosine, step by step; weight
    decay on all weights but biases and those of norms. BatchNorms are in train mode, so their statistics are updated.
    The classifier starts from zero, and frozen parameters stay frozen. There is no augmentation.

    Args:
        backbone: images in, features of shape (batch, features) out, as `slimmable.extract` returns it for a width; the
            training runs on its device.
        images: of shape (images, channels, height, width), floats, or uint8 to be scaled to [0, 1].
        labels: class numbers of shape (images,).
        num_classes: number of classes; by default one more than the largest label.
        epochs, batch_size: batches differ by one image at most, so the last one is not a small rest.
        learning_rate: at the start.
        weight_decay: per step, times the learning rate.
        seed: for the order of the images and for dropout; the same seed gives the same network.

    Returns: `nn.Sequential` of `backbone` and `classifier`, in eval mode; `accuracy_of` measures it.

    Raises: UsageError: if `backbone` runs at several widths, or a number is out of its range. DataError: if images,
        labels or features do not fit.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    >>> images = torch.eye(4).reshape(4, 1, 2, 2).repeat(8, 1, 1, 1)
    >>> network = finetune(backbone, images, torch.arange(4).repeat(8))
    >>> network(images).argmax(1)[:4]
    tensor([0, 1, 2, 3])
    """
    from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

    if any(is_slim(module) for module in backbone.modules()):
        raise UsageError("finetune: the backbone runs at several widths; give slimmable.extract(backbone, width)")
    check_labelled("finetune: images", images, labels)
    classes = check_classes("finetune", labels, num_classes)
    features = outputs_of(backbone, images[:2])
    if features.ndim != 2:
        raise DataError(
            f"finetune: the backbone gives features of shape {tuple(features.shape)}, expected (batch, features)"
        )
    check_features("finetune: features of the first images", features, labels[:2])
    classifier = skip_init(nn.Linear, features.shape[1], classes, device=features.device)  # draws no random numbers
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    network = nn.Sequential(OrderedDict(backbone=copy.deepcopy(backbone), classifier=classifier)).train()
    optimizer = torch.optim.SGD(
        param_groups_weight_decay(network, weight_decay), lr=learning_rate, momentum=0.9, nesterov=True
    )
    steps = -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * steps))
    targets = labels.to(features.device)
    with torch.random.fork_rng([features.device] if features.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).tensor_split(steps):
                optimizer.zero_grad()
                scores = network(as_input(network, images[rows.to(images.device)]))
                F.cross_entropy(scores, targets[rows.to(targets.device)]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return network.eval()
