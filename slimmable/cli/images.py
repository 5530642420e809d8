"""The images that the commands train and evaluate on: held in memory, one byte per channel and pixel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Training and held-out images with their classes.

    `train` and `test` have shape (images, channels, size, size) and dtype uint8, the labels shape (images,) and dtype
    int64. Labels are for evaluation only. `handwriting` says that the images are glyphs, which a mirror would spoil.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    handwriting: bool = False

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return self.train.shape[1]

    @property
    def size(self) -> int:
        """Height and width of an image in pixels."""
        return self.train.shape[2]
