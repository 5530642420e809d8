"""The two passes of a gated model."""

from __future__ import annotations

from enum import Enum


class Pass(Enum):
    """Which of the two networks runs."""

    DENSE = "dense"
    GATED = "gated"

    @property
    def index(self) -> int:
        """A number that says that the pass can be taken up again; see `Active`."""
        return 0 if self is Pass.DENSE else 1
