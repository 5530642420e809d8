"""What is measured of one model: every oracle of `tests/convert/oracles.py`, its outputs' sizes, and its cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import slimmable
from benchmarks.other_models.entry import FULL, SLIM, Entry
from benchmarks.timm_zoo import fake
from slimmable._inputs import example_of
from slimmable.analysis.plan import Plan
from tests.convert import oracles

WIDTHS = fake.WIDTHS


def measure(entry: Entry) -> dict[str, Any]:
    """Make and convert a model, and return what there is to know of it."""
    start = time.process_time()
    result = (in_numbers if entry.numbers else in_shapes)(entry)
    return result | {"seconds": round(time.process_time() - start, 1)}


def in_numbers(entry: Entry) -> dict[str, Any]:
    with double_precision():
        torch.manual_seed(0)
        model = oracles.randomise(entry.make().double().eval())
        example = entry.example()
        run = runner(model, example)
        expected = run(model)
        slim = slimmable.slimify(model, WIDTHS, example_inputs=example, **entry.options)
        plan, outputs = slimmable.plan(slim, WIDTHS), oracles.outputs_of(slim, run)
        if not all(bool(tensor.isfinite().all()) for tensor in expected):
            raise ValueError("the outputs of the plain model are not finite")
        found: dict[str, float | None] = {
            "full": oracles.largest_difference(outputs[1.0], expected),
            "extract": oracles.extracted_difference(slim, run, {w: o for w, o in outputs.items() if w < 1}),
            "permute": oracles.permuted_difference(model, plan, run, expected),
            "magnitude": oracles.permuted_difference(model, plan, run, expected, "magnitude"),
        }
        if oracles.zeroing_applies(model, plan):
            found["zero"] = oracles.zeroed_difference(model, plan, run, outputs, (0.5, 0.25))
        return {name: f"{value:.1e}" for name, value in found.items()} | costs(entry, slim, example)


def in_shapes(entry: Entry) -> dict[str, Any]:
    model = entry.make().eval().to("meta")
    with torch.device("meta"):
        example = entry.example()
        slim = slimmable.slimify(model, WIDTHS, example_inputs=example, **entry.options)
    return costs(entry, slim, example)


def costs(entry: Entry, slim: nn.Module, example: Any) -> dict[str, Any]:
    """Return class, sizes of outputs and multiply-adds, and what keeps these up."""
    plan = slimmable.plan(slim, WIDTHS)
    full, half = plan.columns[0], plan.columns[WIDTHS.index(0.5)]
    ratio = half.macs / full.macs
    dear = ratio > fake.LIMIT
    return {
        "class": type(slim).__name__,
        "parameters": full.parameters,
        "macs": full.macs,
        "at_half": round(ratio, 4),
        "outputs": output_sizes(entry, plan),
        "pinned": fake.reasons(plan),
        "cause": fake.cause(*(fake.counted(slim, width, example) for width in (1.0, 0.5))) if dear else "",
    }


def output_sizes(entry: Entry, plan: Plan) -> list[dict[str, Any]]:
    """Return for each output its name, its sizes at full and at half width, and what was expected."""
    shapes = plan.output_shapes
    return [
        {"name": output.name, "full": full, "half": half, "expected": expectation(entry.outputs, output.name)}
        for output, full, half in zip(plan.channels.outputs, shapes[0], shapes[WIDTHS.index(0.5)], strict=True)
    ]


def as_expected(output: Mapping[str, Any]) -> bool:
    """Tell whether an output keeps its sizes, or halves some of them, as it should."""
    sizes = list(zip(output["full"], output["half"], strict=True))
    changed = [(wide, narrow) for wide, narrow in sizes if wide != narrow]
    if output["expected"] == FULL:
        return not changed
    return bool(changed) and all(0.4 * wide <= narrow <= 0.6 * wide for wide, narrow in changed)


def expectation(outputs: str | Mapping[str, str], name: str) -> str:
    expected = (
        outputs
        if isinstance(outputs, str)
        else next((value for pattern, value in outputs.items() if fnmatchcase(name, pattern)), "nothing")
    )
    if expected not in (FULL, SLIM):
        raise ValueError(f"the entry does not say what output {name!r} should be; it says {outputs}")
    return expected


def runner(model: nn.Module, example: Any) -> oracles.Run:
    """Return how the model is run: with the same random numbers each time, if it draws some."""
    args, kwargs = example_of(model, example)
    plain = oracles.run_on(*args, **kwargs)

    def run(network: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        return [tensor.double() for tensor in plain(network)]

    return run


class _Doubles(TorchFunctionMode):
    """Gives double precision to what asks for single."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def double_precision() -> Iterator[None]:
    """Make models, inputs and whatever a forward casts to single precision, double in the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)
