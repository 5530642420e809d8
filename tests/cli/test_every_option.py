"""Every option of every command, given what it cannot use: one message, exit code 2, nothing begun, nothing written.

The values come from the kind of an option, so a new option has them from the start. `TAKEN` says which of them it takes
on purpose, and why: a test fails for an option that is not in `TAKEN`, and for a value taken without a reason. The
combinations of options, the commands themselves and what is no text are in tables by hand.
"""

import os
import re
import shutil
import signal
import socket
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin, get_type_hints

import pytest
import timm
from PIL import Image

import slimmable
from slimmable.__main__ import main
from slimmable._profile import profile
from slimmable.cli.commands import COMMANDS, make_parser
from slimmable.cli.config import PRESETS, flag

SEVERAL = 10_000
WORDS = {
    "empty": "",
    "blank": "  ",
    "300 characters": "x" * 300,
    "5,000 characters": "x" * 5000,
    "NUL": "a\0b",
    "newline": "a\nb",
    "escape": "\x1b[2J",
    "not UTF-8": "caf\udce9",
}
NUMBERS = {
    "word": "many",
    "comma": "1,5",
    "zero": "0",
    "minus one": "-1",
    "nan": "nan",
    "inf": "inf",
    "minus inf": "-inf",
    "huge": str(10**12),
    "400 digits": "9" * 400,
    "5,000 digits": "9" * 5000,
}
FLOATS = {"tiny": "1e-300", "1e300": "1e300", "1e999": "1e999"}
INTEGERS = {"fraction": "1.5", "exponent": "1e3", "hexadecimal": "0x10", "20,000": "20000"}
CHOICES = {"unknown": "abacus", "number": "1", "capitals": "LINEAR"}
NAMES = {"unknown": "abacus", "number": "1", "above": "../..", "address": "hf-hub:timm/resnet18", "unicode": "résnet18"}
PATHS = (
    "missing",
    "folder",
    "full",
    "file",
    "device",
    "loop",
    "fifo",
    "socket",
    "nowhere",
    "missing/below",
    "file/below",
)

