"""What the benchmarks that train share: views that all arms see, and few labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from slimmable import at_width, widths_of
from slimmable.cli.data import Plain, Views
from slimmable.cli.evaluation import features_in

Known = dict[tuple[int, int], list[torch.Tensor]]  # views and a label, by image and draw


class Kept(Views):
    """Views that are drawn once and kept, as bytes, for the next run with the same seed: all arms see the same ones."""

    def __init__(self, views: Views, known: Known) -> None:
        super().__init__(views.images, views.labels, views.transforms, views.seed)
        self.known = known

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        new = [key for key in keys if len(self.known.get(key, ())) <= len(self.transforms)]  # views, and a label
        if new:
            *drawn, labels = super().__getitems__(new)
            kept = [view.mul(255).round().to(torch.uint8) for view in drawn]
            self.known |= {key: list(row) for key, *row in zip(new, *kept, labels, strict=True)}
        *views, labels = (torch.stack(each) for each in zip(*(self.known[key] for key in keys), strict=True))
        return [*(view.float() / 255 for view in views[: len(self.transforms)]), labels]


def few_of_each(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return the numbers of `count` images of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == number][:count] for number in labels.unique()])


def first_of(images: torch.Tensor, size: int, most: int) -> Plain:
    """Return the first `most` images, of one size."""
    return Plain(images[:most], size)


def features_at_widths(backbone: nn.Module, images: Plain) -> dict[float, torch.Tensor]:
    """Return the features at each width."""
    return features_in({width: partial(at_width, backbone, width) for width in widths_of(backbone)}, backbone, images)[
        0
    ]
