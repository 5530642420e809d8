"""What is trained: a backbone with a projection head."""

from __future__ import annotations

from torch import Tensor, nn


class Encoder(nn.Module):
    """A backbone and its projection head, plain PyTorch: images in, embeddings of shape (batch, dim) out.

    Convert both together: the features between them get thinner with the backbone, the embedding keeps its size.

    >>> import torch, slimmable
    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 6))
    >>> encoder = slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    >>> with slimmable.at_width(encoder, 0.5):
    ...     encoder.backbone(torch.zeros(2, 1, 2, 2)).shape, encoder(torch.zeros(2, 1, 2, 2)).shape
    (torch.Size([2, 4]), torch.Size([2, 6]))
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of `images`, not yet of unit length."""
        output: Tensor = self.projector(self.backbone(images))
        return output
