"""What the result of a pre-training run depends on: its options, stated once, and published values of them by name.

Torch is not imported before settings are made, so that `--help` is quick.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from slimmable._widths import check_widths
from slimmable.cli.options import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    at_least,
    check,
    fits,
    flag,
    option,
)
from slimmable.errors import CheckpointError, SlimmableError, UsageError

DIGITS = "digits"
FOLDER_IMAGE_SIZE = 64  # pixels; pictures in a folder show more than the embedded digits

METHODS = ("mocov2", "mocov3", "simclr", "byol", "vicreg", "supervised")
GATED_METHODS = ("mocov3", "simclr", "byol", "vicreg")  # whose encoder sees two views
DISTILLATIONS = ("own", "none", "kl", "embedding", "mse", "dkd", "atkd")
_WITHOUT_LOGITS = ("byol", "vicreg")  # their distillation compares embeddings
AUGMENTATIONS = ("digits", "mocov2", "simclr", "byol", "supervised")
LOGGERS = ("tensorboard", "wandb")
DEFAULT_WIDTHS = (1.0, 0.75, 0.5, 0.25)
WIDTHS_HELP = "shares of the channels, in (0, 1], with 1 among them"


@dataclass(frozen=True)
class PretrainConfig:
    """The settings that the result of a run depends on.

    Raises: UsageError or WidthError: if a value is out of range, or two do not go together.
    """

    method: str = option("mocov2", "how to train", choices=METHODS, group="model and images")
    model: str = option("small_resnet", "a timm model, or small_resnet: timm's ResNet-10, narrow, for small images")
    data: str = option(
        DIGITS,
        "digits: cluttered digits, which come with scikit-learn; or the path of a folder with a folder of images for "
        "each class; the classes serve for evaluation only, except with --method supervised",
        metavar="NAME",
    )
    num_images: int = option(4096, "digits to train on; a quarter as many are held out", within=at_least(4))
    image_size: int = option(
        24, "height and width in pixels", within=at_least(8), shown=f"24; with a folder {FOLDER_IMAGE_SIZE}"
    )
    augmentation: str = option(
        "digits", "the augmentations of which method", choices=AUGMENTATIONS, shown="digits; with a folder its own"
    )
    min_crop_scale: float = option(
        0.56, "least share of an image in a view", within=FRACTION, shown="0.56; with a folder 0.08 or 0.2"
    )

    widths: tuple[float, ...] = option(DEFAULT_WIDTHS, WIDTHS_HELP, metavar="W", group="widths and gates")
    universal: bool = option(False, "train any width from the narrowest on, by the sandwich rule")
    distill: str = option(
        "own", "how the full width teaches the others; own: as suits the method", choices=DISTILLATIONS
    )
    loss_weights: str = option(
        "widest_plus_rest", "weights of the widths' losses, as in slimmable.losses.width_weights", metavar="MODE"
    )
    slow_start: float = option(0.5, "fraction of the training in which the full width trains alone", within=FRACTION)
    gate_budget: float | None = option(
        None,
        "train one width dense and gated: channel gates let an image use this share of the multiply-adds on average; "
        f"for {', '.join(GATED_METHODS)}",
        within=Range("in (0, 1)", lambda value: 0 < value < 1),
        metavar="SHARE",
    )
    gate_loss_weight: float = option(100.0, "weight of the loss that holds gates to the budget", within=POSITIVE)
    gate_lr_scale: float = option(5.0, "learning rate of the gates over that of the rest", within=POSITIVE)

    proj_dim: int = option(64, "size of the projector's output, the embedding", within=at_least(1), group="method")
    proj_hidden_dim: int = option(0, "hidden units of the projector; 0: as many as features", within=at_least(0))
    temperature: float = option(0.2, "temperature of the contrastive loss", within=POSITIVE)
    ema_momentum: float = option(
        0.99, "momentum of the averaged encoder; mocov3 and byol raise it to 1", within=FRACTION
    )
    queue_size: int = option(256, "keys that mocov2 keeps, at most a quarter of the images", within=at_least(1))
    key_parts: int = option(4, "parts of the batch for which mocov2 makes keys one by one", within=at_least(1))

    epochs: int = option(20, "passes over the training images", within=at_least(1), group="optimization")
    batch_size: int = option(64, "images per step, of all processes together", within=at_least(2))
    opt: str = option("adamw", "optimizer", choices=("adamw", "lars", "sgd"))
    lr: float = option(0.006, "peak learning rate, for this batch size", within=POSITIVE)
    lr_after_slow_start: float | None = option(None, "peak after the slow start", within=POSITIVE, shown="the same")
    warmup_epochs: float | None = option(
        None,
        "epochs in which the learning rate rises; then it falls by a cosine",
        within=NOT_NEGATIVE,
        shown="a twentieth of all",
    )
    weight_decay: float = option(0.05, "weight decay; norms and biases have none", within=NOT_NEGATIVE)
    precision: str = option("float32", "bfloat16: mixed precision", choices=("float32", "bfloat16"))
    seed: int = option(
        0,
        "seed of the weights, the order of the images and the views",
        within=Range("in [0, 2**31)", lambda value: 0 <= value < 2**31),
    )

    def __post_init__(self) -> None:
        from slimmable.losses import width_weights

        object.__setattr__(self, "widths", check_widths(self.widths))
        check(self)
        try:
            width_weights(self.widths, self.loss_weights)
        except SlimmableError as error:
            raise UsageError(f"--loss-weights {self.loss_weights}: {error}") from error
        if self.augmentation == "supervised" != self.method:
            raise UsageError(
                f"--augmentation supervised makes one view of an image, but --method {self.method} takes two"
            )
        if self.method in _WITHOUT_LOGITS and self.distill not in ("own", "none", "embedding", "mse"):
            raise UsageError(
                f"--distill {self.distill} compares logits, which --method {self.method} does not have; there are own, "
                "none, embedding, mse"
            )
        if self.gate_budget is not None:
            self._check_gates()
        if self.universal and len(self.widths) == 1:
            raise UsageError("--universal needs a narrowest width: give --widths one below 1")

    def _check_gates(self) -> None:
        if self.method not in GATED_METHODS:
            raise UsageError(f"--gate-budget is for --method {', '.join(GATED_METHODS)}, not {self.method}")
        if len(self.widths) > 1:
            raise UsageError(
                f"--gate-budget trains one width, got --widths {' '.join(f'{width:g}' for width in self.widths)}; "
                "leave them out, or gate a slimmable model in a training loop of your own"
            )

    @property
    def is_folder(self) -> bool:
        """Whether the images come from a folder."""
        return self.data != DIGITS

    def to_json(self) -> str:
        """Return the settings as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> PretrainConfig:
        """Read settings that `to_json` wrote; `path` is for messages.

        Raises:
            CheckpointError: if the text is not JSON, names are missing or unknown, or a value is of another type.
            UsageError or WidthError: if a value is out of range.
        """
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise TypeError(f"expected an object, found {type(values).__name__}")
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is not the configuration of a run ({error})") from error
        differing = {each.name for each in fields(cls)} ^ set(values)
        if differing:
            raise CheckpointError(f"{path} is of another version: {', '.join(sorted(differing))} missing or unknown")
        for name, value in values.items():
            if not fits(cls, name, value):
                raise CheckpointError(f"{path}: {name} cannot be {value!r}")
        return cls(**values)

    def check_same(self, given: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings than those of the run.

        Raises: UsageError: if a value of `given` is another than here, naming all of them.
        """
        other = [
            f"{flag(name)}: the run has {getattr(self, name)}, now {value}"
            for name, value in given.items()
            if getattr(self, name) != value
        ]
        if other:
            raise UsageError("--resume goes on with the settings of the run; " + "; ".join(other))


def workers_option() -> Any:
    """Return the field `workers` of the commands that read images."""
    text = "processes that read and augment images; they do not change the result"
    return option(None, text, within=NOT_NEGATIVE, shown="by the number of processors", metavar="N")


def device_option() -> Any:
    """Return the field `device` of the commands that compute."""
    return option(None, "such as cpu or cuda", shown="cuda where there is one")


@dataclass(frozen=True)
class RunOptions:
    """The options of `pretrain` beside the settings that its result depends on."""

    preset: str | None = option(
        None, "published settings by name, such as slimclr-mocov2-imagenet; other options override them", group="run"
    )
    output: Path = option(Path("runs/pretrain"), "run folder to make; it must not exist, or be empty", metavar="RUN")
    resume: bool = option(False, "go on with an interrupted run, to the same result; its settings need not be given")
    log: tuple[str, ...] = option((), "where to log, besides losses.csv in the run folder", choices=LOGGERS)
    log_every: int = option(10, "steps from one logged to the next", within=at_least(1), metavar="STEPS")
    knn_every: int | None = option(
        None,
        "epochs from one kNN accuracy on held-out images to the next; 0: none",
        within=NOT_NEGATIVE,
        shown="a tenth of all with --gate-budget, else 0",
        metavar="EPOCHS",
    )
    diagnostics: bool = option(False, "sample the gradients of the widths: imbalance and divergence")
    workers: int | None = workers_option()
    device: str | None = device_option()


Settings = dict[str, Any]

_SMALL_IMAGES: dict[str, Settings] = {  # where a method differs from the defaults above
    "mocov3": {"temperature": 1.0},
    "vicreg": {"proj_hidden_dim": 256, "proj_dim": 256},
    "supervised": {"slow_start": 0.0, "loss_weights": "ones"},
}
_AUGMENTATIONS = {"mocov2": "mocov2", "simclr": "simclr", "supervised": "supervised"}  # of other methods byol's
_MIN_CROP_SCALES = {"mocov2": 0.2, "mocov3": 0.2}

_IMAGENET: Settings = {"image_size": 224, "model": "resnet50", "opt": "sgd", "warmup_epochs": 10.0, "slow_start": 0.5}
_LARS: Settings = _IMAGENET | {"opt": "lars", "weight_decay": 1e-6}

# Learning rates are those for the batch size given with them. Where published code and paper differ, the paper holds.
# Left out: the floor of VICReg's learning rate (a thousandth of its peak; here 0), and the colour noise of Yu et al.
# (PCA lighting).
PRESETS: dict[str, Settings] = {
    # Zhao et al., Slimmable Networks for Contrastive Self-supervised Learning, IJCV 2024, and its published scripts
    "slimclr-mocov2-imagenet": _IMAGENET
    | {"method": "mocov2", "epochs": 200, "batch_size": 1024, "lr": 0.2, "weight_decay": 1e-4}
    | {"proj_hidden_dim": 2048, "proj_dim": 128, "temperature": 0.2}
    | {"queue_size": 65536, "ema_momentum": 0.999, "key_parts": 8},
    "slimclr-mocov3-imagenet": _LARS
    | {"method": "mocov3", "epochs": 300, "batch_size": 1024, "lr": 1.2, "lr_after_slow_start": 3.2}
    | {"proj_hidden_dim": 4096, "proj_dim": 256, "temperature": 1.0, "ema_momentum": 0.99},
    "slimclr-simclr-imagenet": _LARS
    | {"method": "simclr", "epochs": 100, "batch_size": 1024, "lr": 2.4}
    | {"proj_hidden_dim": 2048, "proj_dim": 128, "temperature": 0.1},
    # the methods' own settings, at several widths
    "mocov2-imagenet": _IMAGENET
    | {"method": "mocov2", "epochs": 800, "batch_size": 256, "lr": 0.03, "weight_decay": 1e-4, "warmup_epochs": 0.0}
    | {"proj_hidden_dim": 2048, "proj_dim": 128, "temperature": 0.2}
    | {"queue_size": 65536, "ema_momentum": 0.999, "key_parts": 8},
    "mocov3-imagenet": _LARS
    | {"method": "mocov3", "epochs": 300, "batch_size": 4096, "lr": 4.8}
    | {"proj_hidden_dim": 4096, "proj_dim": 256, "temperature": 1.0, "ema_momentum": 0.99},
    "mocov3-vit-imagenet": _IMAGENET
    | {"method": "mocov3", "model": "vit_small_patch16_224", "opt": "adamw", "epochs": 300, "batch_size": 4096}
    | {"lr": 2.4e-3, "warmup_epochs": 40.0, "weight_decay": 0.1, "min_crop_scale": 0.08}
    | {"proj_hidden_dim": 4096, "proj_dim": 256, "temperature": 0.2, "ema_momentum": 0.99},
    "simclr-imagenet": _LARS
    | {"method": "simclr", "epochs": 100, "batch_size": 4096, "lr": 4.8, "weight_decay": 1e-4}
    | {"proj_hidden_dim": 2048, "proj_dim": 128, "temperature": 0.1},
    "byol-imagenet": _LARS
    | {"method": "byol", "epochs": 1000, "batch_size": 4096, "lr": 3.2, "weight_decay": 1.5e-6}
    | {"proj_hidden_dim": 4096, "proj_dim": 256, "ema_momentum": 0.996},
    "vicreg-imagenet": _LARS
    | {"method": "vicreg", "epochs": 1000, "batch_size": 2048, "lr": 1.6}
    | {"proj_hidden_dim": 8192, "proj_dim": 8192},
    # the supervised slimmable network that Zhao et al. compare with (Yu et al. 2019: no distillation)
    "supervised-imagenet": _IMAGENET
    | {"method": "supervised", "epochs": 100, "batch_size": 512, "lr": 0.2, "weight_decay": 1e-4}
    | {"warmup_epochs": 5.0, "slow_start": 0.0, "distill": "none", "loss_weights": "ones"},
}


def with_preset(given: Mapping[str, Any], preset: str | None) -> Settings:
    """Return the settings `given`, and those of the preset that are not given.

    Raises: UsageError: if the preset is unknown or of another method.
    """
    if preset is None:
        return dict(given)
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: there are {', '.join(PRESETS)}")
    own = PRESETS[preset]
    if given.get("method", own["method"]) != own["method"]:
        raise UsageError(f"--preset {preset} is of --method {own['method']}, not {given['method']}")
    return {**own, **given}


def configure(given: Mapping[str, Any], preset: str | None = None) -> PretrainConfig:
    """Return the settings of a run: those `given`, then those of the preset, then what suits the method and images.

    Raises: UsageError or WidthError: if a value is out of range, or the preset is unknown or of another method.

    >>> configure({"epochs": 100}, "slimclr-mocov2-imagenet").queue_size
    65536
    """
    values = with_preset(given, preset)
    method = values.get("method", PretrainConfig.method)
    defaults = _SMALL_IMAGES.get(method, {}) if preset is None else {}
    if preset is not None or values.get("data", DIGITS) != DIGITS:
        defaults = {
            "image_size": FOLDER_IMAGE_SIZE,
            "augmentation": _AUGMENTATIONS.get(method, "byol"),
            "min_crop_scale": _MIN_CROP_SCALES.get(method, 0.08),
            **defaults,
        }
    if values.get("gate_budget") is not None:
        defaults = {"widths": (1.0,), **defaults}
    return PretrainConfig(**{**defaults, **values})
