"""SimCLR: two views of an image attract each other, and all other images of the batch repel them."""

from __future__ import annotations

from torch import nn

from slimmable._checks import check_positive
from slimmable._distributed import gather
from slimmable.losses import contrastive_cross_entropy, nt_xent_logits
from slimmable.methods.method import Batch, Method, Outcome, hidden_layer


class SimCLR(Method):
    """SimCLR (Chen et al., *A Simple Framework for Contrastive Learning*, ICML 2020), at every width.

    The embeddings of all processes are gathered with their gradients, so each image is compared with the whole batch.

    Args:
        encoder: a converted `Encoder`.
        temperature: temperature of the loss; 0.1 for ImageNet, 0.5 for CIFAR.

    Raises: UsageError: if `temperature` is not positive.

    >>> import torch, slimmable
    >>> from slimmable.methods import Batch, Encoder
    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = Encoder(backbone, SimCLR.projector(8, 16, 4))
    >>> method = SimCLR(slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2)))
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation())
    >>> losses = method.step(recipe, Batch([torch.rand(8, 1, 2, 2), torch.rand(8, 1, 2, 2)]), progress=0.7)
    >>> list(losses)
    [1.0, 0.5]
    """

    def __init__(self, encoder: nn.Module, *, temperature: float = 0.1) -> None:
        super().__init__(encoder)
        check_positive("SimCLR", temperature=temperature)
        self.temperature = temperature

    @staticmethod
    def projector(in_features: int, hidden_dim: int, proj_dim: int) -> nn.Sequential:
        """Return the projection head of two layers with BatchNorm: (batch, in_features) -> (batch, proj_dim)."""
        last = nn.Linear(hidden_dim, proj_dim, bias=False)
        return nn.Sequential(*hidden_layer(in_features, hidden_dim), last, nn.BatchNorm1d(proj_dim))

    def forward(self, batch: Batch) -> Outcome:
        """Return NT-Xent over the gathered batch (eq. 1)."""
        embeddings = [gather(each) for each in self.embed(batch.views)]
        logits = nt_xent_logits(*embeddings)
        return Outcome(contrastive_cross_entropy(logits, self.temperature), [logits], embeddings)
