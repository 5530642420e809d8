"""Every public callable answers every kind of bad argument with an error that says what, where and which value.

`CALLS` has a good value and bad ones for each parameter of each public callable; `bad_values.py` makes the bad ones
from the kind of the argument. `python -m tests.life.test_bad_calls` counts what is tried and what is answered.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import os
import re
import signal
import sys
import tempfile
import types
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimmable
from slimmable import gating, layers, losses, methods, runtime, training
from slimmable.cli.commands import COMMANDS
from slimmable.cli.config import kind_of
from slimmable.cli.pretrain import Training
from slimmable.errors import ConversionError, InputError, SlimmableError
from slimmable.view.state import state_of
from tests.life import bad_values as bad
from tests.life.bad_values import Argument

WIDTHS = (1.0, 0.5)
X = torch.linspace(-1, 1, 24).reshape(6, 4)
Y = torch.arange(6) % 3


@dataclass(frozen=True)
class Call:
    """How a callable is called: an argument for each parameter, and a function for methods that need an object."""

    arguments: dict[str, Argument]
    run: Callable[..., Any] | None = None  # instead of the callable itself
    of: Callable[[], Any] | None = None  # makes the object of a method


# -- networks, made once and copied
def once(make: Callable[[], Any]) -> Callable[[], Any]:
    made = functools.cache(make)
    return lambda: copy.deepcopy(made())


@once
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


@once
def converted() -> nn.Module:
    return slimmable.slimify(network(), WIDTHS, example_inputs=X)


@once
def universal() -> nn.Module:
    return slimmable.slimify(network(), WIDTHS, example_inputs=X, universal=True)


@once
def backbone() -> nn.Module:
    return slimmable.slimify(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), WIDTHS,
                             example_inputs=X)  # fmt: skip


@once
def gated_model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    model = gating.gate(net, example_inputs=X)
    nn.init.normal_(model[2].channel_gate.at[0].expand.bias)
    return model.train()


@once
def encoder() -> nn.Module:
    torch.manual_seed(0)
    plain = methods.Encoder(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 4))
    return slimmable.slimify(plain, WIDTHS, example_inputs=X)


@once
def predictor() -> nn.Module:
    return slimmable.slimify(methods.BYOL.predictor(8, 4), WIDTHS, example_inputs=X)


def method() -> methods.Method:
    return methods.SimCLR(encoder())


def recipe(**options: Any) -> slimmable.SlimRecipe:
    return slimmable.SlimRecipe(converted(), **options)


def gated_run() -> gating.GatedPass:
    model = gated_model()
    with gating.gated(model) as run:
        model(X)
    return run


def pass_gated(model: nn.Module, input_size: tuple[int, ...] | None) -> None:
    with gating.gated(model, input_size) as run:
        model(X)
    run.share()


def moco() -> training.MoCo:
    return training.MoCo(nn.Linear(4, 4), 4, 8)


def diagnostics() -> training.GradientDiagnostics:
    return training.GradientDiagnostics(converted(), every=1)


def measured() -> training.GradientDiagnostics:
    own = diagnostics()
    for parameter in own.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    own.after_backward(1.0)
    return own


def session_with(metadata: dict[str, str]) -> Any:
    """What `Session` asks of onnxruntime's before its first call."""
    return types.SimpleNamespace(get_modelmeta=lambda: types.SimpleNamespace(custom_metadata_map=metadata))


def masks() -> Tensor:
    return torch.ones(6, 4)


def cut() -> dict[float, Tensor]:
    return {1.0: X.clone(), 0.5: X[:, :2].clone()}


ALL_FOLDERS = tempfile.TemporaryDirectory()  # goes with the tests


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=ALL_FOLDERS.name))


def saved(model: Callable[[], nn.Module] = converted) -> Any:
    file = new_folder() / "model.safetensors"
    slimmable.save(model(), file)
    return file


def elsewhere() -> Any:
    return saved().with_name("other.safetensors")


@functools.cache
def programs() -> Any:
    path = saved().with_name("programs.pt2")
    slimmable.export(converted(), path, example_inputs=X)
    return path


def quickly(call: Callable[[], Any]) -> Any:
    """Measure two networks twice, not dozens of them."""
    latency = importlib.import_module("slimmable.deploy.latency")
    with unittest.mock.patch.multiple(latency, _NETWORKS=1, _ROUNDS=2):
        return call()


@functools.cache
def table_of_times() -> Any:
    return quickly(lambda: slimmable.deploy.LatencyTable.measure(converted(), X))


@functools.cache
def saved_times() -> Any:
    path = saved().with_name("times.json")
    table_of_times().save(path)
    return path


def published(model: Callable[[], nn.Module]) -> Any:
    folder = new_folder()
    slimmable.save_pretrained(model(), folder, example_inputs=X)
    return folder


def pushed(**given: Any) -> str:
    with unittest.mock.patch("huggingface_hub.HfApi"):
        return slimmable.push_to_hub(**given, example_inputs=X)


# -- arguments that several calls share
MODEL = bad.slim(converted)
ANY_MODEL = bad.module(network)
WIDTH = bad.setting()
WIDTHS_OF = bad.widths(WIDTHS)
FLAG, ON = bad.flag(), bad.flag(True)
EXAMPLE = bad.mapping(lambda: X, size=(4,), other=bad.Of(lambda x: x[:, :-1])).but(none="timm's models need no example")
ROUNDING = bad.choice("floor")
SWITCHABLE = bad.function(lambda name, module: name == "0").but(list="nothing is switched", dict="nothing is switched")
NORM = {"slim": FLAG, "rounding": ROUNDING}
ROUND = bad.count(1).but(huge="it keeps every group whole")
OUTPUTS = bad.choice("auto").but(dict="no output is said anything about", list="no output is said anything about")
SKIP = bad.function(lambda name, module: False).but(list="nothing is skipped", dict="nothing is skipped")
LOADER = bad.batches(lambda: X)
NO_LOADER = Argument(
    lambda: None, {name: bad.Of(lambda _, make=make: make()) for name, make in LOADER.optional().values().items()}
)
QUEUE = bad.tensor(lambda: X.T.clone())
GATED = bad.slim(gated_model)
GATEABLE = bad.module(lambda: gating.ungate(gated_model()))
ENCODER = bad.module(encoder)
SIZE = bad.mapping(lambda: (4,), zero=(0,), negative=(-4,), other=(5,), huge=(10**30,), fraction=(4.5,), text=("4",),
                   tensor=X).optional()  # fmt: skip
CHANNELS = bad.count(8)
MATRIX = bad.tensor(lambda: X.clone())
WHOLE = {"bytes": "whole numbers are numbers", "integers": "whole numbers are numbers"}
FEATURES = bad.features(lambda: X.clone()).but(**WHOLE)
IMAGES = bad.features(lambda: X.clone()).but(
    bytes="images of bytes are scaled", integers="they are numbers", an_axis_less="refused only if labels are given"
)
LABELS = bad.labels(lambda: Y.clone())
SCALAR = bad.tensor(lambda: torch.tensor(2.0), **{"several": torch.ones(2)}).but(
    meta="so is the sum",
    an_axis_less="it has no axis",
    a_row_less="it has no axis",
    empty="it has no axis",
    an_axis_more="one number still",
)
TEMPERATURE = bad.positive(0.5)
DEVICE = bad.choice("cpu").but(none="torch's default", zero="torch counts devices", negative="torch counts devices",
                               true="torch counts devices")  # fmt: skip
DTYPE = bad.choice(torch.float32).but(none="torch's default")
EPS = bad.not_negative(1e-5)
MOMENTUM = bad.fraction(0.1).optional()


