"""Argument checks, which name the public function or class `where` they are: models, numbers, tensors, labels."""

import inspect
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial, wraps
from numbers import Integral
from pathlib import Path
from traceback import walk_tb
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimmable._widths import ROUNDINGS, number_or_nan
from slimmable.errors import DataError, SlimmableError, UsageError

P = ParamSpec("P")
T = TypeVar("T")


def check_count(where: str, *, least: int = 1, **values: object) -> None:
    """Raise `UsageError` unless each of `values` is an integer of at least `least` that torch can hold."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < 2**63:
            raise UsageError(f"{where}: {name} must be a 64-bit integer of at least {least}, got {value!r:.80}")


def check_sizes(where: str, *, least: int = 1, **values: object) -> None:
    """Raise `UsageError` unless each value is such an integer, a list of one for each axis, or a name of padding."""
    for name, value in values.items():
        for part in value if isinstance(value, (tuple, list)) and value else (value,):
            if least or value not in ("same", "valid"):
                check_count(where, least=least, **{name: part})


def must_be(what: str, holds: Callable[[Any], bool]) -> Callable[..., None]:
    """Return a check, called as `check(where, name=value)`: it raises `UsageError` unless each value holds."""

    def check(where: str, **values: object) -> None:
        for name, value in values.items():
            if not holds(value):
                raise UsageError(f"{where}: {name} must be {what}, got {value!r:.80}")

    return check


def one_of(names: Sequence[str]) -> Callable[..., None]:
    """Return such a check for one of several words."""
    return must_be(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


check_number = must_be("a finite number", lambda value: math.isfinite(number_or_nan(value)))
check_fraction = must_be("a number in [0, 1]", lambda value: 0 <= number_or_nan(value) <= 1)
check_not_negative = must_be("a finite number of at least 0", lambda value: 0 <= number_or_nan(value) < math.inf)
check_positive = must_be("a positive number", lambda value: 0 < number_or_nan(value) < math.inf)
check_share = must_be("in (0, 1)", lambda value: 0 < number_or_nan(value) < 1)
check_flags = must_be("True or False", lambda value: isinstance(value, (bool, np.bool_)))
check_function = must_be("a function", lambda value: callable(value) and not isinstance(value, type))
check_path = must_be("a path", lambda value: isinstance(value, (str, os.PathLike)) and "\0" not in os.fspath(value))
check_rounding = one_of(ROUNDINGS)


def check_is_module(where: str, model: object) -> None:
    """Raise `UsageError` unless `model` is a module; this takes no time, so it may run in each step."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}; pass an instance of it" if isinstance(model, type) else repr(model)[:60]
        raise UsageError(f"{where} needs a torch.nn.Module, got {kind}")


def check_module(where: str, model: nn.Module) -> None:
    """Raise `UsageError` unless `model` is a module, not TorchScript, whose lazy layers all have sizes."""
    check_is_module(where, model)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(f"{where}: {path or 'the model'!r} is TorchScript; pass the model from before scripting")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UsageError(f"{where}: {name} has no size yet; run the model once first")


def has_shards(parameters: Iterable[nn.Parameter]) -> bool:
    """Tell whether `fully_shard` has split some of these parameters over processes."""
    return any(hasattr(parameter, "placements") for parameter in parameters)


def check_whole(where: str, model: nn.Module) -> None:
    """Raise `UsageError` unless `model` is a module as for `check_module`, not split over processes."""
    check_module(where, model)
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if has_shards(model.parameters()) or kinds & {"FSDPModule", "FullyShardedDataParallel"}:
        raise UsageError(f"{where}: this {type(model).__name__} is split over processes; do this before fully_shard")


_KNOWN = ("<", *(str(Path(module.__file__ or "").parent) for module in (os, np, torch, sys.modules["slimmable"])))

_NAMES: dict[Callable[..., None], str] = {
    check_sizes: "dilation kernel_size milestones normalized_shape stride",
    check_count: "batch_size bn_splits bottleneck_dim channels every groups hidden_dim in_channels in_features k "
    "layers num_channels num_classes num_features num_groups out_channels out_features proj_dim queue_size round_to "
    "steps units",
    partial(check_count, least=0): "epochs local_crops random_widths repeats",
    partial(check_count, least=-(2**63)): "offset seed",
    check_fraction: "center_momentum distill_weight fraction freeze label_smoothing momentum p slow_start warm_up",
    check_positive: "scale student_temperature teacher_temperature temperature",
    check_not_negative: "alpha beta bound_weight budget_weight covariance eps first_epoch invariance learning_rate "
    "redundancy ridge variance weight_decay",
    check_number: "end epoch start",
    check_function: "backward closure evaluate function",
    check_path: "folder path repo_or_folder",
    must_be("a text", lambda value: isinstance(value, str)): "prefix",
    must_be("a text that is not empty", lambda it: isinstance(it, str) and it != ""): "license repo_id revision token",
    partial(check_sizes, least=0): "padding",
    check_rounding: "rounding",
    check_share: "budget",
    must_be("in (0, 1]", lambda value: 0 < number_or_nan(value) <= 1): "keep",
    must_be("a finite number of at least 1e-9", lambda value: 1e-9 <= number_or_nan(value) < math.inf): "penalty",
    lambda where, **given: check_module(where, *given.values()): "backbone encoder full model",
    lambda where, **given: check_is_module(where, *given.values()): "network",
}
BY_NAME = {name: check for check, names in _NAMES.items() for name in names.split()}
"""The parameters whose names mean the same in all public functions, and what their values must be."""