NEW = "the name of something new, which is made"
OFF = "0 switches it off"
SHARE = "a share may be 0, or next to it"
LARGE = "large, but of use"
TAKEN = {
    "pretrain --method": {},
    "pretrain --model": {},
    "pretrain --init": {},
    "pretrain --importance": {},
    "pretrain --teacher": {},
    "pretrain --teach": {},
    "pretrain --data": {},
    "pretrain --data-dir": {},
    "pretrain --mean": {"zero": SHARE, "tiny": SHARE},
    "pretrain --std": {},
    "pretrain --num-images": {"20,000": LARGE},
    "pretrain --image-size": {},
    "pretrain --augmentation": {},
    "pretrain --min-crop-scale": {"zero": SHARE, "tiny": SHARE},
    "pretrain --views-per-width": {},
    "pretrain --widths": {},
    "pretrain --rounding": {},
    "pretrain --round-to": {"20,000": "no group has as many"},
    "pretrain --universal": {},
    "pretrain --distill": {},
    "pretrain --loss-weights": {},
    "pretrain --slow-start": {"zero": SHARE, "tiny": SHARE},
    "pretrain --gate-budget": {},
    "pretrain --gate-loss-weight": {},
    "pretrain --gate-lr-scale": {},
    "pretrain --proj-dim": {"20,000": LARGE},
    "pretrain --proj-hidden-dim": {"zero": "one hidden unit per feature", "20,000": LARGE},
    "pretrain --head-std": {},
    "pretrain --temperature": {},
    "pretrain --teacher-temperature": {},
    "pretrain --local-crops": {"zero": OFF},
    "pretrain --local-crop-size": {},
    "pretrain --ema-momentum": {"zero": SHARE, "tiny": SHARE},
    "pretrain --queue-size": {"20,000": "it is cut to a quarter of the images"},
    "pretrain --key-parts": {"20,000": "only mocov2 has keys"},
    "pretrain --bn-groups": {},
    "pretrain --epochs": {"20,000": LARGE},
    "pretrain --batch-size": {"20,000": "it is lowered to the number of images"},
    "pretrain --opt": {},
    "pretrain --lr": {},
    "pretrain --lr-after-slow-start": {},
    "pretrain --warmup-epochs": {"zero": OFF, "tiny": "no step is shorter"},
    "pretrain --norm-lr-scale": {},
    "pretrain --lars-trust": {},
    "pretrain --lars-clip": {},
    "pretrain --lars-gates": {},
    "pretrain --weight-decay": {"zero": OFF, "tiny": OFF},
    "pretrain --decay-norms": {},
    "pretrain --precision": {},
    "pretrain --seed": {"zero": "the default", "20,000": "any number below 2**31 is a seed"},
    "pretrain --preset": {},
    "pretrain --output": {
        **dict.fromkeys(("missing", "missing/below", "unknown", "number", "address", "unicode"), NEW),
        "folder": "it is empty",
    },
    "pretrain --resume": {},
    "pretrain --log-every": {"20,000": LARGE},
    "pretrain --knn-every": {"zero": OFF, "20,000": LARGE},
    "pretrain --quiet": {},
    "pretrain --diagnostics": {},
    "pretrain --workers": {"zero": OFF},
    "pretrain --device": {},
    "evaluate RUN": {},
    "evaluate --probes": {},
    "evaluate --k": {"20,000": "all images vote"},
    "evaluate --knn-metric": {},
    "evaluate --knn-temperature": {},
    "evaluate --probe-epochs": {"20,000": LARGE},
    "evaluate --probe-lr": {},
    "evaluate --probe-batch-size": {"20,000": "all images make one step"},
    "evaluate --label-fraction": {},
    "evaluate --workers": {"zero": OFF},
    "evaluate --device": {},
    "export MODEL_OR_RUN": {},
    "export --width": {},
    "export --format": {},
    "export --all-widths": {},
    "export --budget": {},
    "export --latency": {},
    "export --output": {
        **dict.fromkeys(("missing", "missing/below", "unknown", "number", "address", "unicode"), NEW),
        **dict.fromkeys(("folder", "full", "above"), "files are added to a folder"),
    },
    "export --widths": {},
    "export --rounding": {},
    "export --round-to": {"20,000": "no group has as many"},
    "export --checkpoint": {},
    "export --pretrained": {},
    "export --num-classes": {"zero": "a network without a classifier", "20,000": LARGE},
    "export --image-size": {},
    "latency MODEL_OR_RUN": {},
    "latency --widths": {},
    "latency --rounding": {},
    "latency --round-to": {"20,000": "no group has as many"},
    "latency --checkpoint": {},
    "latency --pretrained": {},
    "latency --num-classes": {"zero": "a network without a classifier", "20,000": LARGE},
    "latency --image-size": {},
    "latency --output": {},
    "latency --batch": {},
    "latency --threads": {},
    "latency --runtime": {},
    "profile MODEL_OR_RUN": {},
    "profile --widths": {},
    "profile --rounding": {},
    "profile --round-to": {"20,000": "no group has as many"},
    "profile --checkpoint": {},
    "profile --pretrained": {},
    "profile --num-classes": {"zero": "a network without a classifier", "20,000": LARGE},
    "profile --image-size": {},
    "profile --batch": {},
    "profile --threads": {},
    "profile --runtime": {},
    "profile --csv": {**dict.fromkeys(("missing", "unknown", "number", "unicode"), NEW), "file": "it is replaced"},
    "profile --json": {**dict.fromkeys(("missing", "unknown", "number", "unicode"), NEW), "file": "it is replaced"},
    "plan MODEL_OR_RUN": {},
    "plan --widths": {},
    "plan --rounding": {},
    "plan --round-to": {"20,000": "no group has as many"},
    "plan --checkpoint": {},
    "plan --pretrained": {},
    "plan --num-classes": {"zero": "a network without a classifier", "20,000": LARGE},
    "plan --image-size": {},
    "plan --json": {**dict.fromkeys(("missing", "unknown", "number", "unicode"), NEW), "file": "it is replaced"},
}