def conv_arguments(axes: int) -> dict[str, Argument]:
    several = {"of text": ("a",) * axes, "of zero": (0,) * axes}
    size = bad.count(1)
    sizes = Argument(size.good, {**size.bad, **several})
    return {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "kernel_size": sizes, "stride": sizes,
        "padding": Argument(lambda: 0, {**sizes.bad, "text": "middle"}).but(zero="none", of_zero="none"),
        "dilation": sizes, "groups": Argument(lambda: 1, {**size.bad, "not a divisor": 3}), "bias": FLAG,
        "padding_mode": bad.choice("zeros"), "device": DEVICE, "dtype": DTYPE, "widths": WIDTHS_OF, "slim_in": FLAG,
        "slim_out": FLAG, "overlap": ON, "rounding": ROUNDING,
    }  # fmt: skip


def norm_arguments() -> dict[str, Argument]:
    return {
        "num_features": CHANNELS, "eps": EPS, "momentum": MOMENTUM, "affine": ON, "track_running_stats": FLAG,
        "device": DEVICE, "dtype": DTYPE, "widths": WIDTHS_OF, "slim": FLAG, "rounding": ROUNDING,
    }  # fmt: skip


FEATURE_MAP = bad.maps_of(lambda good: bad.features(good).but(**WHOLE), cut)


def probes() -> Argument:
    return bad.listed(bad.choice("knn"), 1)


def batches_with(images: Argument, labels: Argument) -> Argument:
    """A loader of (images, labels): what is no loader, no pair, and the bad values of images and labels in a pair."""
    inner = {f"images: {name}": bad.Of(lambda _, make=make: [(make(), Y)]) for name, make in images.values().items()}
    inner |= {f"labels: {name}": bad.Of(lambda _, make=make: [(X, make())]) for name, make in labels.values().items()}
    wrong = {f"a batch that is {name}": [value] for name, value in {**bad.WRONG, **bad.NUMBERS}.items()}
    more = {"tensor": X, "iterator": bad.Of(iter), "a batch of three": [(X, Y, Y)], "dicts": [{"image": X, "label": Y}]}
    return Argument(lambda: [(X.clone(), Y.clone())], {**bad.WRONG, **bad.NUMBERS, **wrong, **more, **inner})


BATCHES = batches_with(IMAGES, LABELS)
PAIRS = batches_with(
    IMAGES.but(
        holding_nan="no width is sure of it",
        holding_infinity="no width is sure of it",
        array="images like others",
        nested_lists="images like others",
    ),
    LABELS.but(array="class numbers like others", nested_lists="class numbers like others"),
).but(iterator="it is gone over once")
BY_WIDTH = bad.mapping(
    lambda: {1.0: 2.0, 0.5: 1.0},
    **{"negative time": {1.0: -1.0, 0.5: 1.0}, "nan": {1.0: bad.math.nan, 0.5: 1.0}, "names": {"wide": 1.0}},
    **{"text for a time": {1.0: "a", 0.5: 1.0}, "a width of zero": {1.0: 1.0, 0.5: 1.0, 0.0: 1.0}},
)
NEIGHBOURS = {"k": bad.count(1), "metric": bad.choice("cosine"), "temperature": TEMPERATURE}


def probe_training() -> dict[str, Argument]:
    return {
        "features": FEATURE_MAP,
        "labels": LABELS,
        "num_classes": Argument(lambda: 3, {**bad.count(3).bad, "too few": 1}).optional(),
        "epochs": bad.natural(1), "batch_size": bad.count(4), "learning_rate": bad.not_negative(0.1),
        "seed": bad.count(1).but(zero="a seed", negative="a seed"),
    }  # fmt: skip


FEWER = MATRIX.but(a_row_less="there may be fewer queries than keys")


def two(*names: str, **more: Argument) -> dict[str, Argument]:
    return {**dict.fromkeys(names, MATRIX), **more}


def heads(**more: Argument) -> dict[str, Argument]:
    return {"in_features": CHANNELS, "hidden_dim": CHANNELS, "proj_dim": CHANNELS, **more}


DISTILL = Argument(losses.OnlineDistillation, {**bad.WRONG, **bad.NUMBERS}).optional()
BUDGET = bad.open_fraction(0.5)
WEIGHT = bad.not_negative(1.0)
MODULES = bad.listed(bad.module(lambda: nn.Linear(2, 2)), 1).but(list="no module", dict="no module")
BACKWARD = bad.function(Tensor.backward).optional()
LOSS_WEIGHTS = Argument(
    lambda: (1.5, 1.0),
    {**bad.WRONG, **bad.NUMBERS, "too few": (1.0,), "of text": ("a", "b"), "of nan": (1.0, bad.math.nan),
     "negative one": (1.0, -1.0), "letters": "ab", "of other widths": {1.0: 1.0, 0.3: 1.0}},
)  # fmt: skip


def in_loop(recipe: slimmable.SlimRecipe, **given: Any) -> None:
    for _ in recipe.widths(1.0):
        recipe.loss(**given)
        break


def in_once(recipe: slimmable.SlimRecipe, modules: Any) -> Any:
    for _ in recipe.widths(1.0):
        with recipe.once(modules):
            return


def closed(recipe: slimmable.SlimRecipe) -> Callable[[], Any]:
    return lambda: recipe.model(X).square().mean()


def step_of(method: methods.Method, recipe: Any = ..., **given: Any) -> Any:
    own = slimmable.SlimRecipe(method.online, method.distillation()) if recipe is ... else recipe
    return method.step(own, **given)


def batch() -> methods.Batch:
    return methods.Batch([X.clone(), X.clone()])


BATCH = Argument(
    batch,
    {
        **bad.WRONG, **bad.NUMBERS, "views": [X, X], "one view": methods.Batch([X]), "no views": methods.Batch([]),
        "views of text": methods.Batch("ab"), "nothing for views": methods.Batch(None),
        "a number for views": methods.Batch(3),
        "narrow views of no width": methods.Batch([X, X], narrow={0.3: [X, X]}),
        "narrow views that are a list": methods.Batch([X, X], narrow=[X, X]),
        **{f"view: {label}": bad.Of(lambda whole, value=value: methods.Batch([whole.views[0], value()]))
           for label, value in MATRIX.but(an_axis_more="refused by the encoder, by its own message",
                                          integers="refused by the encoder", complex="refused by the encoder",
                                          bytes="refused by the encoder").values().items()},
    },
)  # fmt: skip


TEXT = bad.choice("main").but(text="a name like another")
PUBLISHED = {
    "accuracy": bad.mapping(
        lambda: {1.0: {"knn": 0.5}},
        **{"unknown width": {0.3: {"knn": 0.5}}, "per cent": {1.0: {"knn": 50}}, "a number": {1.0: 0.5}},
    ).but(none="none is known", dict="none is known"),
    "license": TEXT.optional(), "repo_id": TEXT.optional(),
}  # fmt: skip


IMPORTANCE = Argument(
    lambda: None,
    {
        **bad.choice("magnitude").optional().bad,
        "a function of nothing": lambda: [],
        "a function without scores": lambda model, plan: [],
        "a function of text": lambda model, plan: ["a" for _ in plan.groups],
        "a function of nan": lambda model, plan: [[bad.math.nan] * group.units for group in plan.groups],
    },
)


