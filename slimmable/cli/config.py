"""What the commands share without importing torch, which keeps `--help` fast: options, presets, optional packages."""

import argparse
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import yaml

from slimmable._widths import ROUNDINGS, WIDTHS as DEFAULT_WIDTHS, check_widths
from slimmable.errors import SlimmableError, UsageError, WidthError

DIGITS = "digits"
_ONE_VIEW = ("supervised", "distillation")  # of an image
METHODS = ("mocov2", "mocov3", "simclr", "byol", "simsiam", "vicreg", "barlowtwins", "dino", *_ONE_VIEW)
GATED_METHODS = ("mocov3", "simclr", "byol", "simsiam", "vicreg", "barlowtwins")  # whose encoder sees two views
_GATED = ", ".join(GATED_METHODS)
_WITHOUT_LOGITS = ("byol", "simsiam", "vicreg", "barlowtwins")
DISTILLATIONS = ("own", "none", "kl", "embedding", "mse", "dkd", "atkd")
_PRECISIONS = ("float32", "bfloat16", "float16")
_ORDERS, _TEACH = ("magnitude", "none"), ("cosine", "mse", "scores")
AUGMENTATIONS = ("digits", "mocov2", "simclr", "byol", "gated", "supervised")
_AS_TIMM = "as timm says for the model; for digits in [0, 1]"
_CROPS = "0.56; for folders 0.08 or 0.2"
_IN_ORDER = ("wds", "tfds", "hfids")  # data sets that can only be read from first to last
_MOST = 100  # numbers in a list
_USUAL = " ".join(map(str, DEFAULT_WIDTHS))
WIDTHS: dict[str, Any] = {"help": "fractions of the channels, in (0, 1], including 1", "shown": _USUAL, "metavar": "W"}
ROUNDING: dict[str, Any] = {"help": "which whole number of channels to keep, as in slimify", "choices": ROUNDINGS}
ROUND_TO: dict[str, Any] = {"help": "keep multiples of this many channels", "within": (1, 65_536)}
_METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}

say = partial(print, flush=True)  # immediately, even into a pipe


def printable(text: object) -> str:
    """Return a name or path for a message: as it is, or quoted if it could not be seen otherwise."""
    return str(text) if str(text).isprintable() else ascii(str(text))


def read_text(path: Path, most: int) -> str:
    """Return the text of a file; raise ValueError if it is no plain file, or has more than `most` bytes."""
    if not path.is_file() or path.stat().st_size > most:
        raise ValueError(f"it is not a file of at most {most:,} bytes")
    return path.read_text(encoding="utf-8")


POSITIVE, FRACTION, SHARE = (1e-9, 1_000_000), (0, 1), (1e-6, 1 - 1e-6)  # the least and the most, for `within`
FROM_1, FROM_0, UNITS = (1, 1_000_000), (0, 1_000_000), (1, 65_536)


def option(default: Any = MISSING, help: str = "", **more: Any) -> Any:
    """Return a dataclass field that is an option; parser, checks and docs read it; without a default, it is required.

    It accepts `choices`, or numbers `within` limits. `group` is the heading above it and those after it, `shown` the
    default in words, where its value does not say enough. What else is given is for `ArgumentParser.add_argument`.
    """
    known = {"help": help, "choices": (), "within": None, "group": "", "shown": ""}
    parsing = {name: value for name, value in more.items() if name not in known}
    return field(default=default, metadata={**known, **more, "parsing": parsing})


