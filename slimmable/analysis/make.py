"""Making a plan: trace, solve, try second choices where the first look bad, check that every width runs."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
from torch import nn

from slimmable._inputs import Arguments, output_tensors
from slimmable._modules import is_under, size_axes, swapped
from slimmable._reach import sweep
from slimmable._widths import kept_of
from slimmable.analysis.fake import FakeModel, recorded_outputs
from slimmable.analysis.integers import Constraint
from slimmable.analysis.labels import Ids, Labels
from slimmable.analysis.plan import Channels, Counts, Failure, Grouping, Output, Pin, Plan, Requirements, SubNetwork
from slimmable.analysis.trace import Context, Outputs, Skip, trace
from slimmable.errors import ConversionError, TraceError

_TRIED = 10**8  # parameters of the largest model that runs, with numbers, to see whether an advice works


def make_plan(
    model: nn.Module, example: Arguments, rules: Plan, skip: Skip, outputs: Outputs, advise: bool = True
) -> Plan:
    """Return the plan of `model`, which has no views, by the rules of an empty one; `advise`: errors tell of skips."""
    pinned, replayed = dict[str, str](), dict[str, list[Any]]()

    def stays(path: str, module: nn.Module) -> bool | str:
        return next((why for outer, why in pinned.items() if is_under(path, outer)), "") or skip(path, module)

    while True:
        fake = FakeModel(model, example, replayed)
        try:
            plan = filled_plan(fake, best_trace(fake, rules, stays, outputs), rules)
            failed = first_failure(fake, plan)
        except TraceError as error:
            outer = [(name, each) for name, each in model.named_modules() if name and is_under(error.module, name)]
            above = next((name for name, module in outer if skip(name, module)), None)  # the outermost skipped one
            if above is None or above in replayed:
                if advise:
                    tried = partial(make_plan, model, example, rules, outputs=outputs, advise=False)
                    error.args = (f"{error} {_advice(model, error.module, skip, tried)}",)
                raise
            try:
                replayed = recorded_outputs(model, example, [*replayed, above])
            except Exception as cause:
                raise TraceError(f"{error}\nNor does the model run on the real example: {cause}") from cause
            continue
        if failed is None:
            made = fake.made
            del fake  # and with it, all that may hold tensors of the runs
            sweep(made)
            return plan
        path, reason = failed
        while path in pinned or not any(is_under(owner, path) for owner, _ in plan.channels.tensors):
            if not path:
                hint = "a size that does not follow may be the cause: int(c / 4) does not, c // 4 does"
                raise TraceError(f"the narrow network fails in module {failed[0]!r}: {reason}; {hint}") from reason
            path = path.rpartition(".")[0]  # the failure comes from the modules inside
        line = str(reason).partition("\n")[0]
        pinned[path] = f"fails when narrow ({line[:100]})"


def _advice(model: nn.Module, path: str, skip: Skip, tried: Callable[[Skip], Plan]) -> str:
    """Tell what skipping a module that cannot be traced does, which is tried unless the model is large."""
    if not path:
        return "You can also move what fails into a module of its own and skip that."
    if sum(parameter.numel() for parameter in model.parameters()) <= _TRIED:
        try:
            plan = tried(lambda name, module: is_under(name, path) or skip(name, module))
        except Exception as error:
            return f"Skipping only that module does not help: {str(error).partition(chr(10))[0]}"
        if not plan.channels.units:
            return f"To skip {path!r} would leave nothing that gets narrower."
    return f"You can also keep that module, and what it reads, at full width with skip={path!r}."


def best_trace(fake: FakeModel, rules: Plan, skip: Skip, outputs: Outputs = "auto") -> "Solution":
    """Trace, and again with second choices of the axes that carry labels if first ones look bad; return the better."""
    solution = solve(_settled_trace(fake, rules.widths, skip, outputs), rules)
    labels = solution.trace.labels
    disagreed = labels.roots(*solution.disagreed)

    def doubtful(ids: Ids) -> bool:
        roots = labels.roots(ids)
        return bool(labels.pinned(ids).all() or disagreed & roots or 2 * len(roots) <= len(ids))

    stuck = {at: len(ids) for at, (ids, options) in enumerate(solution.trace.splits) if options > 1 and doubtful(ids)}
    alike = [at for at in stuck if stuck[at] == next(iter(stuck.values()))]  # all heads of queries, not those of keys
    tries = sorted({tuple(stuck), tuple(alike)} - {()})
    seconds = [solve(trace(fake, rules.widths, skip, dict.fromkeys(each, 1), outputs), rules) for each in tries]
    return min([solution, *seconds], key=Solution.parameters)


def _settled_trace(fake: FakeModel, widths: tuple[float, ...], skip: Skip, outputs: Outputs) -> Context:
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


# -- groups, and how many units each keeps
@dataclass
class Solution:
    """The groups that a trace has found and, for each width, the units kept of each group."""

    trace: Context
    grouping: Grouping
    roots: list[Ids]  # of each group
    units: Ids  # of each id, its number among the units of all groups
    counts: list[Counts]
    disagreed: list[Ids] = field(default_factory=list)  # axes that had to be coupled or pinned

    def parameters(self) -> int:
        """Return how many elements of parameters and buffers the narrowest width keeps."""
        labelled = ([ids for ids in axes if ids is not None] for axes in self.trace.tensors.values())
        return sum(math.prod(self.grouping.count(self.counts[-1], ids) for ids in axes) for axes in labelled)


def solve(trace: Context, rules: Plan) -> Solution:
    """Find groups and counts for which every constraint holds at every width, by the rules of an empty plan.

    Where adjusting counts does not help, axes are coupled or pinned, whichever keeps fewer parameters.
    """
    coupled, disagreed = set[int](), list[Ids]()
    while True:
        solution = _count(trace, rules)
        needed = Requirements(solution.grouping, trace.constraints, trace.attributes)
        failures: list[Failure] = []
        for width, counts in enumerate(solution.counts):
            failures += (needed.adjust(counts) if width else needed.fit(counts))[1]
        if not failures:
            return replace(solution, disagreed=disagreed)
        disagreed += [ids for failure in failures for ids in failure.axes()]
        failure, mended = failures[0], []
        for mend in (_couple, _pin) if id(failure.constraint) not in coupled else (_pin,):
            tried = replace(trace, labels=copy.deepcopy(trace.labels))
            if mend(tried.labels, failure):
                mended.append(tried)
        coupled.add(id(failure.constraint))
        if mended:
            trace = min(mended, key=lambda each: _count(each, rules).parameters())
        else:  # nothing in it can shrink: it does not depend on the width
            trace = replace(trace, constraints=[c for c in trace.constraints if c is not failure.constraint])


def _count(trace: Context, rules: Plan) -> Solution:
    """Return the groups and the units that they keep, ignoring constraints."""
    labels, groups = trace.labels, trace.labels.groups()
    of_units = Grouping.of(tuple(map(len, groups)))
    units = np.full(len(labels), sum(of_units.units))
    units[np.concatenate([units[:0], *groups])] = np.arange(sum(of_units.units))
    units = units[labels.find(np.arange(len(labels)))]
    grouping = Grouping(of_units.units, of_units.group_of[units], of_units.rank[units])
    counts = [np.array([*(rules.kept(n, width) for n in grouping.units), 1]) for width in rules.widths]
    return Solution(trace, grouping, groups, units, counts)


def _couple(labels: Labels, failure: Failure) -> bool:
    """Make axes of a constraint shrink alike: `a == b` unit by unit, `a // k == b` block by block; True if changed."""
    before = len(labels.roots(*failure.axes()))
    for first, second in permutations(failure.axes(), 2):
        if len(first) % len(second) == 0:
            labels.merge(first, np.tile(second, len(first) // len(second)))
    return len(labels.roots(*failure.axes())) < before


def _pin(labels: Labels, failure: Failure) -> bool:
    """Pin the axes of a constraint and of those that it disagrees with; True if changed."""
    before = len(labels.reasons)
    for ids in failure.axes():
        labels.pin(ids, f"{failure.constraint.where}: no value of {failure.constraint.expression} fits every width")
    return len(labels.reasons) > before


# -- the plan
def filled_plan(fake: FakeModel, solution: Solution, rules: Plan) -> Plan:
    """Return the plan of what a trace and its solution have found, by the rules of an empty one."""
    plan, model, found, grouping = Plan(**rules.rules()), fake.model, solution.trace, solution.grouping
    labels, shared = found.labels, dict[bytes, Ids]()

    def units_of(ids: Ids) -> Ids:
        units = solution.units[ids]
        return shared.setdefault(units.tobytes(), units)  # equal axes are one array

    def units_on(axes: Sequence[Ids | None]) -> tuple[Ids | None, ...]:
        return tuple(None if ids is None else units_of(ids) for ids in axes)

    constraints = [
        Constraint(each.expression.mapped(units_of), each.required.mapped(units_of), each.where)
        for each in found.constraints
    ]
    used = dict.fromkeys(key for constraint in constraints for key in constraint.attributes())
    scales = [  # `head_dim ** -0.5` of modules that multiply queries and keys, which kernels derive from the size
        (path, name, units_of(ids))
        for path, ids in found.contractions
        for name, value in vars(model.get_submodule(path)).items()
        if type(value) is float and abs(value - len(ids) ** -0.5) < 1e-9 and grouping.groups_in([ids])
    ]
    # torch's encoders may skip padding by nested tensors, which need an even number of heads
    nested = "use_nested_tensor"
    encoders = [(path, nested) for path, module in model.named_modules() if vars(module).get(nested) is True]
    names = dict.fromkeys([*((path, name) for path, name, _ in (*used, *scales)), *encoders])
    makers: list[set[str]] = [set() for _ in solution.roots]
    for path, made in found.producers:
        for group in grouping.groups_in([made]):
            makers[group].add(path)
    plan.channels = Channels(
        Requirements(Grouping.of(grouping.units), constraints, {key: found.attributes[key] for key in used}),
        {key: units_on(axes) for key, axes in found.tensors.items()},
        {(path, name): model.get_submodule(path).__dict__[name] for path, name in names},
        scales,
        [replace(each, units=units_on(each.units), why=_why(each, labels, grouping)) for each in found.outputs],
        tuple(tuple(sorted(paths)) for paths in makers),
        tuple(bool(labels.ordered(roots).any()) for roots in solution.roots),
        [(macs, tuple(map(units_of, axes))) for macs, axes, _ in found.products],
        {name.rpartition(".")[::2]: tuple(tensor.shape) for name, tensor in model.named_parameters()},
    )
    plan.caches = fake.reach.caches
    plan.fill([counts[:-1].tolist() for counts in solution.counts])
    unmade = {key for key in plan.channels.sizes if not grouping.groups_in(found.tensors[key])}
    for (path, name), axes in found.tensors.items():
        for axis, ids in ((axis, ids) for axis, ids in enumerate(axes) if ids is not None):
            groups = grouping.groups_in([ids])
            sizes = {name for name, own in size_axes(model.get_submodule(path)).items() if own == axis}
            layers = name == "weight" and not sizes.isdisjoint(("out_features", "out_channels", "embedding_dim"))
            if groups and max(grouping.units[group] for group in groups) == 1 < len(ids):
                plan.pins.append(Pin((path, name, axis), len(ids), "all of its units go together"))
            elif not groups and (layers or labels.produced(ids).any()) and labels.pinned(ids).any():
                plan.pins.append(Pin((path, name, axis), len(ids), labels.reason(ids)))
            elif len(axes) > 1 and (path, name) in unmade and not labels.pinned(ids).any():
                why = "no product, convolution or lookup makes its units from features"
                plan.pins.append(Pin((path, name, axis), len(ids), why))
    return plan


def _why(output: Output, labels: Labels, grouping: Grouping) -> str:
    """Return why an output gets thinner or stays full."""
    if grouping.groups_in(output.units):
        return output.why
    made = [ids for ids in output.units if ids is not None and labels.produced(ids).any()]
    reasons = dict.fromkeys(labels.reason(ids) for ids in made)
    why = (reason.rpartition(": ")[2] if reason.startswith("output") else reason for reason in reasons)
    return ", ".join(why) or "no units that could get thinner reach it"


# -- trying a plan: the model must run at each width and return outputs of the planned shapes
def first_failure(fake: FakeModel, plan: Plan) -> tuple[str, Exception] | None:
    """Run every narrow width; return the path of the module that fails and its error, or None if all run."""
    narrow = list(zip(plan.widths, plan.columns, strict=True))[1:]
    with fake.on_meta():  # most models run there too, and faster
        while narrow and _failure(fake, *narrow[0]) is None:
            del narrow[0]
    return next(filter(None, (_failure(fake, *each) for each in narrow)), None)


def _failure(fake: FakeModel, width: float, column: SubNetwork) -> tuple[str, Exception] | None:
    with _shrunk(fake, column):
        try:
            out = fake.run()
        except Exception as error:
            return fake.running, error
    got, planned = [tuple(tensor.shape) for tensor in output_tensors(out)], column.output_shapes
    if got != planned:
        return "", ConversionError(f"the outputs at width {width} have shapes {got}, but {planned} were planned")
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
            narrow, is_parameter = tensor.new_empty(shape), isinstance(tensor, nn.Parameter)
            new.append((store, name, nn.Parameter(narrow, tensor.requires_grad) if is_parameter else narrow))
    for path, values in column.values.items():
        new += [(modules[path].__dict__, name, value) for name, value in values.items()]
    return swapped(new)
