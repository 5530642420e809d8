"""The sizes that torch's own layers keep as attributes; an extracted layer must say what its weight has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

Cut = Mapping[str, Sequence[Sequence["int | tuple[int, ...] | None"]]]


def layer_sizes(module: nn.Module, cut: Cut, values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Return, for each size attribute of a torch layer that follows a cut tensor, its value at each width."""
    if "weight" not in cut:
        return {}
    shape = module._parameters["weight"].shape  # type: ignore[union-attr]

    def size(width: int, axis: int) -> int:
        kept = cut["weight"][width][axis]
        return int(shape[axis]) if kept is None else kept if isinstance(kept, int) else len(kept)

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