def _choice(kind: Any) -> Callable[..., None] | None:
    """Return the check for an annotation that allows some texts, or lists of them; None for any other annotation."""
    each = get_args(kind)[0] if get_origin(kind) is Sequence else kind
    if get_origin(each) is not Literal:
        return None
    known = get_args(each)
    if each is kind:
        return one_of(known)
    what = f"a list of {', '.join(known)}"
    return must_be(what, lambda it: isinstance(it, Collection) and bool(it) and all(name in known for name in it))


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check flags, choices, and what `BY_NAME` knows, before the function runs; None only where it may be None.

    What torch or Python then say of the others becomes a `UsageError` that shows the call, unless memory ran out.
    Errors of the caller's own code, such as a closure or a loader, stay what they are.
    """
    signature = inspect.signature(function)
    given_as = signature.parameters.items()
    checks = {name: check for name, check in BY_NAME.items() if name in signature.parameters}
    checks |= {name: check_flags for name, each in given_as if each.annotation in (bool, "bool", bool | None)}
    checks |= {name: check for name, each in given_as if (check := _choice(each.annotation))}
    optional = {name for name, each in given_as if each.default is None or type(None) in get_args(each.annotation)}

    @wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # which says what is missing or unknown
        where = type(args[0]).__name__ if function.__name__ == "__init__" else function.__qualname__
        where = f"{given['cls'].__name__}.{function.__name__}" if "cls" in given else where
        for name in filter(given.__contains__, checks):  # in the order of the checks
            if not (given[name] is None and name in optional):
                checks[name](where, **{name: given[name]})
        try:
            return function(*args, **kwargs)
        except (SlimmableError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, LookupError) as error:
            if isinstance(error, RuntimeError) and dist.is_available() and dist.is_initialized():
                raise  # it may be about another process
            if any(not frame.f_code.co_filename.startswith(_KNOWN) for frame, _ in walk_tb(error.__traceback__)):
                raise
            listed = ", ".join(f"{name}={shown(value)}" for name, value in given.items() if name not in ("self", "cls"))
            raise UsageError(f"{where}({listed}) fails: {error}") from error

    return checking


def shown(value: object) -> str:
    """Return what a message says of a value: the type and shape of a tensor, the beginning of anything else."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    return f"{value!r:.80}"


def check_tensors(where: str, **tensors: object) -> None:
    """Raise `DataError` unless all of `tensors` are tensors, with numbers in them."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DataError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_meta:
            raise DataError(f"{where}: {name} is on the meta device, where tensors have no numbers")


def check_floats(where: str, numel: int | None = None, /, **tensors: object) -> None:
    """Raise `DataError` unless each of `tensors` holds floats: `numel` of them or, by default, at least one."""
    for name, tensor in tensors.items():
        size = tensor.numel() if isinstance(tensor, Tensor) and tensor.is_floating_point() else 0
        if not size or numel not in (None, size):
            what = "a scalar tensor" if numel == 1 else "a tensor"
            raise DataError(f"{where}: {name} must be {what} of floats that is not empty, got {shown(tensor)}")


def check_matrices(where: str, **tensors: Tensor) -> None:
    """Raise `DataError` unless all are floating-point matrices that are not empty."""
    check_tensors(where, **tensors)
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or 0 in tensor.shape or not tensor.is_floating_point():
            what = "a tensor of floats of shape (batch, features), with at least one of each"
            raise DataError(f"{where}: {name} must be {what}, got {shown(tensor)}; flatten any further axes first")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise DataError(f"{where}: the tensors are on several devices: {found}; move them to one")


def check_same_shape(where: str, **tensors: Tensor) -> None:
    """Raise `DataError` unless all are floating-point matrices of the same shape."""
    check_matrices(where, **tensors)
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise DataError(f'{where}: shapes differ: {shapes}; slimify(..., outputs="full") keeps sizes at all widths')


def check_labelled(where: str, images: Tensor, labels: Tensor) -> None:
    """Raise `DataError` unless there is at least one image (or row of features), and one class number for each."""
    check_tensors(where, images=images, labels=labels)
    if not images.ndim or not len(images) or labels.shape != (len(images),):
        found = f"shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}"
        raise DataError(f"{where} has {found}; expected one label for each of at least one image")
    if not are_class_numbers(labels):
        raise DataError(f"{where}: labels are {labels.dtype}, expected class numbers; pass labels.long()")


def are_class_numbers(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def check_classes(where: str, labels: Tensor, num_classes: int | None) -> int:
    """Return the number of classes: `num_classes`, which all labels must be below, or one more than the largest."""
    least, most = torch.stack(labels.aminmax()).tolist()
    classes = most + 1 if num_classes is None else num_classes
    if least < 0 or most >= classes:
        given = "" if num_classes is None else f", as num_classes is {num_classes}"
        raise DataError(f"{where}: labels from {least} to {most} are not class numbers from 0 to {classes - 1}{given}")
    return classes


def check_features(where: str, features: Tensor, labels: Tensor, num_classes: int | None = None) -> int:
    """Return the number of classes, like `check_classes`; the features must be a finite matrix, one row per label."""
    check_labelled(where, features, labels)
    if features.ndim != 2 or not features.shape[1]:
        raise DataError(f"{where} has shape {tuple(features.shape)}, expected at least one feature of each image")
    if features.is_complex():
        raise DataError(f"{where} are {features.dtype}, expected real numbers")
    if broken := int((~features.isfinite()).any(1).sum()):
        raise DataError(f"{where}: {broken} of {len(features)} rows hold nan or infinity, which have no accuracy")
    return check_classes(where, labels, num_classes)