CALLS: dict[str, Call] = {
    # -- converting, switching
    "slimify": Call(
        {
            "model": ANY_MODEL,
            "widths": WIDTHS_OF,
            "example_inputs": EXAMPLE,
            "skip": SKIP,
            "round_to": ROUND,
            "rounding": ROUNDING,
            "overlap": ON,
            "switchable": SWITCHABLE,
            "importance": IMPORTANCE,
            "outputs": OUTPUTS,
            "universal": FLAG,
            "inplace": FLAG,
        }
    ),
    "plan": Call(
        {
            "model": ANY_MODEL,
            "widths": WIDTHS_OF.optional(),
            "example_inputs": EXAMPLE,
            "skip": SKIP,
            "round_to": ROUND,
            "rounding": ROUNDING,
            "overlap": ON,
            "switchable": SWITCHABLE,
            "outputs": OUTPUTS,
            "universal": FLAG,
        }
    ),
    "extract": Call({"model": MODEL, "width": WIDTH, "repair": NO_LOADER}),
    "repair": Call(
        {
            "model": ANY_MODEL,
            "loader": LOADER,
            "width": WIDTH.but(unknown="the network is cut to any"),
            "importance": IMPORTANCE,
            "example_inputs": EXAMPLE,
            "ridge": bad.not_negative(0.001),
        }
    ),
    "set_width": Call({"model": MODEL, "width": WIDTH}),
    "at_width": Call({"model": MODEL, "width": WIDTH}),
    "inference": Call({"model": MODEL}),
    "width_of": Call({"model": MODEL}),
    "widths_of": Call({"model": MODEL}),
    "run_widths": Call({"model": MODEL}, run=lambda model: slimmable.run_widths(model, X)),
    "AllWidths": Call({"model": MODEL}),
    "full_state_dict": Call(
        {
            "model": ANY_MODEL,
            "prefix": bad.choice("a.").but(empty="no prefix", text="a prefix like another"),
            "keep_vars": FLAG,
        }
    ),
    "profile": Call(
        {
            "model": ANY_MODEL,
            "input_size": SIZE,
            "example_inputs": EXAMPLE,
            "repeats": bad.natural(0),
        },
        run=lambda model, input_size=None, example_inputs=None, repeats=0: slimmable.profile(
            model,
            None if example_inputs is not None and input_size == (4,) else input_size,
            example_inputs=example_inputs if input_size == (4,) else None,
            repeats=repeats,
        ),
    ),
    "search": Call(
        {
            "model": Argument(universal, {**MODEL.bad, "by hand": slimmable.SlimLinear(4, 2, widths=WIDTHS)}),
            "evaluate": Argument(
                lambda: lambda net: 1.0,
                {
                    **bad.function(len).bad,
                    "returns none": lambda net: None,
                    "returns text": lambda net: "three",
                    "returns nan": lambda net: bad.math.nan,
                },
            ),
            "budget": Argument(
                lambda: 0.8,
                {**bad.open_fraction(0.8).bad, "of text": ["a"], "of nan": [bad.math.nan], "too small": 1e-9},
            ).but(one="all of it"),
            "of": bad.choice("macs"),
            "step": bad.open_fraction(0.25),
            "calibrate": LOADER.optional(),
            "table": Argument(lambda: None, {**bad.path(lambda: None).optional().bad}),
            "progress": FLAG,
        }
    ),
    "export": Call(
        {
            "model": bad.slim(converted),
            "path": bad.path(elsewhere),
            "width": Argument(lambda: None, bad.setting().optional().bad),
            "widths": Argument(lambda: None, bad.widths().optional().bad),
            "example_inputs": EXAMPLE,
            "calibration": NO_LOADER,
            "arguments": bad.mapping(lambda: None).but(none="they are read off the model", dict="no arguments"),
        }
    ),
    "deploy.Programs": Call({"path": bad.path(programs)}),
    "deploy.LatencyTable.measure": Call(
        {"model": MODEL, "example_inputs": EXAMPLE, "runtime": bad.choice("torch")},
        run=lambda **given: quickly(lambda: slimmable.deploy.LatencyTable.measure(**given)),
    ),
    "deploy.LatencyTable.predict": Call(
        {"plan": Argument(lambda: slimmable.plan(converted()), {**bad.WRONG, **bad.NUMBERS}), "setting": WIDTH},
        of=table_of_times,
    ),
    "deploy.LatencyTable.save": Call({"path": bad.path(elsewhere)}, of=table_of_times),
    "deploy.LatencyTable.load": Call({"path": bad.path(saved_times)}),
    "save": Call(
        {
            "model": ANY_MODEL,
            "path": bad.path(elsewhere),
            "arguments": bad.mapping(lambda: None).but(none="they are read off the model", dict="no arguments"),
        }
    ),
    "load": Call(
        {
            "path": bad.path(saved),
            "model": Argument(
                network, {**ANY_MODEL.bad, "another": nn.Linear(4, 2), "converted": bad.Of(lambda net: converted())}
            ),
        }
    ),
    "save_pretrained": Call(
        {
            "model": ANY_MODEL,
            "folder": bad.path(lambda: published(converted)).but(empty="the folder that is the current one"),
            "example_inputs": EXAMPLE.but(dict="refused by the forward, as by that of slimify"),
            "arguments": bad.mapping(lambda: None).but(none="they are read off the model", dict="no arguments"),
            **PUBLISHED,
        }
    ),
    "push_to_hub": Call(
        {
            "model": ANY_MODEL,
            "repo_id": TEXT,
            "private": FLAG.optional(),
            "token": TEXT.optional(),
        },
        run=pushed,
    ),
    "from_pretrained": Call(
        {
            "repo_or_folder": bad.path(lambda: published(converted)),
            "width": WIDTH.optional(),
            "model": Argument(
                network, {**ANY_MODEL.bad, "another": nn.Linear(4, 2), "converted": bad.Of(lambda net: converted())}
            ),
            "revision": TEXT.optional(),
            "token": TEXT.optional(),
        }
    ),
    "load_slimclr": Call(
        {"checkpoint": bad.path(saved), "widths": WIDTHS_OF},
        run=lambda checkpoint, widths: (
            None
            if str(checkpoint).endswith("/model.safetensors") and widths == WIDTHS
            else slimmable.load_slimclr(checkpoint, widths=widths)
        ),
    ),
    "register_rule": Call(
        {
            "op": bad.choice("tests::op"),
            "rule": bad.function(lambda op: None).optional(),
            "replace": ON,
        },
        run=lambda op, rule, replace: slimmable.register_rule(op, rule, replace=replace),
    ),
    # -- layers
    **{f"layers.SlimConv{axes}d": Call(conv_arguments(axes)) for axes in (1, 2, 3)},
    **{f"layers.SwitchableBatchNorm{axes}d": Call(norm_arguments()) for axes in (1, 2, 3)},
    "layers.SlimLinear": Call(
        {
            "in_features": CHANNELS,
            "out_features": CHANNELS,
            "bias": FLAG,
            "device": DEVICE,
            "dtype": DTYPE,
            "widths": WIDTHS_OF,
            "slim_in": FLAG,
            "slim_out": FLAG,
            "overlap": ON,
            "rounding": ROUNDING,
        }
    ),
    "layers.SlimLayerNorm": Call(
        {
            "normalized_shape": Argument(lambda: (3, 8), {**bad.count(8).bad, "of zero": (3, 0), "of text": ("a",)}),
            "eps": EPS,
            "elementwise_affine": ON,
            "bias": FLAG,
            "device": DEVICE,
            "dtype": DTYPE,
            "widths": WIDTHS_OF,
            "rounding": ROUNDING,
        }
    ),
    "layers.SlimGroupNorm": Call(
        {
            "num_groups": Argument(lambda: 4, {**bad.count(4).bad, "not a divisor": 3}),
            "num_channels": CHANNELS,
            "eps": EPS,
            "affine": ON,
            "device": DEVICE,
            "dtype": DTYPE,
            "widths": WIDTHS_OF,
            "rounding": ROUNDING,
        }
    ),
    "layers.SwitchableLinear": Call(
        {
            "in_features": CHANNELS,
            "out_features": CHANNELS,
            "widths": WIDTHS_OF,
            "bias": FLAG,
            "device": DEVICE,
            "dtype": DTYPE,
            "slim_in": FLAG,
            "slim_out": FLAG,
            "rounding": ROUNDING,
        }
    ),
    "layers.SwitchableProbe": Call(
        {
            "in_features": CHANNELS,
            "num_classes": CHANNELS,
            "widths": WIDTHS_OF,
            "bias": FLAG,
            "device": DEVICE,
            "dtype": DTYPE,
            "rounding": ROUNDING,
        }
    ),
    "layers.SwitchableContainer": Call({"widths": WIDTHS_OF}),
    "layers.SwitchableNorm": Call(
        {
            "full": bad.module(lambda: nn.BatchNorm1d(8)),
            "widths": WIDTHS_OF,
            "kept": Argument(
                lambda: (None, 4),
                {
                    **bad.WRONG,
                    **bad.NUMBERS,
                    "zero": (None, 0),
                    "negative": (None, -1),
                    "too many": (None, 9),
                    "unknown units": (None, (8, 9)),
                    "fraction": (None, 1.5),
                    "one": (None,),
                    "true": (None, True),
                    "of text": (None, "a"),
                    "no units": (None, ()),
                },
            ),
            "shared_affine": FLAG,
        }
    ),
    **{
        f"layers.{name}.from_plain": Call(
            {"widths": WIDTHS_OF, "module": bad.module(make), **options}, of=lambda name=name: getattr(layers, name)
        )
        for name, make, options in [
            ("SlimLinear", lambda: nn.Linear(4, 2), {}),
            ("SlimConv1d", lambda: nn.Conv1d(4, 2, 1), {}),
            ("SlimConv2d", lambda: nn.Conv2d(4, 2, 1), {}),
            ("SlimConv3d", lambda: nn.Conv3d(4, 2, 1), {}),
            ("SlimLayerNorm", lambda: nn.LayerNorm(4), {}),
            ("SlimGroupNorm", lambda: nn.GroupNorm(2, 4), {}),
            ("SwitchableLinear", lambda: nn.Linear(4, 2), {}),
            ("SwitchableProbe", lambda: nn.Linear(4, 2), {"rounding": ROUNDING}),
            ("SwitchableBatchNorm1d", lambda: nn.BatchNorm1d(4), NORM),
            ("SwitchableBatchNorm2d", lambda: nn.BatchNorm2d(4), NORM),
            ("SwitchableBatchNorm3d", lambda: nn.BatchNorm3d(4), NORM),
        ]
    },
    # -- losses
    "losses.contrastive_cross_entropy": Call(
        {"logits": MATRIX.but(a_row_less="a batch like another", meta="so is the loss"), "temperature": TEMPERATURE}
    ),
    "losses.moco_logits": Call(two("query", "key", queue=QUEUE)),
    "losses.info_nce": Call(two("query", "key", queue=QUEUE, temperature=TEMPERATURE)),
    "losses.nt_xent_logits": Call(two("z0", "z1")),
    "losses.nt_xent": Call(two("z0", "z1", temperature=TEMPERATURE)),
    "losses.moco_v3_logits": Call(two("keys", query=FEWER, temperature=TEMPERATURE, offset=bad.natural(0))),
    "losses.moco_v3_loss": Call(two("keys", query=FEWER, temperature=TEMPERATURE, offset=bad.natural(0))),
    "losses.byol_loss": Call(two("prediction", "target")),
    "losses.simsiam_loss": Call(two("prediction", "target")),
    "losses.barlow_twins_loss": Call(two("z0", "z1", redundancy=WEIGHT)),
    "losses.dino_loss": Call(
        {
            "students": bad.listed(MATRIX, 3),
            "teachers": bad.listed(MATRIX, 2),
            "center": bad.tensor(lambda: X[0].clone()).optional(),
            "teacher_temperature": TEMPERATURE,
            "student_temperature": TEMPERATURE,
        }
    ),
    "losses.vicreg_loss": Call(two("z0", "z1", invariance=WEIGHT, variance=WEIGHT, covariance=WEIGHT)),
    "losses.soft_cross_entropy": Call(
        two("student", "teacher", teacher_temperature=TEMPERATURE, student_temperature=TEMPERATURE)
    ),
    "losses.embedding_cross_entropy": Call(
        two("student", "teacher", teacher_temperature=TEMPERATURE, student_temperature=TEMPERATURE)
    ),
    "losses.squared_error": Call(two("student", "teacher")),
    "losses.decoupled_distillation": Call(
        two(
            "student",
            "teacher",
            target=Argument(
                lambda: torch.zeros(6).long(),
                {**LABELS.but(none="", one_number="").bad, "column 9": 9, "none": None, "scalar": torch.tensor(1)},
            ),
            alpha=WEIGHT,
            beta=WEIGHT,
            temperature=TEMPERATURE,
        )
    ),
    "losses.standardised_distillation": Call(two("student", "teacher", temperature=TEMPERATURE, scale=TEMPERATURE)),
    "losses.width_weights": Call({"widths": WIDTHS_OF, "mode": bad.choice("ones")}),
    "losses.slim_term": Call(
        {
            "loss": SCALAR,
            "distillation": SCALAR.optional(),
            "weight": bad.real(1.0),
            "distill_weight": bad.fraction(0.5),
        }
    ),
    "losses.slim_loss": Call(
        {
            "losses": bad.listed(SCALAR),
            "distillations": bad.listed(SCALAR, 1).but(list="none", dict="none"),
            "weights": Argument(lambda: (1.5, 1.0), {**LOSS_WEIGHTS.bad, "other length": (1.0,)}).but(
                none="1 everywhere", negative_one="a number like another"
            ),
            "distill_weight": bad.fraction(0.5),
        }
    ),
    "OnlineDistillation": Call(
        {
            "kind": bad.choice("kl"),
            "teacher_temperature": TEMPERATURE,
            "student_temperature": TEMPERATURE,
            "teachers": bad.choice("widest"),
            "weight": bad.fraction(0.5),
        }
    ),
    "OnlineDistillation.forward": Call(
        {
            "student": MATRIX,
            "teachers": MATRIX,
            "target": Argument(lambda: 0, {"none": None, "text": "three", "column 9": 9, "fraction": 0.5}),
        },
        of=lambda: losses.OnlineDistillation("dkd"),
    ),
    "OnlineDistillation.floor": Call(
        {"teachers": MATRIX.but(a_row_less="a batch like another", meta="so is the floor")},
        of=losses.OnlineDistillation,
    ),
    # -- training
    "calibrate_bn": Call(
        {
            "model": MODEL,
            "loader": LOADER,
            "widths": bad.listed(WIDTH, 1).but(none="all widths", list="no width, so nothing is calibrated"),
        }
    ),
    "SlimRecipe": Call(
        {
            "model": MODEL,
            "distill": DISTILL,
            "loss_weights": LOSS_WEIGHTS,
            "slow_start": bad.fraction(0.0),
            "random_widths": bad.natural(0),
            "seed": bad.count(1).but(zero="a seed", negative="a seed"),
            "steps": bad.count(1).optional(),
            "frozen": MODULES,
            "once": MODULES,
            "backward": BACKWARD,
        }
    ),
    **{
        f"SlimRecipe.{name}": Call(
            {"closure": bad.function(len), "frozen": MODULES, "once": MODULES, **more},
            of=recipe,
            run=lambda own, closure, name=name, **given: getattr(own, name)(
                closed(own) if closure is len else closure, **given
            ),
        )
        for name, more in [("backward", {"backward": BACKWARD}), ("total", {}), ("parts", {})]
    },
    "SlimRecipe.step": Call({"function": bad.function(len)}, of=recipe),
    "SlimRecipe.load_state_dict": Call(
        {
            "state": bad.mapping(
                lambda: {"steps_done": 1},
                other={"steps": 1},
                negative={"steps_done": -1},
                fraction={"steps_done": 0.5},
                nan={"steps_done": bad.math.nan},
                more={"steps_done": 1, "a": 2},
            )
        },
        of=recipe,
    ),
    "SlimRecipe.widths": Call({"progress": bad.fraction(0.5), "step": bad.natural(0).optional()}, of=recipe),
    "SlimRecipe.once": Call(
        {"modules": bad.module(lambda: nn.Linear(2, 2)).but(list="no module", dict="no module")}, of=recipe, run=in_once
    ),
    "SlimRecipe.loss": Call(
        {
            "loss": SCALAR,
            "teach": bad.listed(
                MATRIX.but(
                    **dict.fromkeys(
                        ("a_row_less", "meta", "an_axis_more", "an_axis_less"),
                        "refused by the distillation, at the next width",
                    )
                )
            ),
        },
        of=lambda: recipe(distill=losses.OnlineDistillation()),
        run=in_loop,
    ),
    "training.GradientDiagnostics": Call({"model": MODEL, "every": bad.count(1)}),
    "training.GradientDiagnostics.after_backward": Call({"width": WIDTH}, of=diagnostics),
    "training.GradientDiagnostics.after_step": Call({"scale": bad.positive(1.0)}, of=lambda: measured()),
    "training.GradientDiagnostics.to_csv": Call({"path": bad.path(elsewhere)}, of=diagnostics),
    "training.cosine_momentum": Call({"progress": bad.fraction(0.5), "start": bad.fraction(0.9)}),
    "training.MomentumEncoder": Call({"network": Argument(network, {**ANY_MODEL.bad, "no parameters": nn.Identity()})}),
    "training.MomentumEncoder.update": Call(
        {
            "network": Argument(
                network,
                {
                    **ANY_MODEL.bad,
                    "another": nn.Linear(4, 2),
                    "other shapes": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)),
                    "on meta": bad.Of(lambda net: net.to("meta")),
                },
            ),
            "momentum": bad.fraction(0.9),
        },
        of=lambda: training.MomentumEncoder(network()),
    ),
    "training.MoCo": Call(
        {
            "network": Argument(network, {**ANY_MODEL.bad, "no parameters": nn.Identity()}),
            "proj_dim": CHANNELS,
            "queue_size": CHANNELS,
            "momentum": bad.fraction(0.9),
            "bn_splits": bad.count(1),
        }
    ),
    "training.MoCo.keys": Call(
        {"network": bad.module(lambda: nn.Linear(4, 4)), "images": MATRIX.but(a_row_less="a batch like another")},
        of=moco,
    ),
    "training.MoCo.enqueue": Call({"keys": MATRIX.but(a_row_less="a batch like another")}, of=moco),
    "training.average_gradients": Call({"model": ANY_MODEL}),
    "training.gather": Call(
        {
            "tensor": MATRIX.but(
                **dict.fromkeys(
                    ("empty", "bytes", "integers", "complex", "an_axis_more", "an_axis_less", "a_row_less"),
                    "gathered as it is",
                )
            )
        }
    ),
    "training.synchronised_batchnorm": Call(
        {"groups": bad.count(1)}, run=lambda groups: training.synchronised_batchnorm(groups).__enter__()
    ),
    # -- evaluation
    "evaluation.label_fraction": Call(
        {
            "labels": LABELS.but(a_row_less="fewer labels"),
            "fraction": bad.fraction(0.5),
            "seed": bad.count(1).but(zero="a seed", negative="a seed"),
        }
    ),
    "evaluation.evaluate_widths": Call(
        {
            "backbone": bad.slim(backbone),
            "train": IMAGES,
            "train_labels": LABELS,
            "test": IMAGES,
            "test_labels": LABELS,
            "probes": probes(),
            **NEIGHBOURS,
        }
    ),
    "evaluation.evaluate_features": Call(
        {
            "train": FEATURE_MAP,
            "train_labels": LABELS,
            "test": FEATURE_MAP,
            "test_labels": LABELS,
            "probes": probes(),
            **NEIGHBOURS,
        }
    ),
    "evaluation.knn_accuracy": Call(
        {
            "train": FEATURES,
            "train_labels": LABELS,
            "test": FEATURES,
            "test_labels": LABELS,
            **NEIGHBOURS,
        }
    ),
    "evaluation.linear_evaluation": Call(
        {
            "backbone": bad.slim(backbone),
            "train": BATCHES,
            "test": BATCHES,
            "num_classes": Argument(lambda: 3, {**bad.count(3).bad, "too few": 1}),
            "epochs": bad.natural(1),
            "learning_rate": bad.not_negative(0.1),
            "milestones": bad.listed(bad.count(1), 1).optional(),
            "path": bad.path(elsewhere).optional(),
        }
    ),
    "evaluation.probe_loss": Call(
        {"scores": bad.maps_of(bad.tensor, lambda: {1.0: X.clone(), 0.5: X.clone()}), "labels": LABELS}
    ),
    "evaluation.train_probe": Call({**probe_training(), "shared": FLAG}),
    "evaluation.ridge_classifier": Call(
        {
            "features": FEATURES,
            "labels": LABELS,
            "num_classes": Argument(lambda: 3, {**bad.count(3).bad, "too few": 1}).optional(),
            "penalty": bad.positive(0.1),
        }
    ),
    # -- gates
    "gating.gate": Call(
        {
            "model": GATEABLE,
            "example_inputs": EXAMPLE,
            "skip": SKIP,
            "separate_norms": FLAG,
            "temperature": TEMPERATURE,
            "open_at_zero": FLAG,
            "bias": FLAG,
            "inplace": FLAG,
        }
    ),
    "gating.gate_plan": Call({"model": GATEABLE, "example_inputs": EXAMPLE, "skip": SKIP}),
    "gating.ungate": Call({"model": ANY_MODEL}),
    "gating.gate_parameters": Call({"model": ANY_MODEL}),
    "gating.has_gates": Call({"model": ANY_MODEL}),
    "gating.hard_mask": Call(
        {
            "logits": MATRIX,
            "uniform": bad.tensor(lambda: torch.rand(6, 4)).optional(),
            "temperature": TEMPERATURE,
            "open_at_zero": FLAG,
        }
    ),
    "gating.ChannelGate": Call(
        {
            "channels": CHANNELS,
            "units": CHANNELS,
            "temperature": TEMPERATURE,
            "open_at_zero": FLAG,
            "bias": FLAG,
        }
    ),
    "gating.ChannelGate.logits": Call(
        {"pooled": MATRIX.but(a_row_less="a batch like another")}, of=lambda: gating.ChannelGate(4, 8).eval()
    ),
    "gating.ChannelGate.forward": Call(
        {"pooled": MATRIX.but(a_row_less="a batch like another")}, of=lambda: gating.ChannelGate(4, 8).eval()
    ),
    "gating.gated": Call({"model": GATED, "input_size": SIZE}, run=pass_gated),
    "gating.dense": Call({"model": GATED}),
    "gating.GatePlan.least_share": Call({"width": bad.number(1.0)}, of=lambda: gating.gate_plan(gated_model())),
    "gating.annealed": Call(
        {
            "epoch": bad.real(1.0),
            "start": bad.real(1.0),
            "end": bad.real(0.0),
            "alpha": bad.not_negative(0.02),
            "first_epoch": bad.not_negative(0),
        }
    ),
    "gating.budget_loss": Call(
        {
            "share": bad.tensor(lambda: torch.rand(6)).but(
                an_axis_more="of any shape",
                an_axis_less="of any shape",
                a_row_less="of any shape",
                meta="so is the loss",
            ),
            "budget": BUDGET,
            "weight": WEIGHT,
        }
    ),
    "gating.bound_loss": Call(
        {
            "open_fractions": bad.tensor(lambda: torch.rand(6)).but(a_row_less="of any length", meta="so is the loss"),
            "budget": BUDGET,
            "p": bad.fraction(0.5),
            "weight": WEIGHT,
        }
    ),
    "gating.open_fractions": Call(
        {
            "masks": bad.listed(
                bad.tensor(masks).but(
                    a_row_less="a batch like another", an_axis_more="of any shape", an_axis_less="of any shape"
                )
            ).but(),
            "closed_gradient": FLAG,
        }
    ),
    "gating.GateBudget": Call(
        {
            "budget": BUDGET,
            "budget_weight": WEIGHT,
            "bound_weight": WEIGHT,
            "alpha": WEIGHT,
            "first_epoch": WEIGHT,
            "closed_gradient": FLAG,
        }
    ),
    "gating.GateBudget.forward": Call(
        {"run": bad.mapping(gated_run), "epoch": bad.real(1.0)}, of=lambda: gating.GateBudget(0.5)
    ),
    "gating.gate_activity": Call({"model": GATED, "loader": LOADER}),
    "gating.calibrate_gates": Call({"model": GATED, "loader": LOADER, "budget": BUDGET}),
    "gating.extract_gated": Call(
        {
            "model": GATED,
            "loader": LOADER,
            "keep": bad.number(0.5).optional(),
            "budget": BUDGET.optional(),
            "round_to": ROUND,
            "recalibrate": FLAG,
        },
        run=lambda model, loader, keep, budget, round_to, recalibrate: gating.extract_gated(
            model,
            loader,
            None if type(budget) is not float or budget != 0.5 else keep,
            budget=None if type(budget) is float and budget == 0.5 else budget,
            round_to=round_to,
            recalibrate=recalibrate,
        ),
    ),
    # -- where the network runs
    "runtime.WidthController": Call(
        {
            "latencies": BY_WIDTH,
            "deadline_ms": bad.positive(1.0),
            "quantile": bad.open_fraction(0.9),
            "window": bad.count(4),
        }
    ),
    "runtime.WidthController.record": Call(
        {"width": WIDTH, "ms": bad.not_negative(1.0)},
        of=lambda: runtime.WidthController({1.0: 2.0, 0.5: 1.0}, deadline_ms=3.0),
    ),
    "runtime.Session": Call({"model": bad.mapping(lambda: session_with({"slimmable.widths": "[1.0, 0.5]"}))}),
    "runtime.Cascade": Call(
        {
            "model": MODEL,
            "threshold": Argument(
                lambda: 0.5, {**bad.number(0.5).bad, "too many": [0.5, 0.5], "of text": ["a"], "of nan": [bad.math.nan]}
            ).but(**dict.fromkeys(("zero", "negative", "fractional", "infinite", "huge"), "any number")),
            "confidence": Argument(lambda: "margin", {**bad.choice("margin").bad}),
            "macs": BY_WIDTH.optional(),
        }
    ),
    "runtime.calibrate_cascade": Call(
        {"model": bad.slim(backbone), "loader": PAIRS, "target": bad.number(0.9), "of": bad.choice("accuracy")}
    ),
    # -- methods
    "methods.Encoder": Call({"backbone": ANY_MODEL, "projector": ANY_MODEL}),
    "methods.Method": Call({"encoder": ENCODER}),
    "methods.SimCLR": Call({"encoder": ENCODER, "temperature": TEMPERATURE}),
    "methods.VICReg": Call({"encoder": ENCODER, "invariance": WEIGHT, "variance": WEIGHT, "covariance": WEIGHT}),
    "methods.BarlowTwins": Call({"encoder": ENCODER, "redundancy": WEIGHT}),
    "methods.SimSiam": Call({"encoder": ENCODER, "predictor": bad.module(predictor)}),
    "methods.DINO": Call(
        {
            "encoder": ENCODER,
            "proj_dim": CHANNELS,
            "local_crops": bad.natural(2),
            "momentum": bad.fraction(0.9),
            "temperature": TEMPERATURE,
            "teacher_temperature": TEMPERATURE,
            "warm_up": bad.fraction(0.1),
            "center_momentum": bad.fraction(0.9),
            "freeze": bad.fraction(0.1),
        }
    ),
    "methods.DINO.projector": Call(heads(bottleneck_dim=CHANNELS, batch_norm=FLAG)),
    "methods.Supervised": Call({"encoder": ENCODER, "label_smoothing": bad.fraction(0.1)}),
    "methods.Distillation": Call(
        {
            "encoder": ENCODER,
            "teacher": bad.module(network),
            "kind": bad.choice("scores"),
            "temperature": TEMPERATURE,
        }
    ),
    "methods.BYOL": Call({"encoder": ENCODER, "predictor": bad.module(predictor), "momentum": bad.fraction(0.9)}),
    "methods.MoCoV3": Call(
        {
            "encoder": ENCODER,
            "predictor": bad.module(predictor),
            "momentum": bad.fraction(0.9),
            "temperature": TEMPERATURE,
        }
    ),
    "methods.MoCoV2": Call(
        {
            "encoder": ENCODER,
            "proj_dim": CHANNELS,
            "queue_size": CHANNELS,
            "momentum": bad.fraction(0.9),
            "bn_splits": bad.count(1),
            "temperature": TEMPERATURE,
        }
    ),
    "methods.Distillation.projector": Call({"in_features": CHANNELS, "proj_dim": CHANNELS}),
    "methods.Supervised.projector": Call({"in_features": CHANNELS, "num_classes": CHANNELS}),
    **{
        f"methods.{name}.projector": Call(heads(**({"layers": bad.count(2)} if name == "MoCoV3" else {})))
        for name in ("SimCLR", "VICReg", "MoCoV2", "BYOL", "MoCoV3", "SimSiam", "BarlowTwins")
    },
    **{
        f"methods.{name}.predictor": Call({"hidden_dim": CHANNELS, "proj_dim": CHANNELS})
        for name in ("BYOL", "SimSiam")
    },
    "methods.MoCoV3.predictor": Call({"hidden_dim": CHANNELS, "proj_dim": CHANNELS, "last_norm": FLAG}),
    "methods.Method.step": Call(
        {
            "recipe": Argument(lambda: ..., {**bad.WRONG, **bad.NUMBERS, "of another": bad.Of(lambda own: recipe())}),
            "batch": BATCH,
            "progress": bad.fraction(0.9),
            "step": bad.natural(0).optional(),
            "autocast": bad.choice(torch.bfloat16).optional(),
            "backward": bad.function(Tensor.backward),
            "diagnostics": bad.mapping(lambda: None).optional(),
            "gates": bad.mapping(lambda: None).optional(),
        },
        of=method,
        run=step_of,
    ),
}


