"""Model cards: what a network is, what each of its widths costs, and the lines that load it."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn

from slimmable._profile import Profile

_TITLES = {"knn": "kNN", "linear": "linear probe"}


@dataclass(frozen=True)
class Source:
    """A network to publish."""

    name: str  # of the architecture
    model: nn.Module  # converted or plain, in evaluation mode
    widths: tuple[float, ...]
    image: tuple[int, ...]  # channels, height and width; empty if it takes something else
    arguments: Mapping[str, object] | None  # of `timm.create_model` for the plain network; None if timm cannot make it
    weights: str  # their origin, in words
    mean: tuple[float, ...]  # subtracted from values in [0, 1]
    std: tuple[float, ...]  # by which they are divided then
    base: str | None = None  # the model on the Hugging Face Hub that the weights come from
    accuracy: Mapping[float, Mapping[str, float]] = field(default_factory=dict)  # by width and probe, in [0, 1]
    license: str | None = None

    @property
    def values(self) -> str:
        """The scaling of the pixels, in words."""
        changed = any(self.mean) or any(each != 1 for each in self.std)
        way = f", minus the mean {self.mean}, divided by the standard deviation {self.std}" if changed else ""
        return f"in [0, 1]{way}"


def model_card(source: Source, costs: Profile, library: str = "timm", **more: Any) -> str:
    """Return the model card as Markdown, for a Python `library` that loads what it describes.

    `more` are `files`, exported ones, and an `example` of each format; or the `usage` of what `from_pretrained` loads.
    """
    import timm

    import slimmable

    text = Path(__file__).with_name("card.md.jinja").read_text()
    template = jinja2.Template(text, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    made = {"slimmable": slimmable, "timm": timm, "torch": torch, "python": platform.python_version()}
    measured = {name: _TITLES.get(name, name) for shares in source.accuracy.values() for name in shares}
    return str(template.render(made, source=source, costs=costs.rows, measured=measured, library=library, **more))
