"""The part that MoCo v3 and BYOL share: a predictor, and a momentum encoder that both views pass."""

from __future__ import annotations

from torch import Tensor, nn

from slimmable._inputs import check_module
from slimmable.losses._checks import check_share
from slimmable.methods._batch import Batch
from slimmable.methods._method import Method
from slimmable.training.distributed import synchronised_batchnorm
from slimmable.training.moco import follow, follower_of
from slimmable.training.momentum import cosine_momentum


class WithFollower(Method):
    """A method whose targets come from a momentum encoder, at the full width; its momentum rises to 1 by a cosine."""

    def __init__(self, encoder: nn.Module, predictor: nn.Module, *, momentum: float) -> None:
        super().__init__(encoder)
        check_module(f"{type(self).__name__}: predictor", predictor)
        check_share(type(self).__name__, "momentum", momentum)
        self.online_predictor = predictor
        self.momentum_encoder = follower_of(encoder)
        self.momentum = momentum

    @property
    def online(self) -> nn.ModuleList:
        """Encoder and predictor."""
        return nn.ModuleList([self.encoder, self.online_predictor])

    def followed(self, batch: Batch, progress: float) -> list[Tensor]:
        """Move the momentum encoder, then return its embeddings of every view."""
        follow(self.momentum_encoder, self.encoder, cosine_momentum(progress, self.momentum))
        with synchronised_batchnorm():
            return [self.momentum_encoder(view) for view in batch.views]