# -- the command as a function
def taken(**options: Any) -> None:
    """Call `slimmable.pretrain` up to where it would train."""
    before, place = Training.take_step, os.getcwd()
    Training.take_step = stopped  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Stopped):
            os.chdir(folder)
            slimmable.pretrain(**{"output": "run", "quiet": True, **options})
    finally:
        os.chdir(place)
        Training.take_step = before  # type: ignore[method-assign]


class Stopped(BaseException):
    """The training began."""


def stopped(*_: object) -> None:
    raise Stopped


def option_argument(each: Any) -> Argument:
    """A right value of an option of `pretrain`, beside those that its kind makes wrong."""
    one, _ = kind_of(each)
    small = {"num_images": 16, "batch_size": 8, "device": "cpu", "workers": 0, "output": "run", "quiet": True,
             "widths": WIDTHS, "preset": None, "knn_every": 0}  # fmt: skip
    good = small.get(each.name, each.default)
    wrong = {**bad.WRONG, **bad.NUMBERS, "zero byte": "a\0b", "empty": "", "blank": " ", "long": "m" * 5000}
    if each.name == "widths":
        wrong = {**bad.widths().bad, "huge": 1e30}
    elif one is bool:
        wrong = bad.flag().bad
    elif one is int:
        wrong = bad.count(1).bad
    elif one is float:
        wrong = {**bad.number(0.5).bad, "huge": 1e30}
    within = each.metadata["within"]
    fine = {"none": "the default"} if each.default is None else {}
    fine |= {"list": "the default"} if each.default == () else {}
    fine |= {"zero": "in its range"} if within and within[0] <= 0 else {}
    fine |= {"fractional": "in its range"} if one is float and within and within[0] <= 1.5 <= within[1] else {}
    fine |= {"text": "a new name"} if each.name == "output" else {}
    return Argument(lambda: good, wrong).but(**fine)


