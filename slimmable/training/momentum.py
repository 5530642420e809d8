"""The schedule of a momentum encoder."""

from __future__ import annotations

import math

from slimmable.errors import UsageError
from slimmable.losses._checks import as_number


def cosine_momentum(progress: float, start: float = 0.99) -> float:
    """Return the momentum `1 - (1 - start) (1 + cos(pi progress)) / 2`, which rises from `start` to 1.

    It is the share of itself that a momentum encoder keeps in a step (Grill et al., BYOL, 2020, section 3.2; MoCo v3,
    Chen et al. 2021, starts from 0.99).

    Args:
        progress: share of the training that is done, in [0, 1].
        start: momentum at the start, in [0, 1].

    Raises: UsageError: if an argument is not in [0, 1].

    >>> cosine_momentum(0.0), cosine_momentum(0.5), cosine_momentum(1.0)
    (0.99, 0.995, 1.0)
    """
    for name, value in (("progress", progress), ("start", start)):
        if not 0 <= as_number(value) <= 1:
            raise UsageError(f"cosine_momentum: {name} must be a number in [0, 1], got {value!r}")
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
