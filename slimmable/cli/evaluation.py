"""Evaluation of a trained network: features of every width in one pass over the images, then the probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from slimmable._modules import in_eval_mode
from slimmable._width import at_width, widths_of
from slimmable.cli.config import PretrainConfig
from slimmable.cli.images import Images
from slimmable.cli.loader import Plain, batches_of
from slimmable.evaluation import Accuracies, accuracy_of, evaluate_features, finetune, knn_accuracy
from slimmable.evaluation.evaluate import ProbeName, narrowest_first

Key = TypeVar("Key")
Setting = Callable[[], AbstractContextManager[Any]]


def features_at_widths(backbone: nn.Module, images: Plain | Subset[Tensor], workers: int = 0) -> dict[float, Tensor]:
    """Return width -> features in eval mode, of shape (images, features), float32, on the CPU."""
    return features_in(
        {width: partial(at_width, backbone, width) for width in widths_of(backbone)}, backbone, images, workers
    )


@torch.no_grad()
def features_in(
    settings: Mapping[Key, Setting], backbone: nn.Module, images: Plain | Subset[Tensor], workers: int = 0
) -> dict[Key, Tensor]:
    """Return the features of the backbone in each setting, as `features_at_widths` does.

    Args:
        settings: by name, what makes the block that a forward runs in.
        backbone, images, workers: as they say.
    """
    device = next(backbone.parameters()).device
    parts: dict[Key, list[Tensor]] = {name: [] for name in settings}
    with in_eval_mode(backbone):
        for batch in batches_of(images, workers=workers):
            scaled = batch.to(device)
            for name, setting in settings.items():
                with setting():
                    parts[name].append(backbone(scaled).float().cpu())
    return {name: torch.cat(found) for name, found in parts.items()}


def evaluate_backbone(
    config: PretrainConfig, backbone: nn.Module, images: Images, probes: Sequence[ProbeName], workers: int = 0
) -> dict[float, Accuracies]:
    """Return width -> accuracies on the held-out images."""
    train, test = (
        narrowest_first(backbone, features_at_widths(backbone, Plain(part, config.image_size), workers))
        for part in (images.train, images.test)
    )
    return evaluate_features(train, images.train_labels, test, images.test_labels, probes=probes)


def pixels_accuracy(config: PretrainConfig, images: Images) -> float:
    """Return the accuracy of kNN on the pixels, at no more than 32 x 32 of them."""
    size = min(config.image_size, 32)
    train, test = (Plain(part, size).stacked() for part in (images.train, images.test))
    return knn_accuracy(train, images.train_labels, test, images.test_labels)


def finetuned_accuracies(
    config: PretrainConfig, networks: Mapping[Key, nn.Module], images: Images, epochs: int
) -> dict[Key, float]:
    """Return the accuracy of each of the networks after fine-tuning with a classifier on top."""
    train, test = (Plain(part, config.image_size).stacked() for part in (images.train, images.test))
    found = {}
    for name, network in networks.items():
        classifier = finetune(
            network,
            train,
            images.train_labels,
            num_classes=len(images.classes),
            epochs=epochs,
            seed=config.seed,
        )
        found[name] = accuracy_of(classifier, test, images.test_labels)
    return found
