"""What each width costs: parameters, multiply-adds, activations, latency; sub-networks within a budget of it."""

import math
import statistics
import timeit
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from slimmable._checks import check_flags, check_function, check_share, check_whole, checked, one_of, shown
from slimmable._convert import copy_of, shallow_modules
from slimmable._inputs import example_of, image_batch, is_size, output_tensors
from slimmable._modules import in_eval_mode
from slimmable._tables import csv_text, html_table
from slimmable._width import at_width, places_of, widths_of
from slimmable._widths import number_or_nan
from slimmable.analysis.fake import FakeModel, layers_in_parts
from slimmable.analysis.plan import Plan, SubNetwork
from slimmable.errors import ConversionError, UsageError, require
from slimmable.training.batchnorm import ModelInput, collect_statistics
from slimmable.view.norms import SwitchableContainer
from slimmable.view.state import is_slim

Cost = Literal["macs", "parameters", "latency"]


@dataclass(frozen=True)
class Row:
    """The costs of one width.

    Attributes:
        parameters: elements of all parameters that the width uses.
        macs: multiply-adds of all convolutions and matrix products of a forward, for the whole batch: half of torch's
            flop count. Attention counts as two full products, whatever its mask.
        activations: elements of the outputs of these operations; of attention, without the intermediate scores.
        latency_ms: median time of a forward in milliseconds, or None if not measured.
    """

    width: float
    parameters: int
    macs: int
    activations: int
    latency_ms: float | None


@dataclass(frozen=True)
class Profile:
    """A printable table with one `Row` per width."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return "\n".join("{:>6} {:>12} {:>16} {:>12} {:>11}".format(*line) for line in self._lines())

    def _repr_html_(self) -> str:
        return html_table(self._lines())

    def _lines(self) -> Iterator[tuple[str, ...]]:
        yield "width", "parameters", "MACs", "activations", "latency"
        for row in self.rows:
            latency = "-" if row.latency_ms is None else f"{row.latency_ms:.2f} ms"
            yield f"{row.width:g}", f"{row.parameters:,}", f"{row.macs:,}", f"{row.activations:,}", latency

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON data: {"rows": one dict per width, by field of `Row`}."""
        return {"rows": [asdict(row) for row in self.rows]}

    def plot(self) -> Any:
        """Return a matplotlib figure of each cost by width, as a share of the widest one's."""
        axes = require("matplotlib.figure", "matplotlib").Figure((5, 3), layout="constrained").subplots()
        for name in (each.name for each in fields(Row)[1:] if getattr(self.rows[0], each.name)):
            costs = {row.width: getattr(row, name) / getattr(self.rows[0], name) for row in self.rows}
            axes.plot([*costs], [*costs.values()], marker="o", label=name)
        axes.legend()
        axes.set(xlabel="width", ylabel="share of the full network")
        return axes.figure

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, with the fields of `Row` as its header."""
        Path(path).write_text(csv_text([field.name for field in fields(Row)], map(asdict, self.rows)))


@checked
def profile(
    model: nn.Module, input_size: tuple[int, ...] | None = None, *, example_inputs: Any = None, repeats: int = 5
) -> Profile:
    """Measure every width of a slimmable model, or a plain model at its only width.

    Args:
        model: on any device; its width, mode and statistics are left as they are.
        input_size: size of one input without the batch axis, such as (3, 224, 224); a batch of one is run.
        example_inputs: as for `slimify`, instead of `input_size`.
        repeats: timed forwards per width, after an untimed one; 0 measures no latency.

    Raises: ConversionError: if neither is given and the model names no input size. UsageError: if it fails on them.

    >>> first = slimmable.SlimLinear(8, 16, widths=(1.0, 0.5), slim_in=False)
    >>> print(profile(nn.Sequential(first, slimmable.SlimLinear(16, 4, widths=(1.0, 0.5))), (8,), repeats=0))
     width   parameters             MACs  activations     latency
         1          212              192           20           -
       0.5           90               80           10           -
    """
    check_whole("profile", model)
    if example_inputs is None and input_size is not None:
        if not is_size(input_size):
            size = f"a size such as (3, 224, 224), got {shown(input_size)}"
            raise UsageError(f"profile: input_size must be {size}; a batch goes into example_inputs=")
        example_inputs = image_batch(model, tuple(input_size), images=1)
    args, kwargs = example_of(model, example_inputs)
    if example_inputs is None:
        args = (args[0][:1],)
    slim = any(map(is_slim, model.modules()))
    devices = {weight.device for weight in model.parameters() if weight.device.type not in ("cpu", "meta")}
    wait = torch.accelerator.synchronize
    rows = []
    for width in tqdm(widths_of(model) if slim else (1.0,), "profile", leave=False, disable=None):  # on terminals
        with at_width(model, width) if slim else nullcontext():
            count, latency = _count(model, args, kwargs), None
            with in_eval_mode(model), torch.no_grad():
                if repeats:
                    _, *times = timeit.repeat(
                        lambda: (model(*args, **kwargs), *map(wait, devices)), number=1, repeat=repeats + 1
                    )
                    latency = 1000 * statistics.median(times)
            rows.append(Row(width, parameter_count(model), count.flops // 2, count.activations, latency))
    return Profile(tuple(rows))


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameter elements that `model` uses at its active width."""
    sizes: dict[int, int] = {}
    used = list(shallow_modules(model))
    for module in used:  # which grows
        if isinstance(module, SwitchableContainer):
            used += [] if getattr(module, "idle", False) else module.module_at(module._slim.index).modules()
            continue
        for name, full in module._parameters.items():
            if full is not None:
                sizes.setdefault(id(full), getattr(module, name).numel())
    return sum(sizes.values())


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # slow to import

        super().__init__()  # type: ignore[no-untyped-call]
        self.formulas, self.flops, self.activations = flop_registry, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := self.formulas.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
            self.activations += (out if isinstance(out, Tensor) else out[0]).numel()
        return out


