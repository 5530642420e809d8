"""Running a network over a set of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimmable._modules import in_eval_mode


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Return what `model` makes of all images in eval mode, float32; its training mode is put back afterwards."""
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    with in_eval_mode(model):
        return torch.cat([model(as_input(model, batch)).float() for batch in batches])


def as_input(model: nn.Module, images: Tensor) -> Tensor:
    """Move images to the device of `model`, and scale uint8 ones to [0, 1]."""
    moved = images.to(next(model.parameters(), images).device)
    return moved.float() / 255 if moved.dtype == torch.uint8 else moved
