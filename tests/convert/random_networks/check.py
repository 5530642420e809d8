"""What must hold for every random network, however it is converted."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import slimmable
from slimmable._inputs import output_tensors
from slimmable.analysis.fake import FakeModel
from slimmable.analysis.make import best_trace
from slimmable.analysis.plan import Plan
from tests.convert import oracles
from tests.convert.random_networks.draw import Conversion
from tests.convert.random_networks.network import Layout, Network, made_inputs
from tests.convert.random_networks.parts import forget_everything

EXACT, CLOSE = 1e-10, 1e-6  # differences, relative to the largest number; units in another order are summed in another
HIDDEN = {"conv", "linear", "functional conv", "functional linear", "mlp", "conv, norm, relu"}
ZEROS_MATTER = {"weight norm", "sizes in Python", "latents"}  # directions of length zero, factors that depend on a size


class Found(NamedTuple):
    """What a network was good for: whether it has a plain layer inside, and whether anything got thinner."""

    hidden: bool
    thinner: bool


def check(layout: Layout, conversion: Conversion) -> Found:
    """Assert every oracle on the network of a layout."""
    model = oracles.randomise(Network(layout))
    given = made_inputs(model.layout.inputs)
    arguments: dict[str, Any] = {
        "widths": (1.0, *(percent / 100 for percent in conversion.percents)),
        "example_inputs": tuple(x.clone() for x in given),
        "round_to": conversion.round_to,
        "universal": conversion.universal,
    }

    def run(network: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return output_tensors(network(*(x.clone() for x in given)))

    forget_everything(model)
    expected = run(model)
    after = slimmable.plan(model, **arguments)
    forget_everything(model)
    plan = slimmable.plan(model, **arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing in this Network gets narrower")
        slim = slimmable.slimify(model, **arguments)

    for network in (model, slim):  # the plain one is as it was
        found = run(network)
        assert all(type(tensor) is Tensor for tensor in found)
        assert all(map(torch.equal, found, expected)), "not the same at full width"
    outputs = oracles.outputs_of(slim, run)
    assert oracles.extracted_difference(slim, run, outputs) <= EXACT, "a width is not its extraction"
    for order in ("random", "magnitude"):
        assert oracles.permuted_difference(model, plan, run, expected, order) <= CLOSE, f"{order} units"
    for shapes in plan.output_shapes:
        for full, narrow, kept in zip(plan.output_shapes[0], shapes, model.kept, strict=True):
            axis = 1 if len(full) in (2, 4) else -1
            assert not kept or full[axis] == narrow[axis], "scores, an image or an embedding got thinner"
    for group in plan.groups if not plan.channels.needed.constraints else ():  # which may need other counts
        assert min(group.kept) >= min(conversion.round_to, group.units)
    if plan.groups and not model.operations & ZEROS_MATTER and not _units_meet(model, plan, given):
        _zeroed_units_are_gone(model, plan, run, outputs)
    if plan.groups:
        _at_other_settings(slim, plan, run, conversion)
        _from_a_file(model, slim, run, outputs)
    assert plan.to_dict() == after.to_dict(), "the plan depends on what ran before"
    hidden = any(step.operation in HIDDEN for step in model.layout.steps)
    return Found(hidden, bool(plan.groups))


def _units_meet(model: nn.Module, plan: Plan, given: tuple[Tensor, ...]) -> bool:
    """Tell whether units that get dropped are mixed with others without weights, as by a normalization over them."""
    fake = FakeModel(model, (given, {}))
    solution = best_trace(fake, plan, lambda path, module: False)
    return any(solution.grouping.groups_in([ids]) for _, ids in solution.trace.meetings)


def _zeroed_units_are_gone(model: nn.Module, plan: Plan, run: oracles.Run, outputs: dict[float, list[Tensor]]) -> None:
    """What a narrow width computes from its units, the full network computes when the others are zero."""
    full = [i for i, shape in enumerate(plan.output_shapes[0]) if all(each[i] == shape for each in plan.output_shapes)]

    def comparable(network: nn.Module) -> list[Tensor]:
        found = run(network)
        return [found[i] for i in full]

    if full:
        same = {width: [found[i] for i in full] for width, found in outputs.items()}
        assert oracles.zeroed_difference(model, plan, comparable, same, plan.widths) <= CLOSE, "zeroed units"


def _at_other_settings(slim: nn.Module, plan: Plan, run: oracles.Run, conversion: Conversion) -> None:
    makers = sorted({path for group in plan.groups for path in group.makers})
    settings: list[Any] = [{makers[conversion.setting[0] % len(makers)]: conversion.setting[1] / 100}]
    if conversion.universal:
        settings.append((1 + plan.widths[-1]) / 2)
    for setting in settings:
        small = slimmable.extract(slim, setting)
        with slimmable.at_width(slim, setting):
            assert oracles.largest_difference(run(small), run(slim)) <= EXACT, f"{setting} is not its extraction"


def _from_a_file(model: nn.Module, slim: nn.Module, run: oracles.Run, outputs: dict[float, list[Tensor]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        slimmable.save(slim, f"{folder}/model.safetensors")
        loaded = slimmable.load(f"{folder}/model.safetensors", oracles.fresh_copy(model))
    for width, found in oracles.outputs_of(loaded, run).items():
        assert oracles.largest_difference(found, outputs[width]) <= EXACT, "another model comes from the file"