PRETRAIN = [each for options in COMMANDS["pretrain"] for each in fields(options)]
CALLS["pretrain"] = Call({each.name: option_argument(each) for each in PRETRAIN}, run=taken)


# -- the layers that run, and the programs of others
CHANNELS_OF = {
    "SlimLinear": ((2, 8), lambda: layers.SlimLinear(8, 4, widths=WIDTHS)),
    "SlimConv1d": ((2, 8, 5), lambda: layers.SlimConv1d(8, 4, 1, widths=WIDTHS)),
    "SlimConv2d": ((2, 8, 5, 5), lambda: layers.SlimConv2d(8, 4, 1, widths=WIDTHS)),
    "SlimConv3d": ((2, 8, 2, 2, 2), lambda: layers.SlimConv3d(8, 4, 1, widths=WIDTHS)),
    "SlimLayerNorm": ((2, 8), lambda: layers.SlimLayerNorm(8, widths=WIDTHS)),
    "SlimGroupNorm": ((2, 8, 5), lambda: layers.SlimGroupNorm(2, 8, widths=WIDTHS)),
    "SwitchableBatchNorm1d": ((2, 8), lambda: layers.SwitchableBatchNorm1d(8, widths=WIDTHS)),
    "SwitchableBatchNorm2d": ((2, 8, 5, 5), lambda: layers.SwitchableBatchNorm2d(8, widths=WIDTHS)),
    "SwitchableBatchNorm3d": ((2, 8, 2, 2, 2), lambda: layers.SwitchableBatchNorm3d(8, widths=WIDTHS)),
    "SwitchableProbe": ((2, 8), lambda: layers.SwitchableProbe(8, 4, WIDTHS)),
}