@dataclass(eq=False)
class _Attention(TorchFunctionMode):
    """Counts attention as one operation, since the kernels that torch has formulas for vary by version."""

    counter: _Counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **kwargs)
        flops, activations = self.counter.flops, self.counter.activations  # without those of the kernel
        out = func(*args, **kwargs)
        keys, channels = (args[1] if len(args) > 1 else kwargs["key"]).shape[-2:]
        products = math.prod(out.shape[:-1]) * keys * (channels + out.shape[-1])  # with the keys, with the values
        self.counter.flops, self.counter.activations = flops + 2 * products, activations + out.numel()
        return out


def _count(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Counter:
    fake, counter = FakeModel(model, (args, kwargs)), _Counter()
    try:
        fake.run(counter, _Attention(counter))
    except (DataDependentOutputException, DynamicOutputShapeException):  # its path depends on values
        counter = _Counter()
        with torch.no_grad(), torch.random.fork_rng(devices=[]), layers_in_parts(), counter, _Attention(counter):
            copy_of(model).eval()(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in output_tensors((args, kwargs)))
        what = f"{type(model).__name__} does not run on inputs of shape {shapes}: it fails in module {fake.running!r}"
        raise UsageError(f"{what} ({error}); pass another input_size or example_inputs") from error
    return counter


# -- greedy search, with a width of its own for each channel group
@dataclass(frozen=True)
class Found:
    """A sub-network that a search has found.

    Attributes:
        counts: units kept of each channel group, for `set_width`, `extract` and `calibrate_bn`.
        score: what `evaluate` returned for it.
        macs: multiply-adds as `profile` counts them, of one image; of a model that does not name its images' size, of
            the whole batch of the example that it was converted with.
        parameters: elements of all parameters.
    """

    counts: tuple[int, ...]
    score: float
    macs: int
    parameters: int


def search(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    budget: float | Sequence[float],
    *,
    of: Cost = "macs",
    table: Any = None,
    step: float = 0.1,
    calibrate: Iterable[ModelInput] | None = None,
    progress: bool = True,
) -> list[Found]:
    """Shrink `model` greedily, one channel group at a time, and return the first sub-network within each budget.

    Each round tries every group with a share `step` fewer of its units, and shrinks the one that leaves the best score.
    No group gets narrower than at the model's narrowest width. The model's weights, statistics and width do not change.

    Args:
        model: a converted model, ideally a universal one trained with the sandwich rule.
        evaluate: returns a score of the model at its active width, more is better, such as accuracy on held-out images.
        budget: share of the full network's cost, in (0, 1], or a sequence of such shares.
        of: the cost, "macs", "parameters" or "latency".
        table: for "latency", a `slimmable.deploy.LatencyTable` of this model, or its file; by default, one is measured.
        step: share of a group's units, in (0, 1).
        calibrate: list of batches, as for `calibrate_bn`, for BatchNorm statistics before every evaluation, or None.
        progress: show a progress bar on a terminal.

    Raises: ConversionError: if `model` was not converted, or contains several converted models. UsageError: if an
        argument is invalid, the table is of another model, or a budget is below the cost of the narrowest width.

    Source: AutoSlim, Yu and Huang 2019, arXiv 1903.11728, section 3. An evolutionary search is in `benchmarks/latency`.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = slimmable.slimify(net, (1.0, 0.25), example_inputs=torch.zeros(1, 4), universal=True)
    >>> [found] = slimmable.search(model, lambda net: float(net[0].weight.shape[0]), 0.6, step=0.25)
    >>> found
    Found(counts=(8, 2), score=8.0, macs=52, parameters=64)
    """
    check_function("search", evaluate=evaluate)
    check_flags("search", progress=progress)
    check_share("search", step=step)
    one_of(get_args(Cost))("search", of=of)
    plans = {id(state.plan): state.plan for _, state in places_of(model) if state.plan is not None}
    if len(plans) != 1:
        raise ConversionError(f"{type(model).__name__} has {len(plans)} parts that slimify converted; search needs one")
    plan: Plan = plans.popitem()[1]
    given: Any = budget
    budgets = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Tensor)) else [given]
    if table is not None and of != "latency":
        raise UsageError(f"search: a table is for of='latency', not of={of!r}; got {table!r:.80}")
    if of == "latency" and not hasattr(table, "predict"):  # imported late, since that room looks at costs, too
        kind = import_module("slimmable.deploy.latency").LatencyTable
        table = kind.measure(model) if table is None else kind.load(table)

    def cost(found: Any) -> Any:
        return getattr(found, of) if table is None else table.predict(plan, found.counts)

    full, least = map(cost, (plan.columns[0], plan.columns[-1]))
    unfit = [share for share in budgets if not least / full <= number_or_nan(share) <= 1]
    if unfit or not budgets:
        needs = f"{of}, from {least / full:.3f}, which the narrowest width needs, to 1"
        raise UsageError(f"search: a budget is a share of the full network's {needs}; got {[*unfit, budget][0]!r}")
    if isinstance(calibrate, (str, Tensor, Iterator)) or not isinstance(calibrate, (Iterable, type(None))):
        raise UsageError(f"search: calibrate must be a list of batches, to read again and again, got {calibrate!r:.80}")
    limits = [max(share * full, least) for share in budgets]  # a share that is exactly the least may round to below it

    def score(candidate: SubNetwork) -> Found:
        with at_width(model, candidate.counts):
            if calibrate is not None:
                collect_statistics(model, calibrate)
            value: object = evaluate(model)
        number = math.nan
        with suppress(TypeError, ValueError):
            number = float(value)  # type: ignore[arg-type]
        if math.isnan(number):
            raise UsageError(f"search: evaluate must return a number, higher is better, got {value!r}")
        return Found(candidate.counts, number, candidate.macs, candidate.parameters)

    path = [score(plan.columns[0])]
    with tqdm(desc=f"search: {of} down to {min(budgets):g}", unit="round", disable=not progress or None) as bar:
        while cost(path[-1]) > min(limits):
            tried = [score(candidate) for candidate in _smaller(plan, path[-1], cost, step)]
            path.append(max(tried, key=lambda found: (found.score, -cost(found))))
            bar.set_postfix_str(f"at {cost(path[-1]) / full:.3f}, score {path[-1].score:.4g}", refresh=False)
            bar.update()
    chosen = [next(found for found in path if cost(found) <= limit) for limit in limits]
    for at, found in enumerate(chosen):
        with suppress(ConversionError), at_width(model, found.counts):  # a model that does not name its images' size
            chosen[at] = replace(found, macs=_count(model, (example_of(model)[0][0][:1],), {}).flops // 2)
    return chosen


def _smaller(plan: Plan, current: Found, cost: Callable[[Any], float], step: float) -> list[SubNetwork]:
    """Return `current` with one group a step smaller, for each group where that makes it cheaper."""
    found: dict[tuple[int, ...], SubNetwork] = {}
    groups = zip(plan.channels.units, current.counts, plan.columns[-1].counts, strict=True)
    for group, (units, count, least) in enumerate(groups):
        fewer = max(least, count - max(1, round(step * units / plan.round_to)) * plan.round_to)
        if fewer < count:
            candidate = plan.near((*current.counts[:group], fewer, *current.counts[group + 1 :]))
            if cost(candidate) < cost(current):
                found[candidate.counts] = candidate
    return list(found.values()) or [plan.columns[-1]]  # groups that can only shrink together
