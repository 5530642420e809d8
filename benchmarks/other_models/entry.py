"""One entry of the list: how a model is made, what it is run on, and what must become of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FULL, SLIM = "full", "slim"


@dataclass(frozen=True)
class Entry:
    """A model of a library.

    `outputs` says what width 0.5 must do to the outputs: keep their sizes ("full") or halve axes ("slim"), all of
    them alike or by patterns of their names, of which the first that matches counts. Names are the places of tensors
    in the output, such as "logits" or "hidden_states.1".
    """

    library: str
    family: str
    name: str
    make: Callable[[], nn.Module]
    example: Callable[[], Any]  # as `example_inputs` of `slimmable.slimify`
    outputs: str | Mapping[str, str] = FULL
    options: Mapping[str, Any] = field(default_factory=dict)  # of `slimmable.slimify`
    numbers: bool = True  # False: too big for anything but shapes

    @property
    def key(self) -> str:
        """The name in the list, such as "transformers/BertModel"."""
        return f"{self.library}/{self.name}"


def noise(*size: int) -> Tensor:
    """Return random numbers, always the same ones of a size."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


def tokens(*size: int, vocabulary: int) -> Tensor:
    """Return random token numbers from 3 up, below which many vocabularies have special ones."""
    return torch.randint(3, vocabulary, size, generator=torch.Generator().manual_seed(0))