def narrow(layer: nn.Module) -> nn.Module:
    slimmable.set_width(layer, 0.5)
    return layer


for kind, (full_shape, made) in CHANNELS_OF.items():
    size = [*full_shape]
    size[-1 if len(size) == 2 else 1] //= 2
    INPUT = bad.tensor(lambda size=tuple(size): torch.rand(size), **{
        "full": bad.Of(lambda x: torch.cat([x, x], -1 if x.ndim == 2 else 1)), "scalar": torch.tensor(1.0),
    }).but(empty="nothing comes out", an_axis_more="of any shape", an_axis_less="without a batch",
           a_row_less="a batch like another")  # fmt: skip
    if "Conv" in kind:
        INPUT = INPUT.but(meta="torch's convolutions return a tensor without numbers")
    CALLS[f"layers.{kind}.forward"] = Call({"input": INPUT}, of=lambda made=made: narrow(made().eval()))


def lightning_callback(recipe: Any) -> Any:
    return importlib.import_module("slimmable.integrations.lightning").SlimCallback(recipe)


def solo_recipe(method: Any, widths: Any, example_inputs: Any) -> Any:
    solo = importlib.import_module("slimmable.integrations.solo")
    return solo.slim_recipe(method, widths, example_inputs=example_inputs)


def timm_task(recipe: Any) -> Any:
    return importlib.import_module("slimmable.integrations.timm").SlimTask(converted(), recipe=recipe, verbose=False)


