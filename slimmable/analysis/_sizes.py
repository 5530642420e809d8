"""The sizes that torch's own layers keep as attributes; an extracted layer must say what its weight has."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slimmable._widths import Kept, kept_of
from slimmable.analysis.channels import SubNetwork

Cut = Mapping[str, Sequence[Sequence[Kept]]]


def layer_sizes(module: nn.Module, cut: Cut, values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Return, for each size attribute of a torch layer that follows a cut tensor, its value at each width."""
    if "weight" not in cut:
        return {}
    shape = module._parameters["weight"].shape  # type: ignore[union-attr]

    def size(width: int, axis: int) -> int:
        return kept_of(int(shape[axis]), cut["weight"][width][axis])

    widths = range(len(cut["weight"]))
    found: dict[str, list[Any]] = {}
    if isinstance(module, nn.Linear):
        found = {"out_features": [size(w, 0) for w in widths], "in_features": [size(w, 1) for w in widths]}
    elif isinstance(module, nn.modules.conv._ConvNd):
        groups = values.get("groups", [module.groups] * len(widths))
        plain, grouped = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        found = {plain: [size(w, 0) for w in widths], grouped: [size(w, 1) * groups[w] for w in widths]}
    elif isinstance(module, nn.Embedding):
        found = {"embedding_dim": [size(w, 1) for w in widths]}
    elif isinstance(module, nn.GroupNorm):
        found = {"num_channels": [size(w, 0) for w in widths]}
    return {name: sizes for name, sizes in found.items() if name not in values and name in module.__dict__}


def feature_sizes(model: nn.Module, full: SubNetwork, columns: Sequence[SubNetwork]) -> dict[str, list[Any]]:
    """Return what a timm model says of its features, true in each sub-network, by the attribute that says it.

    The sizes are the input of the classifier, or the output of a model without one; a model made with `features_only`
    has them in its `feature_info`.
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
    """Copy the `feature_info` of a model, with the channels that its outputs have in a sub-network."""
    info: Any = copy.deepcopy(model.feature_info)
    for index, before, now in zip(info.out_indices, full.output_shapes, column.output_shapes, strict=True):
        entry = info.info[index]
        for size, kept in zip(before[1:], now[1:], strict=True):
            if size == entry["num_chs"] and kept < size:
                entry["num_chs"] = kept
    return info
