"""What needs numbers: every oracle of `tests/convert/oracles.py`, on random weights in float64."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn

import slimmable
from benchmarks.timm_zoo.fake import WIDTHS, module_of
from slimmable.analysis import make
from tests.convert import oracles

SIZES = (64, 96, 128, 160, 192, 256)  # tried one by one, up to the model's own


def measure(name: str) -> dict[str, Any]:
    """Convert the model `name` with weights and return its line of the table: the largest relative differences."""
    start = time.process_time()
    with mock.patch.object(Tensor, "float", Tensor.double):  # some compute attention in single precision
        try:
            with mock.patch.object(make, "first_failure", return_value=None):  # every width runs below, with numbers
                result = differences(name)
        except RuntimeError:  # a width does not run unless something more stays full
            result = differences(name)
    return result | {"seconds": round(time.process_time() - start, 1)}


def differences(name: str) -> dict[str, Any]:
    model, example = smallest(name)
    run = oracles.run_on(example)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=example)
    plan, expected, outputs = slimmable.plan(slim, WIDTHS), run(model), oracles.outputs_of(slim, run)
    if not all(bool(tensor.isfinite().all()) for tensor in expected):
        raise ValueError("the outputs of the plain model are not finite")
    result: dict[str, Any] = {
        "module": module_of(name),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "input": "x".join(map(str, example.shape)),
        "full": oracles.largest_difference(outputs[1.0], expected),
        "extract": oracles.extracted_difference(slim, run, {w: o for w, o in outputs.items() if w < 1}),
        "permute": oracles.permuted_difference(model, plan, run, expected),
        "magnitude": oracles.permuted_difference(model, plan, run, expected, "magnitude"),
        "fused": oracles.attention_difference(slim, run, outputs),
    }
    if oracles.zeroing_applies(model, plan):
        result["zero"] = oracles.zeroed_difference(model, plan, run, outputs, (0.5, 0.25))
    return {key: f"{value:.1e}" if isinstance(value, float) else value for key, value in result.items()}


def smallest(name: str) -> tuple[nn.Module, Tensor]:
    """Return the model and the smallest images that it takes; one of a fixed size is made for smaller images."""
    channels, *native = timm.get_pretrained_cfg(name).input_size
    for size in [size for size in SIZES if size < max(native)]:
        for arguments in ({"img_size": size}, {}):
            try:
                with torch.device("meta"):
                    timm.create_model(name, **arguments)(torch.zeros(1, channels, size, size))
            except Exception:  # whatever a model says to a size that it was not made for
                continue
            return create(name, **arguments), images(channels, size, size)
    return create(name), images(channels, *native)


def create(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return oracles.randomise(timm.create_model(name, **arguments).double().eval())


def images(*size: int) -> Tensor:
    return torch.randn(2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
