"""Settings by name: what each method takes on small images, and the published settings for ImageNet.

Learning rates are those for the batch size given with them. Where the published code and the paper differ, the paper
holds. Published figures left out: the floor of VICReg's learning rate (a thousandth of its peak; here 0), and the
colour noise of Yu et al. (PCA lighting).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimmable.cli.config import DIGITS, FOLDER_IMAGE_SIZE, PretrainConfig
from slimmable.errors import UsageError

Settings = dict[str, Any]

_SMALL: dict[str, Settings] = {
    "mocov2": {},
    "mocov3": {"temperature": 1.0},
    "simclr": {},
    "byol": {},
    "vicreg": {"hidden": 256, "embedding": 256},
    "supervised": {"slow_start": 0.0, "weights": "ones"},
}
_VIEWS = {"mocov2": "mocov2", "simclr": "simclr", "supervised": "supervised"}
_CROPS = {"mocov2": 0.2, "mocov3": 0.2}

_IMAGENET: Settings = {"image_size": 224, "model": "resnet50", "optimizer": "sgd", "warm_up": 10.0, "slow_start": 0.5}
_LARS: Settings = _IMAGENET | {"optimizer": "lars", "weight_decay": 1e-6}

PRESETS: dict[str, Settings] = {
    # Zhao et al., Slimmable Networks for Contrastive Self-supervised Learning, IJCV 2024, and its published scripts
    "slimclr-mocov2-imagenet": _IMAGENET
    | {"method": "mocov2", "epochs": 200, "batch_size": 1024, "learning_rate": 0.2, "weight_decay": 1e-4}
    | {"hidden": 2048, "embedding": 128, "temperature": 0.2, "queue_size": 65536, "momentum": 0.999, "key_parts": 8},
    "slimclr-mocov3-imagenet": _LARS
    | {"method": "mocov3", "epochs": 300, "batch_size": 1024, "learning_rate": 1.2, "joined_learning_rate": 3.2}
    | {"hidden": 4096, "embedding": 256, "temperature": 1.0, "momentum": 0.99},
    "slimclr-simclr-imagenet": _LARS
    | {"method": "simclr", "epochs": 100, "batch_size": 1024, "learning_rate": 2.4}
    | {"hidden": 2048, "embedding": 128, "temperature": 0.1},
    # the methods' own settings, at several widths
    "mocov2-imagenet": _IMAGENET
    | {"method": "mocov2", "epochs": 800, "batch_size": 256, "learning_rate": 0.03, "weight_decay": 1e-4}
    | {"warm_up": 0.0, "hidden": 2048, "embedding": 128, "temperature": 0.2}
    | {"queue_size": 65536, "momentum": 0.999, "key_parts": 8},
    "mocov3-imagenet": _LARS
    | {"method": "mocov3", "epochs": 300, "batch_size": 4096, "learning_rate": 4.8}
    | {"hidden": 4096, "embedding": 256, "temperature": 1.0, "momentum": 0.99},
    "mocov3-vit-imagenet": _IMAGENET
    | {"method": "mocov3", "model": "vit_small_patch16_224", "optimizer": "adamw", "epochs": 300, "batch_size": 4096}
    | {"learning_rate": 2.4e-3, "warm_up": 40.0, "weight_decay": 0.1, "smallest_crop": 0.08}
    | {"hidden": 4096, "embedding": 256, "temperature": 0.2, "momentum": 0.99},
    "simclr-imagenet": _LARS
    | {"method": "simclr", "epochs": 100, "batch_size": 4096, "learning_rate": 4.8, "weight_decay": 1e-4}
    | {"hidden": 2048, "embedding": 128, "temperature": 0.1},
    "byol-imagenet": _LARS
    | {"method": "byol", "epochs": 1000, "batch_size": 4096, "learning_rate": 3.2, "weight_decay": 1.5e-6}
    | {"hidden": 4096, "embedding": 256, "momentum": 0.996},
    "vicreg-imagenet": _LARS
    | {"method": "vicreg", "epochs": 1000, "batch_size": 2048, "learning_rate": 1.6}
    | {"hidden": 8192, "embedding": 8192},
    # the supervised slimmable network that Zhao et al. compare with (Yu et al. 2019: no distillation)
    "supervised-imagenet": _IMAGENET
    | {"method": "supervised", "epochs": 100, "batch_size": 512, "learning_rate": 0.2, "weight_decay": 1e-4}
    | {"warm_up": 5.0, "slow_start": 0.0, "distill": "none", "weights": "ones"},
}


def named(given: Mapping[str, Any], preset: str | None) -> Settings:
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
    """Return the settings of a run: those `given`, then those of the preset, then what the method takes.

    Raises: UsageError or WidthError: if a value is out of range, or the preset is unknown or of another method.

    >>> configure({"epochs": 100}, "slimclr-mocov2-imagenet").queue_size
    65536
    """
    values = named(given, preset)
    method = values.get("method", PretrainConfig.method)
    defaults = _SMALL.get(method, {}) if preset is None else {}
    if preset is not None or PretrainConfig(data=values.get("data", DIGITS)).is_folder:
        photographs = {"views": _VIEWS.get(method, "byol"), "smallest_crop": _CROPS.get(method, 0.08)}
        defaults = {"image_size": FOLDER_IMAGE_SIZE, **photographs, **defaults}
    if values.get("gate_budget") is not None:
        defaults = {"widths": (1.0,), **defaults}
    return PretrainConfig(**{**defaults, **values})
