"""The contrastive losses as modules: settings in the constructor, embeddings in the call."""

from __future__ import annotations

import torch
from torch import nn

from slimmable.losses._checks import check_temperature
from slimmable.losses._contrastive import info_nce, moco_v3, nt_xent
from slimmable.losses._vicreg import check_factors, vicreg


class _WithTemperature(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        check_temperature(type(self).__name__, "temperature", temperature)
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class InfoNCE(_WithTemperature):
    """`info_nce` as a module.

    >>> InfoNCE()
    InfoNCE(temperature=0.2)
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__(temperature)

    def forward(self, query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
        """Return `info_nce(query, key, queue)` at the module's temperature."""
        return info_nce(query, key, queue, self.temperature)


class NTXent(_WithTemperature):
    """`nt_xent` as a module.

    >>> NTXent(temperature=0.5)(torch.ones(4, 8), torch.ones(4, 8))
    tensor(1.9459)
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__(temperature)

    def forward(self, z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
        """Return `nt_xent(z0, z1)` at the module's temperature."""
        return nt_xent(z0, z1, self.temperature)


class MoCoV3(_WithTemperature):
    """The symmetric loss of MoCo v3 as a module, `moco_v3` in both directions.

    >>> q = k = torch.ones(4, 8)
    >>> MoCoV3()(q, q, k, k)
    tensor(5.5452)
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(temperature)

    def forward(
        self, q0: torch.Tensor, q1: torch.Tensor, k0: torch.Tensor, k1: torch.Tensor, offset: int = 0
    ) -> torch.Tensor:
        """Return `moco_v3(q0, k1) + moco_v3(q1, k0)` at the module's temperature."""
        return moco_v3(q0, k1, self.temperature, offset) + moco_v3(q1, k0, self.temperature, offset)


class VICReg(nn.Module):
    """`vicreg` as a module.

    >>> VICReg()
    VICReg(invariance=25.0, variance=25.0, covariance=1.0)
    """

    def __init__(self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> None:
        super().__init__()
        check_factors("VICReg", invariance, variance, covariance)
        self.invariance = invariance
        self.variance = variance
        self.covariance = covariance

    def forward(self, z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
        """Return `vicreg(z0, z1)` with the module's factors."""
        return vicreg(z0, z1, self.invariance, self.variance, self.covariance)

    def extra_repr(self) -> str:
        """Return the settings, as in the constructor."""
        return f"invariance={self.invariance}, variance={self.variance}, covariance={self.covariance}"
