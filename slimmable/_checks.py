"""Argument checks: models, numbers in range, shapes of tensors, labels.

`where` is the public function or class that checks, for the message; its arguments are passed by name.
"""

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from slimmable.errors import DataError, UsageError


def number_or_nan(value: object) -> float:
    """Return `value` as a float, or NaN, which is in no range, if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    return float(value)


def check_count(where: str, *, least: int = 1, **values: object) -> None:
    """Raise `UsageError` unless each of `values` is an integer of at least `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise UsageError(f"{where}: {name} must be an integer of at least {least}, got {value!r}")


def check_fraction(where: str, **values: object) -> None:
    """Raise `UsageError` unless each of `values` is a number in [0, 1]."""
    for name, value in values.items():
        if not 0 <= number_or_nan(value) <= 1:
            raise UsageError(f"{where}: {name} must be a number in [0, 1], got {value!r}")


def check_not_negative(where: str, **values: object) -> None:
    """Raise `UsageError` unless each of `values` is a finite number of at least 0."""
    for name, value in values.items():
        if not 0 <= number_or_nan(value) < math.inf:
            raise UsageError(f"{where}: {name} must be a finite number of at least 0, got {value!r}")


def check_positive(where: str, **values: object) -> None:
    """Raise `UsageError` unless each of `values` is a positive, finite number."""
    for name, value in values.items():
        if not 0 < number_or_nan(value) < math.inf:
            raise UsageError(f"{where}: {name} must be a positive number, got {value!r}")


def check_module(where: str, model: object) -> None:
    """Raise `UsageError` unless `model` is a module, not TorchScript, whose lazy layers all have sizes."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}; pass an instance of it" if isinstance(model, type) else repr(model)[:60]
        raise UsageError(f"{where} needs a torch.nn.Module, got {kind}")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(f"{where}: {path or 'the model'!r} is TorchScript; pass the model from before scripting")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UsageError(f"{where}: {name} has no size yet; run the model once first")


def check_whole(where: str, model: nn.Module) -> None:
    """Raise `UsageError` unless `model` is a module as for `check_module`, not split over processes."""
    check_module(where, model)
    for module in model.modules():
        split = any(hasattr(parameter, "placements") for parameter in module._parameters.values())
        joined = "_fsdp_wrapped_module" in module._modules
        if split or joined or any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            raise UsageError(
                f"{where}: this {type(model).__name__} is split over processes; do this before fully_shard, or in a "
                "model that is not split, with the full state dict of this one (StateDictOptions(full_state_dict=True))"
            )


def check_tensors(where: str, **tensors: object) -> None:
    """Raise `DataError` unless all of `tensors` are tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DataError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")


def check_matrices(where: str, **tensors: Tensor) -> None:
    """Raise `DataError` unless all are floating-point matrices that are not empty."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DataError(f"{where}: {name} must be a tensor of shape (batch, features), got {type(tensor).__name__}")
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise DataError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, expected (batch, features) with at least one of "
                "each; flatten any further axes first"
            )
        if not tensor.is_floating_point():
            raise DataError(f"{where}: {name} is {tensor.dtype}, expected a floating-point tensor")


def check_same_shape(where: str, **tensors: Tensor) -> None:
    """Raise `DataError` unless all are floating-point matrices of the same shape."""
    check_matrices(where, **tensors)
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise DataError(
            f"{where}: shapes differ: {shapes}; row i of each must belong to the same image, and converted features "
            'keep their size at every width only with slimify(..., outputs="full")'
        )


def check_labelled(where: str, images: Tensor, labels: Tensor) -> None:
    """Raise `DataError` unless there is at least one image (or row of features), and one label for each."""
    check_tensors(where, images=images, labels=labels)
    if not images.ndim or not len(images) or labels.shape != (len(images),):
        raise DataError(
            f"{where} has shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}; expected one label "
            "for each of at least one image"
        )


def check_classes(where: str, labels: Tensor, num_classes: int | None) -> int:
    """Return the number of classes: `num_classes`, which all labels must be below, or one more than the largest."""
    check_tensors(where, labels=labels)
    if num_classes is not None:
        check_count(where, num_classes=num_classes)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{where}: labels are {labels.dtype}, expected class numbers; pass labels.long()")
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    classes = highest + 1 if num_classes is None else num_classes
    if lowest < 0 or highest >= classes:
        raise DataError(f"{where}: labels from {lowest} to {highest} are not class numbers from 0 to {classes - 1}")
    return classes


def check_features(where: str, features: Tensor, labels: Tensor, num_classes: int | None) -> int:
    """Return the number of classes, like `check_classes`; the features must be a real matrix, one row per label."""
    check_tensors(where, features=features, labels=labels)
    if features.is_complex():
        raise DataError(f"{where} are {features.dtype}, expected real numbers")
    if features.ndim != 2 or 0 in features.shape or labels.shape != features.shape[:1]:
        raise DataError(
            f"{where} have shape {tuple(features.shape)}, expected ({len(labels)}, features) for labels of shape "
            f"{tuple(labels.shape)}; there must be at least one of each"
        )
    return check_classes(where, labels, num_classes)
