"""Size attributes such as `in_features`, which must agree with the weights of an extracted layer or model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slimmable._modules import tensors_of
from slimmable._widths import Kept, kept_of
from slimmable.analysis.channels import SubNetwork

Cut = Mapping[str, Sequence[Sequence[Kept]]]


def size_axes(module: nn.Module) -> dict[str, int]:
    """Return attribute -> axis of the weight; axis 1 of a convolution's is the attribute divided by `groups`.

    >>> size_axes(nn.Conv2d(4, 8, 3))
    {'out_channels': 0, 'in_channels': 1}
    """
    if isinstance(module, nn.Linear):
        return {"out_features": 0, "in_features": 1}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"in_channels": 0, "out_channels": 1} if module.transposed else {"out_channels": 0, "in_channels": 1}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": 1}
    return {"num_channels": 0} if isinstance(module, nn.GroupNorm) else {}


def layer_sizes(module: nn.Module, cut: Cut, values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Return size attribute -> its value at each width, if the module is a torch layer with a cut weight."""
    if "weight" not in cut:
        return {}
    shape, kept = tensors_of(module)["weight"].shape, cut["weight"]
    groups = values.get("groups", [getattr(module, "groups", 1)] * len(kept))
    return {
        name: [kept_of(int(shape[axis]), keep[axis]) * (groups[w] if axis else 1) for w, keep in enumerate(kept)]
        for name, axis in size_axes(module).items()
        if name not in values and name in module.__dict__
    }


def feature_sizes(model: nn.Module, full: SubNetwork, columns: Sequence[SubNetwork]) -> dict[str, list[Any]]:
    """Return attribute -> its value in each sub-network, for the attributes of timm models that size their features.

    These are the inputs of the classifier, or the outputs if there is none; a model made with `features_only` has a
    `feature_info` instead.
    """
    if hasattr(model.__dict__.get("feature_info"), "out_indices"):
        return {"feature_info": [_narrow_info(model, full, column) for column in columns]}
    get_classifier: Any = getattr(model, "get_classifier", None)
    head = get_classifier() if callable(get_classifier) else None
    path = next((path for path, module in model.named_modules() if module is head), None)
    if isinstance(head, nn.Linear):
        whole = head.in_features
        sizes = [kept_of(whole, column.tensors[str(path), "weight"][1]) for column in columns]
    elif full.output_shapes and len(full.output_shapes[0]) > 1:
        whole = full.output_shapes[0][1]
        sizes = [column.output_shapes[0][1] for column in columns]
    else:
        return {}
    names = ("num_features", "head_hidden_size", "embed_dim")
    return {name: sizes for name in names if model.__dict__.get(name) == whole}


def _narrow_info(model: nn.Module, full: SubNetwork, column: SubNetwork) -> Any:
    """Return a model's `feature_info` with the channels that its outputs have in a sub-network."""
    info: Any = copy.deepcopy(model.feature_info)
    for index, before, now in zip(info.out_indices, full.output_shapes, column.output_shapes, strict=True):
        entry = info.info[index]
        for size, kept in zip(before[1:], now[1:], strict=True):
            if size == entry["num_chs"] and kept < size:
                entry["num_chs"] = kept
    return info