def suggestion(typed: str, known: Iterable[str]) -> str:
    """Return a question that goes on with a message about an unknown word, if a known one is similar."""
    similar = difflib.get_close_matches(typed, list(known), n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


def flag(name: str) -> str:
    """Return the option of a field, as `--batch-size` of `batch_size`."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add every option of the dataclass `settings`; an option that is not given is absent from the parsed arguments."""
    group: argparse._ActionsContainer = parser
    for each in fields(settings):
        if each.metadata["group"]:
            group = parser.add_argument_group(each.metadata["group"])
        parsing, choices = dict(each.metadata["parsing"]), each.metadata["choices"]
        one, several = kind_of(each)
        if one is bool:
            parsing["action"] = "store_true"
        else:
            parsing = {"type": one, **({"choices": choices} if choices else {"metavar": _METAVARS.get(one)}), **parsing}
            if several and "action" not in parsing:
                parsing["nargs"] = "+"
        name = each.name if each.default is MISSING else flag(each.name)
        group.add_argument(name, default=argparse.SUPPRESS, help=help_text(each), **parsing)


def kind_of(each: Field[Any]) -> tuple[Any, bool]:
    """Return the type of an option's values, and whether it takes several."""
    kind: Any = get_args(each.type)[0] if isinstance(each.type, UnionType) else each.type
    one, *several = get_args(kind) or (kind,)  # of a tuple, the type of its items and an ellipsis
    return one, bool(several)


def help_text(each: Field[Any]) -> str:
    """Return the help text of an option, with its range and default."""
    within, shown = each.metadata["within"], each.metadata["shown"]
    if not shown and each.default not in (MISSING, None, ()) and each.default is not False:
        shown = " ".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
    more = ([f"from {within[0]} to {within[1]:,}"] if within else []) + ([f"default: {shown}"] if shown != "" else [])
    return f"{each.metadata['help']} ({'; '.join(more)})" if more else str(each.metadata["help"])


def check(settings: Any) -> None:
    """Raise UsageError if a value of a dataclass of options is not one of its choices, or outside its range."""
    for each in fields(settings):
        name, value = flag(each.name), getattr(settings, each.name)
        choices, within = each.metadata["choices"], each.metadata["within"]
        values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if len(values) > _MOST:
            raise UsageError(f"{name}: got {len(values):,} of them; choose at most {_MOST}")
        for one in values:
            if isinstance(one, str) and not one.strip():
                raise UsageError(f"{name} is empty")
            if choices and one not in choices:
                raise UsageError(f"{name} cannot be {one}; choose from {', '.join(choices)}")
            if within and not (isinstance(one, (int, float)) and within[0] <= one <= within[1]):
                raise UsageError(f"{name} must be from {within[0]} to {within[1]:,}, got {one!r:.80}")


def checked_widths(given: Sequence[float] | None) -> tuple[float, ...]:
    """Return the widths of `--widths`, or its default, as `check_widths` does; raise WidthError if there is none."""
    try:
        return check_widths(DEFAULT_WIDTHS if given is None else given)
    except WidthError as error:
        raise WidthError(f"--widths: {error}") from error


@dataclass(frozen=True)
class PretrainConfig:
    """The settings that the result of a run depends on; each is in its range, and no two of them conflict."""

    method: str = option("simclr", "how to train", choices=METHODS, group="model and images")
    model: str = option("small_resnet", "a timm model or hf-hub:NAME; small_resnet, resnet18_cifar for small images")
    init: str | None = option(None, "plain or slimmable weights to begin with", metavar="pretrained|FILE|RUN")
    importance: str = option("magnitude", "order of plain weights; narrow widths keep the first", choices=_ORDERS)
    data: str = option(DIGITS, "digits; a folder with one per class; a tar file; as torch/cifar10 or hfds/USER/NAME")
    data_dir: str | None = option(None, "the folder of torch/NAME, or where to keep hfds/NAME", metavar="FOLDER")
    mean: tuple[float, ...] | None = option(None, "what to subtract from each channel", within=FRACTION, shown=_AS_TIMM)
    std: tuple[float, ...] | None = option(None, "what each is then divided by", within=POSITIVE, shown=_AS_TIMM)
    num_images: int = option(4096, "digits to train on; a quarter as many are held out", within=(4, 1_000_000))
    image_size: int = option(24, "height and width in pixels", within=(8, 4096), shown="24; for a folder 64")
    augmentation: str = option("digits", "whose views", choices=AUGMENTATIONS, shown="digits; for folders the method's")
    min_crop_scale: float = option(0.56, "smallest part of an image in a view", within=FRACTION, shown=_CROPS)
    views_per_width: bool = option(False, "draw views of its own for each width; keys and targets see the full width's")
    widths: tuple[float, ...] = option(DEFAULT_WIDTHS, **WIDTHS, group="widths and gates")
    rounding: str = option("nearest", **ROUNDING)
    round_to: int = option(1, **ROUND_TO)
    universal: bool = option(False, "train every width from the narrowest up, by the sandwich rule")
    distill: str = option("own", "how the full width teaches the others; own: the method's way", choices=DISTILLATIONS)
    loss_weights: str = option("widest_plus_rest", "loss weights; see slimmable.losses.width_weights", metavar="MODE")
    slow_start: float = option(0.5, "fraction of the training in which the full width trains alone", within=FRACTION)
    gate_budget: float | None = option(
        None, f"also gate each of --widths (default: 1) to this share of its multiply-adds; for {_GATED}", within=SHARE
    )
    gate_loss_weight: float = option(100.0, "weight of the loss that keeps gates to the budget", within=POSITIVE)
    gate_lr_scale: float = option(5.0, "factor on the learning rate of the gates", within=POSITIVE)
    proj_dim: int = option(64, "size of the projector's output, the embedding", within=UNITS, group="method")
    proj_hidden_dim: int = option(0, "hidden units of the projector; 0: one per feature", within=(0, 65_536))
    head_std: float | None = option(None, "deviation of a projector's first weights", within=POSITIVE, shown="torch's")
    temperature: float = option(0.2, "temperature of the contrastive loss, or of a student", within=POSITIVE)
    teacher_temperature: float = option(0.07, "temperature of dino's teacher; it begins at 0.04", within=POSITIVE)
    local_crops: int = option(0, "smaller crops of an image that only dino's student sees", within=(0, 100))
    local_crop_size: int = option(10, "their height and width", within=(4, 4096), shown="10; for a folder 32")
    ema_momentum: float = option(0.99, "momentum of averaged encoders; rises to 1, but not in mocov2", within=FRACTION)
    queue_size: int = option(256, "keys that mocov2 keeps, at most a quarter of the images", within=FROM_1)
    key_parts: int = option(4, "parts of the batch that mocov2 computes keys for separately", within=FROM_1)
    bn_groups: int = option(1, "parts of the batch with BatchNorm statistics of their own, as on GPUs", within=UNITS)
    teacher: str | None = option(None, "what --method distillation learns from", metavar="NAME|FILE|RUN")
    teach: str = option("cosine", "what of it: features, by cosine or mse, or scores", choices=_TEACH)
    epochs: int = option(20, "passes over the training images", within=FROM_1, group="optimization")
    batch_size: int = option(64, "images per step over all processes", within=(2, 1_000_000))
    opt: str = option("adamw", "optimizer", choices=("adamw", "lars", "sgd"))
    lr: float = option(0.006, "peak learning rate, for the given batch size", within=POSITIVE)
    lr_after_slow_start: float | None = option(None, "peak after the slow start", within=POSITIVE, shown="the same")
    warmup_epochs: float | None = option(None, "epochs of linear warm-up before cosine", within=FROM_0, shown="a 20th")
    norm_lr_scale: float = option(1.0, "factor on the learning rate of norms and biases", within=POSITIVE)
    lars_trust: float = option(0.001, "trust coefficient of lars", within=POSITIVE)
    lars_clip: bool = option(False, "let no layer's rate in lars exceed the learning rate")
    lars_gates: bool = option(False, "adapt the rates of gates in lars too")
    weight_decay: float = option(0.05, "weight decay, by default not of norms and biases", within=FROM_0)
    decay_norms: bool = option(False, "apply the weight decay to norms and biases too, but not to gates")
    precision: str = option("float32", "all others are mixed; float16 skips steps that overflow", choices=_PRECISIONS)
    seed: int = option(0, "seed of the weights, the order of the images and the views", within=(0, 2**31 - 1))

    def __post_init__(self) -> None:
        from slimmable.losses import width_weights

        check(self)
        object.__setattr__(self, "widths", checked_widths(self.widths))
        for name in ("mean", "std"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(values))
                if len(values) not in (1, self.channels):
                    raise UsageError(f"{flag(name)}: got {len(values):,} values; give one for all or each channel")
        method, kind, data, gated = self.method, self.kind, printable(self.data), self.gate_budget is not None
        if kind in _IN_ORDER:
            raise UsageError(f"--data {data}: timm reads {kind}/ only in order, so no run could be resumed; use files")
        if kind != "hfds" and (self.data_dir is None) == (kind == "torch"):
            raise UsageError(f"--data-dir {self.data_dir!a}: it goes with torch/NAME or hfds/NAME, not --data {data}")
        try:
            width_weights(self.widths, self.loss_weights)
        except SlimmableError as error:
            raise UsageError(f"--loss-weights {self.loss_weights}: {error}") from error
        if self.augmentation == "supervised" and method not in _ONE_VIEW:
            raise UsageError(f"--augmentation supervised makes one view of an image, but --method {method} takes two")
        if (self.teacher is None) == (method == "distillation"):
            raise UsageError(f"only --method distillation needs a --teacher, got {self.teacher} for {method}")
        if self.local_crops and method != "dino":
            raise UsageError(f"--local-crops is for --method dino, not {method}")
        if method in _WITHOUT_LOGITS and self.distill not in ("own", "none", "embedding", "mse"):
            raise UsageError(f"--distill {self.distill} compares logits, which {method} does not have; try own")
        if gated and method not in GATED_METHODS:
            raise UsageError(f"--gate-budget is for --method {_GATED}, not {method}")
        if self.universal and len(self.widths) == 1:
            raise UsageError("--universal needs a narrowest width: add one below 1 to --widths")
        if self.universal and (gated or self.views_per_width):
            raise UsageError("--gate-budget and --views-per-width are for fixed widths; leave out --universal")

    @property
    def kind(self) -> str:
        """The kind of data set that timm knows by name, as in torch/cifar10; empty for all others."""
        kind, slash, _ = self.data.lower().partition("/")
        return kind if slash and kind in ("torch", "hfds", *_IN_ORDER) else ""

    @property
    def channels(self) -> int:
        """Channels of the images: 1 for digits and torchvision's kinds of MNIST, which are grey, otherwise 3."""
        return 1 if self.data == DIGITS or re.fullmatch("torch/.*mnist", self.data.lower()) else 3

    def to_json(self) -> str:
        """Return the settings as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def check_same(self, given: Mapping[str, Any]) -> None:
        """Raise UsageError if values of `given` differ from these settings, which a resumed run must keep."""
        asked = replace(self, **given)
        both = [(flag(name), value, getattr(asked, name)) for name, value in asdict(self).items()]
        if other := "; ".join(f"{name}: the run has {own}, now {new}" for name, own, new in both if own != new):
            raise UsageError(f"--resume keeps the settings of the run; {other}")


_PUBLISHED = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text())
PRESETS: dict[str, dict[str, Any]] = _PUBLISHED["presets"]
LINEAR: dict[str, dict[str, Any]] = _PUBLISHED["linear evaluation"]
EXAMPLES: dict[str, str] = _PUBLISHED["examples"]


def with_preset(given: Mapping[str, Any], preset: str | None) -> dict[str, Any]:
    """Return the settings of the preset, which must be for the same method, overridden by those in `given`."""
    if preset is None:
        return dict(given)
    if preset not in PRESETS:
        raise UsageError(f"no --preset is called {preset}, but {', '.join(PRESETS)}{suggestion(preset, PRESETS)}")
    own = PRESETS[preset]
    if given.get("method", own["method"]) != own["method"]:
        raise UsageError(f"--preset {preset} is for --method {own['method']}, not {given['method']}")
    return {**own, **given}


def configure(given: Mapping[str, Any], preset: str | None = None) -> PretrainConfig:
    """Return the settings of a run: those `given`, then the preset's, then the defaults of the method and images."""
    values = with_preset(given, preset)
    method = values.get("method", PretrainConfig.method)
    defaults: dict[str, Any] = {} if preset is not None else _PUBLISHED["small images"].get(method, {})
    if preset is not None or values.get("data", DIGITS) != DIGITS:
        defaults = {**_PUBLISHED["photographs"].get(method, {}), **defaults}
    if values.get("gate_budget") is not None:
        defaults = {"widths": (1.0,), **defaults}
    return PretrainConfig(**{**defaults, **values})
