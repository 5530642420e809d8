"""Greedy search for sub-networks within a budget, with a width of its own for each channel group."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from slimmable._checks import check_flags, check_function, number_or_nan
from slimmable._width import at_width, places_of
from slimmable.analysis.channels import SubNetwork
from slimmable.analysis.plan import Plan
from slimmable.errors import ConversionError, UsageError
from slimmable.training.calibrate import ModelInput, collect_statistics

Cost = Literal["macs", "parameters"]


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
    step: float = 0.1,
    calibrate: Iterable[ModelInput] | None = None,
    progress: bool = True,
) -> list[Found]:
    """Shrink `model` greedily, one channel group at a time, and return the first sub-network within each budget.

    Each round tries every group with a share `step` fewer of its units, and shrinks the one that leaves the best score.
    No group gets narrower than at the model's narrowest width. The model's weights, statistics and width do not change.

    Args:
        model: a converted model, ideally a universal one trained with the sandwich rule.
        evaluate: returns a score of the model at its active width, higher is better, such as the accuracy on images
            held out from training.
        budget: share of the full network's cost, in (0, 1], or a sequence of such shares.
        of: the cost, "macs" or "parameters".
        step: share of a group's units, in (0, 1).
        calibrate: list of batches, as for `calibrate_bn`, from which BatchNorm statistics are computed before every
            evaluation; None if `evaluate` needs none.
        progress: show a progress bar on a terminal.

    Returns: one `Found` per budget, in the same order.

    Raises: ConversionError: if `model` was not converted, or contains several converted models. UsageError: if an
        argument is invalid, or a budget is below the cost of the narrowest width.

    Source: AutoSlim, Yu and Huang 2019, arXiv 1903.11728, section 3.

    >>> import slimmable, torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = slimmable.slimify(net, (1.0, 0.25), example_inputs=torch.zeros(1, 4), universal=True)
    >>> [found] = search(model, lambda net: float(net[0].weight.shape[0]), 0.6, step=0.25)
    >>> found
    Found(counts=(8, 2), score=8.0, macs=52, parameters=64)
    """
    from tqdm import tqdm  # which timm brings along

    check_function("search", evaluate=evaluate)
    check_flags("search", progress=progress)
    plans = {id(state.plan): state.plan for _, state in places_of(model) if state.plan is not None}
    if len(plans) != 1:
        raise ConversionError(
            f"{type(model).__name__} has {len(plans)} parts converted by slimmable.slimify; search needs exactly one"
        )
    plan: Plan = plans.popitem()[1]
    given: Any = budget
    budgets = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Tensor)) else [given]
    if of not in get_args(Cost):
        raise UsageError(f"search: of={of!r} is unknown; use 'macs' or 'parameters'")
    if not 0 < number_or_nan(step) < 1:
        raise UsageError(f"search: step must be in (0, 1), got {step!r}")
    full, least = (getattr(plan.columns[index], of) for index in (0, -1))
    unfit = [share for share in budgets if not least / full <= number_or_nan(share) <= 1]
    if unfit or not budgets:
        needs = f"from {least / full:.3f}, which the narrowest width needs, to 1"
        raise UsageError(
            f"search: a budget is a share of the full network's {of}, {needs}; got {[*unfit, budget][0]!r}"
        )
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
    hidden = None if progress else True  # None: unless it is on a terminal
    with tqdm(desc=f"search: {of} down to {min(budgets):g}", unit="round", dynamic_ncols=True, disable=hidden) as bar:
        while getattr(path[-1], of) > min(limits):
            tried = [score(candidate) for candidate in _smaller(plan, path[-1], of, step)]
            path.append(max(tried, key=lambda found: (found.score, -getattr(found, of))))
            share = getattr(path[-1], of) / full
            bar.set_postfix_str(f"at {share:.3f}, score {path[-1].score:.4g}", refresh=False)
            bar.update()
    return [next(found for found in path if getattr(found, of) <= limit) for limit in limits]


def _smaller(plan: Plan, current: Found, of: Cost, step: float) -> list[SubNetwork]:
    """Return `current` with one group a step smaller, for each group where that makes it cheaper."""
    found: dict[tuple[int, ...], SubNetwork] = {}
    groups = zip(plan.channels.units, current.counts, plan.columns[-1].counts, strict=True)
    for group, (units, count, least) in enumerate(groups):
        fewer = max(least, count - max(1, round(step * units / plan.round_to)) * plan.round_to)
        if fewer < count:
            candidate = plan.near((*current.counts[:group], fewer, *current.counts[group + 1 :]))
            if getattr(candidate, of) < getattr(current, of):
                found[candidate.counts] = candidate
    return list(found.values()) or [plan.columns[-1]]  # groups that can only shrink together