def is_positional(each):
    return each.default is MISSING and not each.metadata["parsing"].get("required")


def name_of(each):
    return each.metadata["parsing"]["metavar"] if is_positional(each) else flag(each.name)


OPTIONS = {
    f"{command} {name_of(each)}": (command, classes, each)
    for command, classes in COMMANDS.items()
    for each in (each for options in classes for each in fields(options))
}
RIGHT = {
    "pretrain": (*("--num-images", "16", "--batch-size", "8", "--device", "cpu", "--workers", "0", "--output", "out"),),
    "evaluate": ("RUN", "--device", "cpu", "--workers", "0"),
    "export": ("test_resnet", "--width", "1", "--format", "safetensors", "--output", "out"),
    "latency": ("test_resnet", "--image-size", "32"),
    "profile": ("test_resnet",),
    "plan": ("test_resnet",),
}
"""The options of a right call of each command; RUN stands for the folder of a run."""


def bad_values(classes, each):
    """Return name -> words for everything that the option `each` is given."""
    kinds = {name: kind for options in classes for name, kind in get_type_hints(options).items()}
    kind = kinds[each.name]
    parts = [kind] if get_origin(kind) is tuple else get_args(kind) or [kind]
    (kind,) = (part for part in parts if part is not NoneType)
    several = get_origin(kind) is tuple
    kind = get_args(kind)[0] if several else kind
    if kind is bool:
        return {"value": ["yes"]}
    if each.metadata["choices"]:
        values = WORDS | CHOICES
    elif kind is int:
        values = WORDS | NUMBERS | INTEGERS
    elif kind is float or float in get_args(kind):
        values = WORDS | NUMBERS | FLOATS
    else:
        assert kind in (str, Path), "a new kind of option needs bad values"
        values = WORDS | NAMES | {path: path for path in PATHS}
    found = {name: [value] for name, value in values.items()} | {"nothing": []}
    if several:
        first = (each.metadata["choices"] or ["1"])[0]
        found |= {"a good and a bad one": [first, "abacus"], "hundreds of one": ["0.5"] * (SEVERAL // 20)}
        found["thousands"] = [str(number / SEVERAL) for number in range(1, SEVERAL + 1)]
    return found


def playground():
    """Make one of everything that a path can lead to, in the working folder."""
    for folder in ("folder", "full"):
        Path(folder).mkdir()
    for file in ("file", "full/note.txt"):
        Path(file).write_text("mine")
    for link, target in (("device", "/dev/zero"), ("loop", "loop"), ("nowhere", "no/where")):
        Path(link).symlink_to(target)
    Path("pictures").mkdir()
    Image.new("RGB", (8, 8)).save("pictures/black.png")
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")


def contents(*folders):
    """Return all names below the folders, with modes, sizes and times."""
    found = {}
    for folder in folders:
        for root, names, files in os.walk(folder):
            for path in (Path(root, name) for name in names + files):
                state = path.lstat()
                found[str(path)] = (state.st_mode, state.st_size, path.is_dir() or state.st_mtime_ns)
    return found


def forms(word):
    """Return the ways in which a message may show a word."""
    shown = [word[:60], ascii(word)[:60]]
    for read in (float, int, lambda text: f"{float(text):g}"):
        with suppress(ValueError, OverflowError):
            shown.append(str(read(word)))
    return shown


class Began(BaseException):
    """The work of a command began."""


class Hung(BaseException):
    """A command took too long."""


class Caller:
    """Calls commands in a playground where no work begins."""

    def __init__(self, run, capfd):
        self.run, self.capfd, self.known = run, capfd, set(os.listdir())

    def fault(self, line):
        """Return what is wrong with how a line is refused, and what was said; None for the former if nothing is."""
        line = [str(self.run) if word == "RUN" else word for word in line] if isinstance(line, list) else line
        before = contents(".", self.run)
        self.capfd.readouterr()
        try:
            signal.alarm(60)
            code = main(line)
        except SystemExit as exit:
            code = exit.code
        except Began:
            code = "began"
        except Hung:
            return "hangs", ""
        except Exception as error:
            return f"raises {type(error).__name__}", str(error)[:200]
        finally:
            signal.alarm(0)
        said, after = self.capfd.readouterr().err, contents(".", self.run)
        for name in set(os.listdir()) - self.known:
            shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)
        if code != 2:
            return "taken", said
        if after != before:
            return "writes", str(set(after) ^ set(before))
        if not re.match(r"slimmable( \w+)?: ", said) or "Traceback" in said or re.search("[^\n -~é]", said):
            return "says what is no message", said
        if len(said.splitlines()) > 3 or len(said) > 1500:
            return "says too much", said
        return None, said


@cache
def costs():
    return profile(slimmable.slimify(timm.create_model("test_resnet"), (1.0, 0.5)), repeats=0)


@pytest.fixture
def caller(run, tmp_path, monkeypatch, capfd):
    def begin(*_, **__):
        raise Began

    def hang(*_):
        raise Hung

    (tmp_path / "deep" / "deeper").mkdir(parents=True)  # so that what is above them is known
    monkeypatch.chdir(tmp_path / "deep" / "deeper")
    playground()
    work = ("pretrain.Training.take_step", "evaluation.rows_of_run", "export.write", "evaluation.features_in")
    for name in (f"cli.{name}" for name in work):
        monkeypatch.setattr(f"slimmable.{name}", begin)
    monkeypatch.setattr("slimmable._profile.profile", lambda *_, **__: costs())
    before = signal.signal(signal.SIGALRM, hang)
    yield Caller(run, capfd)
    signal.signal(signal.SIGALRM, before)


def test_every_option_has_a_row():
    assert set(TAKEN) == set(OPTIONS)
    parser = make_parser()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    for command, own in commands.choices.items():
        found = {action.option_strings[0] if action.option_strings else action.metavar for action in own._actions}
        assert {f"{command} {name}" for name in found - {"-h"}} == {
            name for name in OPTIONS if name.split()[0] == command
        }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_right_call_begins(caller, command):
    assert caller.fault([command, *RIGHT[command]])[0] == "taken"


@pytest.mark.parametrize("option", OPTIONS)
def test_values_without_meaning_are_refused(caller, option):
    command, classes, each = OPTIONS[option]
    right = list(RIGHT[command])
    place = 0
    if is_positional(each):
        positional = [one for options in classes for one in fields(options) if is_positional(one)]
        place = positional.index(each)
        del right[place]
    elif flag(each.name) in right:
        at = right.index(flag(each.name))
        del right[at : at + 2]
    appended = each.metadata["parsing"].get("action") == "append"
    found = {}
    for name, words in bad_values(classes, each).items():
        if is_positional(each):
            line = [command, *right[:place], *words, *right[place:]]
        elif appended:
            words = words[: SEVERAL // 20]  # argparse copies a list each time
            line = [command, *right, *(part for word in words or [""] for part in (flag(each.name), word))]
        else:
            line = [command, *right, flag(each.name), *words]
        fault, said = caller.fault(line)
        if fault is None and not names(said, each, words):
            fault = "does not name the option and its value"
        if fault is not None:
            found[name] = (fault, "" if fault == "taken" else said[:300])
    assert found == dict.fromkeys(TAKEN[option], ("taken", ""))


def names(said, each, words):
    """Return whether a message names an option and its value; of paths, models and switches, the value is enough."""
    values = [form for word in words[:2] for form in forms(word)]
    if not values or len(words) > 2 or "expected " in said or "is for --method" in said:
        return name_of(each) in said or (is_positional(each) and "the following arguments are required" in said)
    enough = (
        is_positional(each)
        or each.default is False
        or any(word in said for word in ("write", "folder", "file", "model"))
    )
    return any(map(said.__contains__, values)) and (enough or name_of(each) in said)


@pytest.mark.parametrize("option", [option for option, (_, _, each) in OPTIONS.items() if not is_positional(each)])
def test_options_are_those_of_their_command(caller, option):
    each = OPTIONS[option][2]
    for other in COMMANDS:
        if f"{other} {flag(each.name)}" not in OPTIONS:
            fault, said = caller.fault([other, *RIGHT[other], flag(each.name), "1"])
            assert fault is None
            assert said.startswith(f"slimmable {other}: there is no option {flag(each.name)}")


DEVICES = (
    "meta",
    "cpu:-1",
    "cpu:256",
    "cuda:256",
    "cuda:x",
    "cuda:",
    "gpu",
    "CPU",
    "mps:9",
    "xla",
    "hpu",
    "vulkan",
    "fpga",
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # the program and its commands
        (["plan resnet18"], "argument COMMAND: invalid choice: 'plan resnet18'"),
        (["pretrian"], "; did you mean pretrain?"),
        (["--epochs", "3", "pretrain"], "invalid choice: '3'"),
        ([""], "'' is empty"),
        (["\0"], "'\\x00' is empty, longer than 4,096 characters, or not text"),
        (["x" * 5000], "longer than 4,096 characters"),
        (["plan", "test_resnet", "more"], "there is no option more"),
        (["plan", "test_resnet", "--", "--widths"], "there is no option"),
        (["plan", "--", "--widths"], "timm has no model '--widths'"),
        (["plan", "test_resnet", "@file"], "there is no option @file"),
        (["plan", "test_resnet", "--image"], "there is no option --image; did you mean --image-size?"),
        (["profile", "test_resnet", "--csv="], "--csv '' is empty"),
        (["pretrain", "--output="], "--output '' is empty"),
        (["pretrain", "--resume", "--output", "folder"], "is not the folder of a pre-training run"),
        # options that do not go together
        (["pretrain", "--epochs", "3", "--warmup-epochs", "3"], "--warmup-epochs 3 leaves none"),
        (["pretrain", "--epochs", "3", "--warmup-epochs", "1e6"], "--warmup-epochs 1e+06 leaves none"),
        (["pretrain", "--num-images", "1000000", "--image-size", "4096"], "memory"),
        (["pretrain", "--num-images", "16", "--bn-groups", "9", "--output", "a/b/c"], "--bn-groups 9 of --batch-size"),
        (["pretrain", "--universal", "--widths", "1"], "--universal needs a narrowest width"),
        (["pretrain", "--diagnostics", "--widths", "1"], "--diagnostics compares widths"),
        (["pretrain", "--method", "byol", "--distill", "kl"], "--distill kl compares logits"),
        (["pretrain", "--method", "simclr", "--augmentation", "supervised"], "--augmentation supervised makes one"),
        (["pretrain", "--method", "dino", "--gate-budget", "0.5"], "--gate-budget is for --method"),
        (["pretrain", "--method", "byol", "--gate-budget", "0.5", "--widths", "1", ".5", "--universal"], "fixed width"),
        (["pretrain", "--views-per-width", "--universal"], "--views-per-width are for fixed widths"),
        (["pretrain", "--bn-groups", "7"], "--bn-groups 7 of --batch-size 64: they must be equal"),
        (["pretrain", "--preset", "byol-imagenet", "--method", "simclr"], "is for --method byol, not simclr"),
        (["pretrain", "--preset", "byol-imagenet", "--data", "missing"], "--data missing: there is no such folder"),
        (["pretrain", "--data", "folder"], "holds no images"),
        (["pretrain", "--data", "wds/photos"], "--data wds/photos: timm reads wds/ only in order"),
        (["pretrain", "--data", "TFDS/mnist"], "so no run could be resumed"),
        (["pretrain", "--data", "torch/mnist"], "--data-dir None: it goes with torch/NAME"),
        (["pretrain", "--data", "torch/mnist", "--data-dir", "folder"], "--data torch/mnist cannot be read"),
        (["pretrain", "--data", "torch/abacus", "--data-dir", "folder"], "Unknown torchvision dataset abacus"),
        (["pretrain", "--data", "torch/folder", "--data-dir", "folder"], "folder holds no images"),
        (["pretrain", "--data", "torch/folder", "--data-dir", "missing"], "--data missing: there is no such folder"),
        (["pretrain", "--data-dir", "folder"], "or hfds/NAME, not --data digits"),
        (["pretrain", "--mean", "0.5", "0.5", "0.5"], "--mean: got 3 values; give one for all"),
        (["pretrain", "--std", "1", "1"], "--std: got 2 values; give one for all"),
        (["pretrain", "--model", "test_vit", "--image-size", "20"], "--image-size"),
        (["pretrain", "--image-size", "19"], "--image-size 20 or more"),
        (["export", "test_resnet", "--width", "1", "--pretrained", "--checkpoint", "x"], "--pretrained is not allowed"),
        (["export", "test_resnet", "--width", "1", "--checkpoint", "file"], "file is not a file of weights"),
        (["export", "test_resnet", "--width", "all", "--widths", "0.5"], "the full width 1.0 is missing"),
        (["export", "test_resnet", "--width", "0.5", "--widths", "1", "0.75"], "width 0.5 is not one of"),
        (["export", "file", "--width", "1"], "file cannot be read"),
        (["export", "RUN", "--width", "0.3"], "width 0.3 is not one of this model's widths"),
        (["export", "RUN", "--width", "1", "--num-classes", "0"], "already determines --num-classes"),
        (["export", "test_vit", "--width", "1", "--image-size", "20"], "Input height (20) should be divisible"),
        (["plan", "test_vit", "--image-size", "20"], "Input height (20) should be divisible"),
        (["profile", "test_resnet", "--csv", "missing/table.csv"], "missing/table.csv"),
        (["profile", "test_resnet", "--image-size", "-1"], "--image-size must be from 1 to 4,096, got -1"),
        # kinds of models and devices
        *((["plan", name], f"timm has no model {name!r}") for name in (
            "timm/resnet18", "RESNET18", "resnet18 ",
            "resnet*", "torch.nn", "small_resnet/../resnet18",
        )),
        *((["plan", name], f"cannot make the model {name!r}") for name in ("hf-hub:timm/resnet18", "local-dir:folder")),
        (["plan", "resnet18.no_such_tag"], "resnet18.no_such_tag"),
        (["plan", "./file"], "file cannot be read"),
        (["plan", "RUN", "--widths", "1"], "already determines --widths"),
        (["plan", "resnet18.a:b"], "resnet18.a:b"),
        (["plan", "resnet18.../../file"], "resnet18.../../file"),
        *((["evaluate", "RUN", "--device", device], f"--device {device} cannot be used") for device in DEVICES),
    ],
)  # fmt: skip
def test_lines_without_meaning_are_refused(caller, line, message):
    fault, said = caller.fault(line)
    assert fault is None, said
    assert message in said


@pytest.mark.parametrize(
    "line",
    [
        ["pretrain", *RIGHT["pretrain"], "--epochs", "3", "--epochs", "4"],  # as scripts override what they append to
        ["plan", "test_resnet", "--image-size", "1_00"],  # numbers as in Python
        ["plan", "test_resnet", "--image-size", "+64"],
        ["plan", "small_resnet"],
        ["evaluate", "RUN", "--probes", "knn", "knn", "--device", "cpu:0"],
    ],
)
def test_lines_with_a_meaning_are_taken(caller, line):
    assert caller.fault(line)[0] == "taken"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_name_of_a_preset_is_exact(caller, preset):
    for name in (preset.upper(), preset[:-1], f" {preset}"):
        fault, said = caller.fault(["pretrain", "--preset", name])
        assert fault is None, said
        assert f"no --preset is called {name}" in said
