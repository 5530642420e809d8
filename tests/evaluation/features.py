"""The features of a slimmable backbone at a width."""

import torch

import slimmable
from slimmable.evaluation import as_input


@torch.no_grad()
def features_of(backbone, images, width):
    """Of all images at once, in eval mode, float32; modes and width stay."""
    small = slimmable.extract(backbone, width).eval()
    return small(as_input(small, images)).float()
