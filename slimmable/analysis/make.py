"""Making a plan: trace, solve, try second choices where the first look bad, check that every width runs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from slimmable._modules import size_axes, swapped
from slimmable._nested import output_tensors
from slimmable._reach import sweep
from slimmable._widths import kept_of
from slimmable.analysis._solve import Solution, channels_of, solve
from slimmable.analysis.channels import SubNetwork
from slimmable.analysis.fake import FakeModel, recorded_outputs
from slimmable.analysis.labels import Ids
from slimmable.analysis.outputs import Outputs, is_inside
from slimmable.analysis.plan import Pin, Plan
from slimmable.analysis.trace import Skip, Trace, trace
from slimmable.errors import ConversionError, TraceError

_TRIED = 10**8  # parameters of the largest model that runs, with numbers, to see whether an advice works


def make_plan(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rules: Plan,
    skip: Skip,
    outputs: Outputs = "auto",
    advise: bool = True,
) -> Plan:
    """Return the plan of `model`, which has no views, by the rules of an empty one; `advise`: errors tell of skips."""
    pinned: dict[str, str] = {}
    replayed: dict[str, list[Any]] = {}

    def stays(path: str, module: nn.Module) -> bool | str:
        """Return why a module is pinned, or whether it is skipped."""
        return next((why for outer, why in pinned.items() if is_inside(path, outer)), "") or skip(path, module)

    while True:
        fake = FakeModel(model, args, kwargs, replayed)
        try:
            plan = Plan(**rules.rules())
            found = best_trace(fake, rules, stays, outputs)
            failed = first_failure(fake, filled_plan(fake, *found, plan))
        except TraceError as error:
            outer = [(name, each) for name, each in model.named_modules() if name and is_inside(error.module, name)]
            above = next((name for name, module in outer if skip(name, module)), None)  # the outermost skipped one
            if above is None or above in replayed:
                if advise:
                    tried = partial(make_plan, model, args, kwargs, rules, outputs=outputs, advise=False)
                    error.args = (f"{error} {_advice(model, error.module, skip, tried)}",)
                raise
            try:
                replayed = recorded_outputs(model, args, kwargs, [*replayed, above])
            except Exception as cause:
                raise TraceError(f"{error}\nNor does the model run on the real example: {cause}") from cause
            continue
        if failed is None:
            made = fake.made
            del fake, found  # and with them, all that may hold tensors of the runs
            sweep(made)
            return plan
        path, reason = failed
        while path in pinned or not any(is_inside(owner, path) for owner, _ in plan.channels.tensors):
            if not path:
                raise TraceError(f"the narrow network fails in module {failed[0]!r}: {reason}") from reason
            path = path.rpartition(".")[0]  # the failure comes from the modules inside
        line = str(reason).partition("\n")[0]
        pinned[path] = f"fails when narrow ({line[:100]})"


def _advice(model: nn.Module, path: str, skip: Skip, tried: Callable[[Skip], Plan]) -> str:
    """Tell what skipping a module that cannot be traced does, which is tried unless the model is large."""
    if not path:
        return "You can also move what fails into a module of its own and skip that."
    if sum(parameter.numel() for parameter in model.parameters()) <= _TRIED:
        try:
            plan = tried(lambda name, module: is_inside(name, path) or skip(name, module))
        except Exception as error:
            return f"Skipping only that module does not help: {str(error).partition(chr(10))[0]}"
        if not plan.channels.units:
            return f"To skip {path!r} would leave nothing that gets narrower."
    return f"You can also keep that module, and what it reads, at full width with skip={path!r}."


def best_trace(fake: FakeModel, rules: Plan, skip: Skip, outputs: Outputs = "auto") -> tuple[Trace, Solution]:
    """Trace, and again with second choices of the axes that carry labels if first ones look bad; return the better."""
    widths = rules.widths
    first = _settled_trace(fake, widths, skip, outputs)
    solution = solve(first, rules)
    labels = first.context.labels
    disagrees = labels.shared_with(*solution.disagreed)

    def doubtful(ids: Ids) -> bool:
        return bool(labels.pinned(ids).all() or disagrees(ids) or 2 * len(np.unique(labels.find(ids))) <= len(ids))

    stuck = [site for site, (ids, options) in enumerate(first.context.splits) if options > 1 and doubtful(ids)]
    if not stuck:
        return first, solution
    second = trace(fake, widths, skip, dict.fromkeys(stuck, 1), outputs)
    other = solve(second, rules)
    better = other.parameters(second) < solution.parameters(first)
    return (second, other) if better else (first, solution)


def _settled_trace(fake: FakeModel, widths: tuple[float, ...], skip: Skip, outputs: Outputs) -> Trace:
    """Trace without tensors that an earlier run may have left in caches, again if some of them were none."""
    fake.reach.hide_tensors()
    while True:
        try:
            found = trace(fake, widths, skip, {}, outputs)
        except TraceError as error:
            if not fake.reach.show_tensors(fake.model.get_submodule(error.module)):
                raise
        else:
            if not fake.reach.show_tensors():
                return found


def filled_plan(fake: FakeModel, found: Trace, solution: Solution, plan: Plan) -> Plan:
    """Fill an empty plan with what a trace and its solution have found, and return it."""
    plan.channels = channels_of(fake.model, found, solution)
    plan.caches = found.caches
    plan.fill([counts[:-1].tolist() for counts in solution.counts])
    labels, grouping = found.context.labels, solution.grouping
    for (path, name), axes in found.tensors.items():
        for axis, ids in enumerate(axes):
            if ids is None:
                continue
            groups = grouping.groups_in([ids])
            sizes = {name for name, own in size_axes(fake.model.get_submodule(path)).items() if own == axis}
            layers = name == "weight" and not sizes.isdisjoint(("out_features", "out_channels", "embedding_dim"))
            if groups and max(grouping.units[group] for group in groups) == 1 < len(ids):
                plan.pins.append(Pin((path, name, axis), len(ids), "all of its units go together"))
            elif not groups and (layers or labels.produced(ids).any()) and labels.pinned(ids).any():
                plan.pins.append(Pin((path, name, axis), len(ids), labels.reason(ids)))
    return plan


# -- trying a plan: the model must run at each width and return outputs of the planned shapes
def first_failure(fake: FakeModel, plan: Plan) -> tuple[str, Exception] | None:
    """Run every narrow width; return the path of the module that fails and its error, or None if all run."""
    narrow = list(zip(plan.widths, plan.columns, strict=True))[1:]
    with fake.on_meta():  # most models run there too, and faster
        while narrow and _failure(fake, *narrow[0]) is None:
            del narrow[0]
    for width, column in narrow:
        error = _failure(fake, width, column)
        if error is not None:
            return ("" if isinstance(error, ConversionError) else fake.running), error
    return None


def _failure(fake: FakeModel, width: float, column: SubNetwork) -> Exception | None:
    with _shrunk(fake, column):
        try:
            out = fake.run()
        except Exception as error:
            return error
    got, planned = [tuple(tensor.shape) for tensor in output_tensors(out)], column.output_shapes
    if got != planned:
        return ConversionError(f"the outputs at width {width} have shapes {got}, but {planned} were planned")
    return None


def _shrunk(fake: FakeModel, column: SubNetwork) -> AbstractContextManager[None]:
    """Give tensors and attributes the sizes of a sub-network while the block runs."""
    modules = dict(fake.model.named_modules(remove_duplicate=False))
    new: list[tuple[dict[str, Any], str, Any]] = []
    for (path, name), kept in column.tensors.items():
        stores = (modules[path]._parameters, modules[path]._buffers, modules[path].__dict__)
        store = next(found for found in stores if name in found)
        tensor = store[name]
        shape = [kept_of(size, keep) for size, keep in zip(tensor.shape, kept, strict=True)]
        if tensor.shape != tuple(shape):
            new.append((store, name, fake.weight(shape, tensor)))
    for path, values in column.values.items():
        new += [(modules[path].__dict__, name, value) for name, value in values.items()]
    return swapped(new)
