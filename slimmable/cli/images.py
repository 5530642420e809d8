"""The images that the commands train and evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class ImageSet(Protocol):
    """Images by number: uint8, shape (channels, height, width), of any sizes; a tensor of all of them is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Images:
    """Training and held-out images with their classes.

    The labels have shape (images,) and dtype int64; but for supervised training they are for evaluation only.
    `handwriting` says that the images are glyphs, which a mirror would spoil. `digest` tells the files of a folder from
    others: their number and a hash of their names.
    """

    train: ImageSet
    train_labels: Tensor
    test: ImageSet
    test_labels: Tensor
    classes: tuple[str, ...]
    channels: int = 3
    handwriting: bool = False
    digest: str | None = None
