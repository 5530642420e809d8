"""What goes into a method, and what comes out of it at each width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from slimmable.errors import DataError, UsageError


@dataclass
class Outcome:
    """What a method makes of a batch at one width.

    `loss` is the scalar of the method; `logits` and `embeddings` are what the distillation can compare between widths,
    each entry of shape (rows, classes), one for each direction or view.
    """

    loss: Tensor
    logits: Sequence[Tensor] = ()
    embeddings: Sequence[Tensor] = ()


@dataclass
class Batch:
    """The views of a batch of images, each of shape (batch, channels, height, width), and labels where they count."""

    views: Sequence[Tensor]
    labels: Tensor | None = None
    targets: Sequence[Tensor] = field(default=())  # what `prepare` found, once for all widths; while a step runs


def check_batch(name: str, batch: Batch, views: int) -> None:
    """Refuse a batch that has not this number of views, with one entry for each image.

    Raises: UsageError or DataError.
    """
    if not isinstance(batch, Batch):
        raise UsageError(f"{name}.step: batch must be a Batch(views, labels), got {type(batch).__name__}")
    if len(batch.views) != views:
        raise UsageError(f"{name}: takes {views} views of each image, got {len(batch.views)}")
    for view in batch.views:
        if not isinstance(view, Tensor) or not view.ndim:
            raise DataError(f"{name}.step: a view must be a tensor of shape (batch, ...), got {view!r}")
    if len({len(view) for view in batch.views}) > 1:
        shapes = " and ".join(str(tuple(view.shape)) for view in batch.views)
        raise DataError(f"{name}.step: views have shapes {shapes}; row i of each must belong to the same image")
