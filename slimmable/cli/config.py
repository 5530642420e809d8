"""The settings of a pre-training run, as given on the command line and kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from slimmable._widths import check_widths
from slimmable.errors import CheckpointError, SlimmableError, UsageError
from slimmable.losses import width_weights
from slimmable.losses.distillation import DistillationKind

SMALL_RESNET = "small-resnet"
DIGITS, GLYPHS = "digits", "glyphs"
FOLDER_IMAGE_SIZE = 64  # pixels; pictures in a folder show more than the embedded digits

GATED_METHODS = ("mocov3", "simclr", "byol", "vicreg")  # whose encoder sees two views
METHODS = ("mocov2", "mocov3", "simclr", "byol", "vicreg", "supervised")
OPTIMIZERS = ("adamw", "lars", "sgd")
VIEWS = ("digits", "mocov2", "simclr", "byol", "supervised")
DISTILLATIONS = ("own", "none", *get_args(DistillationKind))
PRECISIONS = ("float32", "bfloat16")
_CHOICES = {
    "method": METHODS,
    "optimizer": OPTIMIZERS,
    "views": VIEWS,
    "distill": DISTILLATIONS,
    "precision": PRECISIONS,
}
_LEAST = {
    **{"epochs": 1, "batch_size": 2, "images": 4, "image_size": 8},
    **{"embedding": 1, "hidden": 0, "queue_size": 1, "key_parts": 1},
}
_POSITIVE = ("learning_rate", "joined_learning_rate", "temperature", "gate_weight", "gate_speed")
_SHARES = ("momentum", "slow_start", "smallest_crop")
_WITHOUT_LOGITS = ("byol", "vicreg")  # whose distillation compares embeddings
_KINDS: dict[type, Any] = {float: (int, float), tuple: list, type(None): (int, float, type(None))}  # by the default's


@dataclass(frozen=True)
class PretrainConfig:
    """What a run is made of; everything that its result depends on.

    Raises: UsageError or WidthError: if a value is out of range.
    """

    method: str = "mocov2"
    model: str = SMALL_RESNET
    data: str = DIGITS  # or glyphs, or a folder of images per class
    images: int = 4096  # of the embedded sets to train on; a quarter as many are held out
    image_size: int = 24
    widths: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    universal: bool = False
    gate_budget: float | None = None  # multiply-adds of the gated network over those of the dense one; None: no gates
    gate_weight: float = 100.0  # of the budget loss, lambda of the paper
    gate_speed: float = 5.0  # learning rate of the gates over that of the rest
    epochs: int = 20
    batch_size: int = 64  # of all processes together
    optimizer: str = "adamw"
    learning_rate: float = 0.006  # for this batch size
    joined_learning_rate: float | None = None  # peak for the steps after the slow start, if another
    warm_up: float | None = None  # epochs; a twentieth of them if None
    weight_decay: float = 0.05
    embedding: int = 64
    hidden: int = 0  # units between the layers of the head; 0: as many as features
    temperature: float = 0.2
    momentum: float = 0.99  # of the momentum encoder
    queue_size: int = 256
    key_parts: int = 4
    distill: str = "own"
    weights: str = "widest_plus_rest"
    slow_start: float = 0.5
    views: str = "digits"
    smallest_crop: float = 0.56  # share of the image's area
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", check_widths(self.widths))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{_option(name)} {getattr(self, name)}: there are {', '.join(choices)}")
        for name, lowest in _LEAST.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"{_option(name)} must be at least {lowest}, got {getattr(self, name)}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{_option(name)} must be positive, got {value}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{_option(name)} must be in [0, 1], got {getattr(self, name)}")
        for name in ("warm_up", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{_option(name)} must be 0 or more, got {value}")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed must be in [0, 2**31), got {self.seed}")
        try:
            width_weights(self.widths, self.weights)
        except SlimmableError as error:
            raise UsageError(f"--weights {self.weights}: {error}") from error
        self._check_together()

    def _check_together(self) -> None:
        """Refuse what only together makes no sense."""
        if self.views == "supervised" != self.method:
            raise UsageError(f"--views supervised makes one view of an image, but --method {self.method} takes two")
        if self.method in _WITHOUT_LOGITS and self.distill not in ("own", "none", "embedding", "mse"):
            raise UsageError(
                f"--distill {self.distill} compares logits, which --method {self.method} does not have; there are own, "
                "none, embedding, mse"
            )
        if self.gate_budget is not None:
            self._check_gates(self.gate_budget)
        if self.universal and len(self.widths) == 1:
            raise UsageError("--universal needs a narrowest width: give --widths one below 1")

    def _check_gates(self, budget: float) -> None:
        if not 0 < budget < 1:
            raise UsageError(f"--gate-budget is a share of the multiply-adds and must be in (0, 1), got {budget}")
        if self.method not in GATED_METHODS:
            raise UsageError(f"--gate-budget is for --method {', '.join(GATED_METHODS)}, not {self.method}")
        if len(self.widths) > 1:
            raise UsageError(
                f"--gate-budget trains one width, got --widths {' '.join(f'{width:g}' for width in self.widths)}; "
                "leave them away, or gate a slimmable model in a loop of your own"
            )

    @property
    def is_folder(self) -> bool:
        """Whether the images come from a folder."""
        return self.data not in (DIGITS, GLYPHS)

    def to_json(self) -> str:
        """Return the settings as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> PretrainConfig:
        """Read settings that `to_json` wrote; `path` is for messages.

        Raises:
            CheckpointError: if the text is not JSON, names are missing or unknown, or a value is of another kind.
            UsageError or WidthError: if a value is out of range.
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
        for name, value in values.items():
            kind = type(getattr(cls, name))
            if not isinstance(value, _KINDS.get(kind, kind)):
                raise CheckpointError(f"{path}: {name} cannot be {value!r}")
        return cls(**values)

    def check_same(self, given: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings than those of the run.

        Raises: UsageError: if a value of `given` is another than here, naming all of them.
        """
        other = [
            f"{_option(name)}: the run has {getattr(self, name)}, now {value}"
            for name, value in given.items()
            if getattr(self, name) != value
        ]
        if other:
            raise UsageError("--resume goes on with the settings of the run; " + "; ".join(other))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
