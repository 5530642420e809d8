"""`search`: sub-networks within a budget of multiply-adds, parameters or milliseconds, greedily or by evolution."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from slimmable._checks import check_count, check_flags, check_function
from slimmable._width import at_width, places_of
from slimmable._widths import number_or_nan
from slimmable.analysis.plan import Plan, SubNetwork
from slimmable.deploy.latency import LatencyTable
from slimmable.errors import ConversionError, UsageError
from slimmable.training.batchnorm import ModelInput, collect_statistics

Cost = Literal["macs", "parameters", "latency"]


@dataclass(frozen=True)
class Found:
    """A sub-network that a search has found.

    Attributes:
        counts: units kept of each channel group, for `set_width`, `extract` and `calibrate_bn`.
        score: what `evaluate` returned for it.
        macs: multiply-adds, for the whole batch of the example that the model was converted with.
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
    table: LatencyTable | str | Path | None = None,
    step: float = 0.1,
    evolution: int | None = None,
    calibrate: Iterable[ModelInput] | None = None,
    progress: bool = True,
) -> list[Found]:
    """Shrink `model` greedily, one channel group at a time, and return the first sub-network within each budget.

    Each round tries every group with a share `step` fewer of its units, and shrinks the one that leaves the best score.
    No group gets narrower than at the model's narrowest width. The model's weights, statistics and width do not change.

    With `evolution`, it returns the best of so many sub-networks within each budget instead: the uniform width, a fifth
    drawn at random, and mutations and crosses of the best quarter so far, each as wide as the budget lets it be.

    Args:
        model: a converted model, ideally a universal one trained with the sandwich rule.
        evaluate: returns a score of the model at its active width, higher is better, such as the accuracy on images
            held out from training.
        budget: share of the full network's cost, in (0, 1], or a sequence of such shares.
        of: the cost, "macs", "parameters" or "latency".
        table: for "latency", a `slimmable.deploy.LatencyTable` of this model, or its file; by default, one is measured.
        step: share of a group's units, in (0, 1).
        evolution: how many sub-networks to try for each budget, or None for the greedy search.
        calibrate: list of batches, as for `calibrate_bn`, from which BatchNorm statistics are computed before every
            evaluation; None if `evaluate` needs none.
        progress: show a progress bar on a terminal.

    Raises: ConversionError: if `model` was not converted, or contains several converted models. UsageError: if an
        argument is invalid, the table is of another model, or a budget is below the cost of the narrowest width.

    Source: AutoSlim, Yu and Huang 2019, arXiv 1903.11728, section 3; `evolution`: Once-for-All, Cai et al. 2020, arXiv
    1908.09791, section 3.4.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = slimmable.slimify(net, (1.0, 0.25), example_inputs=torch.zeros(1, 4), universal=True)
    >>> [found] = slimmable.search(model, lambda net: float(net[0].weight.shape[0]), 0.6, step=0.25)
    >>> found
    Found(counts=(8, 2), score=8.0, macs=52, parameters=64)
    """
    from tqdm import tqdm  # which timm brings along

    check_function("search", evaluate=evaluate)
    check_flags("search", progress=progress)
    plans = {id(state.plan): state.plan for _, state in places_of(model) if state.plan is not None}
    if len(plans) != 1:
        raise ConversionError(f"{type(model).__name__} has {len(plans)} parts that slimify converted; search needs one")
    plan: Plan = plans.popitem()[1]
    given: Any = budget
    budgets = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Tensor)) else [given]
    if of not in get_args(Cost):
        raise UsageError(f"search: of={of!r} is unknown; use 'macs', 'parameters' or 'latency'")
    if table is not None and of != "latency":
        raise UsageError(f"search: a table is for of='latency', not of={of!r}; got {table!r:.80}")
    if not 0 < number_or_nan(step) < 1:
        raise UsageError(f"search: step must be in (0, 1), got {step!r}")
    if evolution is not None:
        check_count("search", evolution=evolution)
    times = LatencyTable.measure(model) if of == "latency" and table is None else table
    known = times if isinstance(times, LatencyTable) or times is None else LatencyTable.load(times)

    def cost(found: Any) -> Any:
        return getattr(found, of) if known is None else known.predict(plan, found.counts)

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

    hidden = None if progress else True  # None: unless it is on a terminal
    with tqdm(desc=f"search: {of} down to {min(budgets):g}", unit="round", dynamic_ncols=True, disable=hidden) as bar:
        if evolution is not None:
            return [_evolved(plan, score, cost, limit, evolution, bar) for limit in limits]
        path = [score(plan.columns[0])]
        while cost(path[-1]) > min(limits):
            tried = [score(candidate) for candidate in _smaller(plan, path[-1], cost, step)]
            path.append(max(tried, key=lambda found: (found.score, -cost(found))))
            bar.set_postfix_str(f"at {cost(path[-1]) / full:.3f}, score {path[-1].score:.4g}", refresh=False)
            bar.update()
    return [next(found for found in path if cost(found) <= limit) for limit in limits]


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


def _evolved(plan: Plan, score: Any, cost: Callable[[Any], float], limit: float, tries: int, bar: Any) -> Found:
    """Return the best of the sub-networks that are tried, as `search` says; one that comes twice is scored once."""
    draw, bounds = random.Random(0), [*zip(plan.columns[-1].counts, plan.channels.units, strict=True)]
    rate = max(0.1, 1 / max(1, len(bounds)))  # of mutations
    best: list[tuple[Found, list[float]]] = []  # by score, each with shares of what its groups may keep or lose
    for number in range(tries):
        shares = [draw.random() if number else 1.0 for _ in bounds]
        if number > tries // 5:
            one, other = draw.choices([each for _, each in best[: max(2, len(best) // 4)]], k=2)
            if draw.random() < 0.5:
                shares = [new if draw.random() < rate else old for old, new in zip(one, shares, strict=True)]
            else:
                shares = [draw.choice(pair) for pair in zip(one, other, strict=True)]
        scale, sub = 2.0, plan.columns[0]
        while cost(sub) > limit:
            parts = zip(bounds, (min(1, scale * share) / plan.round_to for share in shares), strict=True)
            sub = plan.near(tuple(min(n, low + round(part * (n - low)) * plan.round_to) for (low, n), part in parts))
            scale *= 0.95
        if all(found.counts != sub.counts for found, _ in best):
            best = sorted([*best, (score(sub), shares)], key=lambda each: -each[0].score)
        bar.update()
    return best[0][0]