def trainer(recipe: Any, eval_widths: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(output_dir=new_folder(), report_to=[], use_cpu=True)
    of_model = importlib.import_module("slimmable.integrations.transformers").SlimTrainer
    return of_model(model=converted(), args=arguments, recipe=recipe, eval_widths=eval_widths)


RECIPE = Argument(recipe, {**bad.WRONG, **bad.NUMBERS, "model": nn.Linear(4, 2)})
if importlib.util.find_spec("lightning"):
    CALLS["integrations.lightning.SlimCallback"] = Call({"recipe": RECIPE}, run=lightning_callback)
CALLS["integrations.solo.slim_recipe"] = Call(
    {"method": ANY_MODEL, "widths": WIDTHS_OF, "example_inputs": EXAMPLE}, run=solo_recipe
)
if importlib.util.find_spec("timm"):
    CALLS["integrations.timm.SlimTask"] = Call({"recipe": RECIPE}, run=timm_task)
if importlib.util.find_spec("transformers"):
    CALLS["integrations.transformers.SlimTrainer"] = Call(
        {"recipe": RECIPE, "eval_widths": bad.listed(WIDTH, 1).but(list="none", dict="none")}, run=trainer
    )


# -- what a table without gaps has
EXEMPT = {
    "Inputs": "it holds any arguments",
    "deploy.Programs.__call__": "its arguments are those of the program, which torch checks",
    "SlimmableError": "an error",
    "*.Accuracies": "data, which the library makes",
    "deploy.LatencyTable": "data, which the library makes",
    "methods.Batch": "data, which `step` checks",
    "runtime.Answer*": "data, which the library makes",
    "methods.Outcome": "data, which `step` checks",
    "gating.GatePlan": "data, which the library makes",
    "gating.GatedPass": "`gated` makes it",
    "gating.LayerGates*": "`gate` makes it, and calls it",
    "gating.PassNorm*": "`gate` makes it, and calls it",
    "methods.*.prepare": "`step` calls it with what it has checked",
    "methods.*.embed": "`step` calls it with what it has checked",
    "methods.*.predict": "`step` calls it with what it has checked",
    "methods.*.finish": "`step` calls it with what it has checked",
    "methods.*.forward": "`step` calls it with what it has checked",
    "rules.Operation*": "a rule that says something wrong gets a RuleError, see tests/rules",
    **{f"layers.Switchable*.{name}": "torch or the library calls it, with an index, a name or a tensor of its own"
       for name in ("add_module", "register_parameter", "named_modules", "state_dict", "linked", "own_at",
                    "inherit", "module_at", "forward")},
}  # fmt: skip
"""Patterns of names that need no rows -> why."""


def public() -> Iterator[tuple[str, Any]]:
    """Yield the name of each public callable, class, and method with arguments, and what it is."""
    rooms = ("layers", "losses", "training", "evaluation", "gating", "methods", "rules", "deploy", "runtime")
    names = {f"{room}.{name}": getattr(getattr(slimmable, room), name) for room in rooms
             for name in getattr(slimmable, room).__all__}  # fmt: skip
    in_rooms = {id(target) for target in names.values()}
    names |= {
        name: getattr(slimmable, name) for name in slimmable.__all__ if id(getattr(slimmable, name)) not in in_rooms
    }
    for name, target in names.items():
        yield name, target
        if inspect.isclass(target):
            yield from ((f"{name}.{method}", getattr(target, method)) for method in methods_of(target))


def methods_of(kind: type) -> list[str]:
    """Names of the public methods with arguments that the class itself, or a private base of the library, defines."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("slimmable")]
    names = dict.fromkeys(name for base in own for name, value in vars(base).items()
                          if inspect.isroutine(value) or isinstance(value, (staticmethod, classmethod)))  # fmt: skip
    return [name for name in names if name[0] != "_" and parameters(getattr(kind, name))]


def resolve(name: str) -> Any:
    """Return what has a dotted name, such as "gating.gate" or "SlimRecipe.loss"."""
    return functools.reduce(getattr, name.split("."), slimmable)


def parameters(target: Any) -> list[str]:
    """Names of the parameters, without `self`, `*args` and `**kwargs`."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(target)
    return [name for name, each in signature.parameters.items() if each.kind not in kinds and name != "self"]


# -- trying a row
def target_of(name: str) -> Callable[..., Any]:
    """Return what a row calls: the callable, the method of a new object, or the row's own function of it."""
    call = CALLS[name]
    own = [] if call.of is None else [call.of()]
    target = getattr(own[0], name.rpartition(".")[2]) if own and call.run is None else resolve(name)
    return functools.partial(call.run, *own) if call.run is not None else target


NOUNS = {each for name in CALLS for each in name.split(".")} | {
    "Module", "width", "widths", "counts", "group", "layers", "input", "inputs", "example_inputs", "labels", "mask",
    "skip", "gates", "batch", "loader", "file", "write", "operation", "checkpoint",
}  # fmt: skip
"""A message may name a public callable, which the one that was called has called, or what the argument is."""


def carried_out(target: Callable[..., Any], given: dict[str, Any]) -> None:
    result = target(**given)
    if isinstance(result, contextlib.AbstractContextManager):
        with result:
            pass
    elif isinstance(result, types.GeneratorType):
        next(result)
        result.close()


def state_of_all(given: Any) -> list[Any]:
    """Return all that a call must not change of the modules among what it is given."""
    modules = [each for each in given if isinstance(each, nn.Module)]
    return [
        (dict(module.state_dict()), [each.training for each in module.modules()],
         [state_of(each).active.width for each in module.modules() if state_of(each) is not None],
         [type(each) for each in module.modules()])
        for module in modules
    ]  # fmt: skip


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.is_meta or torch.equal(torch.nan_to_num(one), torch.nan_to_num(two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def shown(value: Any) -> set[str]:
    """Ways to say in a message what a value is."""
    said = {
        type(value).__name__,
        repr(value)[:20],
        str(value)[:20],
        repr(value[:1]) if isinstance(value, str) else "...",
    }
    said |= {"is missing"} if value is None else set()
    said |= {"return"} if callable(value) else set()
    said |= {"parameter", "network"} if isinstance(value, nn.Module) else set()
    if isinstance(value, type):
        said.add(value.__name__)
    if isinstance(value, Tensor):
        said |= {
            str(tuple(value.shape)),
            str(list(value.shape)),
            str(value.dtype),
            str(value.dtype).removeprefix("torch."),
            "meta",
            "nan",
        }
        said |= set() if value.is_meta or not value.numel() else {str(value.flatten()[0].item())}
    if isinstance(value, (list, tuple, dict, methods.Batch)):
        parts = [*value.values(), *value] if isinstance(value, dict) else value
        if isinstance(value, methods.Batch):
            parts = value.views if isinstance(value.views, list) else [value.views]
            said.add(f"got {len(parts)}")
        said |= {"empty", "nothing", "is missing", "expected", "there is no", "[]", f" {len(parts)} "}
        said |= {each for part in (parts if hasattr(parts, "__iter__") else [parts]) for each in shown(part)}
    return said


LATE = {"training.MoCo.keys"}  # the encoder moves before it runs, as its documentation says


def fault(name: str, parameter: str, label: str, value: Callable[[], Any]) -> str | None:
    """Call with one bad argument; return what is wrong with the answer, or None."""
    given = {each: argument.good() for each, argument in CALLS[name].arguments.items()}
    target = target_of(name)
    given[parameter] = made = value()
    owner = getattr(target, "__self__", None) or next(iter(getattr(target, "args", ())), None)
    watched = [*given.values(), owner]
    before = copy.deepcopy(state_of_all(watched))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            carried_out(target, given)
    except SlimmableError as error:
        text = str(error)
        if name not in LATE and not same(before, state_of_all(watched)):
            return "it changed something before it refused"
        if not {parameter, *name.split(".")[-2:], *NOUNS} & set(re.findall(r"\w+", text)):
            return f"the message names neither the argument nor the function: {text}"
        if not any(each in text for each in shown(made)):
            return f"the message does not show the value: {text}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_bad_arguments(name):
    carried_out(target_of(name), {each: argument.good() for each, argument in CALLS[name].arguments.items()})
    faults = {
        f"{parameter}: {label}": found
        for parameter, argument in CALLS[name].arguments.items()
        for label, value in argument.values().items()
        if (found := fault(name, parameter, label, value)) is not None
    }
    assert faults == {}


def test_every_public_callable_has_rows_for_each_parameter():
    rows: dict[Any, set[str]] = {}
    for name, call in CALLS.items():
        if not name.startswith("integrations."):
            target = resolve(name)
            rows.setdefault(getattr(target, "__func__", target), set()).update(call.arguments)
    missing = {}
    for name, target in public():
        if not any(fnmatch(name, pattern) for pattern in EXEMPT):
            known = rows.get(getattr(target, "__func__", target))
            without = ["no rows"] if known is None else [each for each in parameters(target) if each not in known]
            missing |= {name: without} if without else {}
    assert missing == {}


W = {"widths": WIDTHS}


@pytest.mark.parametrize(
    ("layer", "shape", "says"),
    [
        (lambda: layers.SlimConv2d(3, 8, 3, **W), (1, 3, 8, 8), "images are, pass slim_in=False to this layer"),
        (lambda: layers.SlimLinear(8, 4, **W), (2, 8), "pass slim_in=False to this layer"),
        (lambda: layers.SwitchableBatchNorm2d(8, **W), (2, 8, 4, 4), "pass slim=False to this norm"),
        (lambda: layers.SlimLayerNorm(8, **W), (2, 8), "use torch's own layer"),
        (lambda: layers.SlimGroupNorm(4, 8, **W), (2, 8, 3), "use torch's own layer"),
        (lambda: layers.SwitchableProbe(8, 4, WIDTHS), (2, 8), "use one nn.Linear for all widths"),
    ],
)
def test_a_full_input_at_a_narrow_width_says_what_to_do(layer, shape, says):
    made = layer()
    x = torch.rand(shape)
    made(x)
    slimmable.set_width(made, 0.5)
    with pytest.raises(InputError, match=rf"(?s)at width 0\.5 cannot read a tensor of shape .*{says}") as caught:
        made(x)
    assert isinstance(caught.value, RuntimeError)  # as torch's own would be


def test_memory_that_runs_out_in_a_layer_is_no_wrong_input():
    layer = layers.SlimLinear(8, 4, **W)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    layer.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        layer(torch.rand(2, 8))


CONV = functools.partial(layers.SlimConv2d, 3, 8, 3, slim_in=False, **W)
LINEAR = functools.partial(layers.SlimLinear, 4, 8, slim_in=False, **W)


@pytest.mark.parametrize(
    ("between", "kind"),
    [
        (lambda: [CONV(), nn.BatchNorm2d(8), nn.ReLU()], "BatchNorm2d"),
        (lambda: [CONV(), nn.ReLU(), nn.Conv2d(8, 8, 1)], "Conv2d"),
        (lambda: [CONV(), nn.GroupNorm(2, 8)], "GroupNorm"),
        (lambda: [LINEAR(), nn.ReLU(), nn.Linear(8, 8), layers.SlimLinear(8, 2, **W)], "Linear"),
        (lambda: [LINEAR(), nn.LayerNorm(8)], "LayerNorm"),
    ],
)
def test_a_plain_layer_behind_a_slim_one_is_refused(between, kind):
    model = nn.ModuleList([nn.Sequential(*between())])
    with pytest.raises(ConversionError, match=rf"layer '[12]', {kind}, is full at every width, but the Slim"):
        slimmable.set_width(model, 0.5)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (lambda: [nn.Conv2d(3, 3, 1), CONV(), layers.SwitchableBatchNorm2d(8, **W)], (2, 3, 6, 6)),
        (lambda: [CONV(slim_out=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)], (2, 3, 6, 6)),
        (lambda: [CONV(), nn.PReLU(), layers.SlimConv2d(8, 8, 1, **W)], (2, 3, 6, 6)),
        (lambda: [layers.SlimConv2d(3, 4, 3, slim_in=False, **W), nn.Linear(4, 5)], (2, 3, 6, 6)),
        (lambda: [layers.SlimLinear(4, 8, slim_in=False, widths=(1.0,)), nn.Linear(8, 8)], (2, 4)),
    ],
)
def test_a_plain_layer_that_runs_at_every_width_may_stand_anywhere(rows, shape):
    model = nn.Sequential(*rows())
    assert len(slimmable.run_widths(model, torch.rand(shape))) == len(slimmable.widths_of(model))


def main() -> None:
    def stop(*_: object) -> None:
        raise TimeoutError("it does not end")

    signal.signal(signal.SIGALRM, stop)
    tried = answered = 0
    for name in [name for name in CALLS if re.match(sys.argv[1] if sys.argv[1:] else "", name)]:
        call = CALLS[name]
        for parameter, argument in call.arguments.items():
            for label, value in argument.values().items():
                signal.alarm(20)
                try:
                    found = fault(name, parameter, label, value)
                except Exception as error:
                    found = f"the row itself fails: {type(error).__name__}: {error}"
                signal.alarm(0)
                tried += 1
                answered += found is None
                if found is not None:
                    print(f"{name}({parameter}: {label}): {' '.join(found.split())[:150]}", flush=True)
    print(f"tried {tried}, answered {answered}")


if __name__ == "__main__":
    main()
