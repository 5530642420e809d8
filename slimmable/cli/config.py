"""The settings of a pre-training run, as given on the command line and kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from slimmable._errors import CheckpointError, UsageError
from slimmable._widths import check_widths

SMALL_RESNET = "small-resnet"
FOLDER_IMAGE_SIZE = 64  # pixels; pictures in a folder show more than the embedded digits


@dataclass(frozen=True)
class PretrainConfig:
    """What a run is made of; everything that its result depends on.

    Raises: UsageError or WidthError: if a number is out of range.
    """

    model: str = SMALL_RESNET
    data: str | None = None  # a folder of images per class, or None: the embedded digits
    widths: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    epochs: int = 50
    batch_size: int = 64
    image_size: int = 24
    learning_rate: float = 0.006
    weight_decay: float = 0.05
    queue_size: int = 256
    momentum: float = 0.99
    key_parts: int = 4
    temperature: float = 0.2
    embedding: int = 64
    slow_start: float = 0.5
    seed: int = 0
    images: int = 4096  # of the embedded digits to train on; a quarter as many are held out

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", check_widths(self.widths))
        for name, lowest in (("epochs", 1), ("batch_size", 2), ("image_size", 8), ("queue_size", 1), ("images", 2)):
            if getattr(self, name) < lowest:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {lowest}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"--learning-rate must be positive, got {self.learning_rate}")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed must be in [0, 2**31), got {self.seed}")

    def to_json(self) -> str:
        """Return the settings as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> PretrainConfig:
        """Read settings that `to_json` wrote; `path` is for messages.

        Raises: CheckpointError: if the text is not JSON, or names are missing or unknown.
        """
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise TypeError(f"expected an object, found {type(values).__name__}")
            missing = {field.name for field in fields(cls)} ^ set(values)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is not a configuration of this program ({error})") from error
        if missing:
            raise CheckpointError(f"{path} is of another version: {', '.join(sorted(missing))} missing or unknown")
        return cls(**values)

    def check_same(self, given: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings than those of the run.

        Raises: UsageError: if a value of `given` is another than here, naming all of them.
        """
        other = [
            f"{name}: the run has {getattr(self, name)}, now {value}"
            for name, value in given.items()
            if getattr(self, name) != value
        ]
        if other:
            raise UsageError("--resume goes on with the settings of the run; " + "; ".join(other))
