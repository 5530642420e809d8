"""The two passes of a gated model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from slimmable._inputs import check_module
from slimmable.errors import UsageError
from slimmable.gating._gated_pass import GatedPass
from slimmable.gating._parts import PLAN, Gated, LayerGates, Pass, gated_parts


@contextmanager
def gated(model: nn.Module) -> Iterator[GatedPass]:
    """Run a block with the gates on; it gives what they decide. Afterwards the pass is what it was before.

    In training the gates decide with noise, in eval without. Works on a gated model and on any wrapper around it. A
    copy that is made inside of the block stays gated, so make it outside.

    Raises: UsageError: if the model has no gates, or holds several gated models. In eval, gates that were never trained
        give a warning.

    >>> import torch, slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> with gated(model) as run:
    ...     scores = model(torch.randn(3, 4))
    >>> run.macs().shape, run.dense_macs()
    (torch.Size([3]), 352.0)
    """
    parts = parts_of("gated", model)
    roots = [path for path, module in model.named_modules() if PLAN in module.__dict__]
    if len(roots) > 1:
        raise UsageError(
            f"gated: this {type(model).__name__} holds {len(roots)} gated models, {', '.join(roots)}; give each a "
            "`with gated(...)` of its own"
        )
    gates = [part for part in parts if isinstance(part, LayerGates)]
    norm = getattr(gates[0].at[0], "norm", None)
    if isinstance(norm, nn.BatchNorm1d) and not norm.training and _is_zero(norm.num_batches_tracked):
        warnings.warn(
            f"the gates of this {type(model).__name__} were never trained; what they open is chance", stacklevel=3
        )
    run = GatedPass(model, gates)
    before = [(each, each.seen) for each in gates]
    for each in gates:
        each.watch(run._seen[each])
    try:
        with _during(parts, Pass.GATED):
            yield run
    finally:
        for each, seen in before:
            each.watch(seen)


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Run a block with the gates off, also inside of `gated`. Afterwards the pass is what it was before.

    Raises: UsageError: if the model has no gates.

    >>> import torch, slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> with dense(model):
    ...     torch.equal(model(torch.ones(1, 4)), net(torch.ones(1, 4)))
    True
    """
    with _during(parts_of("dense", model), Pass.DENSE):
        yield


def _is_zero(count: Tensor | None) -> bool:
    return count is not None and not count.is_meta and bool(count == 0)


def parts_of(where: str, model: nn.Module) -> list[Gated]:
    """Return what reacts to the pass.

    Raises: UsageError: if there are no gates; `where` is for the message.
    """
    check_module(where, model)
    parts = gated_parts(model)
    if not any(isinstance(part, LayerGates) for part in parts):
        raise UsageError(f"{where}: this {type(model).__name__} has no gates; make some with slimmable.gating.gate")
    return parts


@contextmanager
def _during(parts: list[Gated], wanted: Pass) -> Iterator[None]:
    states: list[Any] = [part.__dict__["state"] for part in parts]
    before = [state.active for state in states]
    for state in states:
        state.active = wanted
    try:
        yield
    finally:
        for state, pass_before in zip(states, before, strict=True):
            state.active = pass_before
