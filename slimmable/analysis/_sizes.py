"""The sizes that torch's own layers keep as attributes; an extracted layer must say what its weight has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slimmable.analysis.plan import Kept, Plan

Cut = Mapping[str, Sequence[Sequence[Kept]]]


def kept_of(size: int, kept: Kept) -> int:
    """Return how many units of an axis of this size are kept."""
    return size if kept is None else kept if isinstance(kept, int) else len(kept)


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


def feature_sizes(model: nn.Module, plan: Plan) -> dict[str, list[int]]:
    """Return the sizes of a timm model's features at each width, for the attributes that say them at full width.

    They are the input of the classifier, or the output of a model without one.
    """
    get_classifier: Any = getattr(model, "get_classifier", None)
    head = get_classifier() if callable(get_classifier) else None
    path = next((path for path, module in model.named_modules() if module is head), None)
    if isinstance(head, nn.Linear):
        sizes = [kept_of(head.in_features, axes[1]) for axes in plan.tensors[str(path), "weight"]]
    elif plan.output_shapes[0] and len(plan.output_shapes[0][0]) > 1:
        sizes = [shapes[0][1] for shapes in plan.output_shapes]
    else:
        return {}
    names = ("num_features", "head_hidden_size", "embed_dim")
    return {name: sizes for name in names if model.__dict__.get(name) == sizes[0]}
