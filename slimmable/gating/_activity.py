"""What the gates of a trained model decide on given images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from slimmable._modules import in_eval_mode
from slimmable.errors import DataError, UsageError
from slimmable.gating._gated_pass import GatedPass
from slimmable.gating._passes import gated, parts_of
from slimmable.training.calibrate import ModelInput, arguments_of

Taken = TypeVar("Taken")


@torch.no_grad()
def gate_activity(model: nn.Module, loader: Iterable[ModelInput]) -> dict[str, Tensor]:
    """Return for each gate, by name, the share of the images for which it opens each unit: shape (units,), float64.

    The gates decide in eval mode, without noise; the model's modes stay as they are.

    Args:
        model: gated.
        loader: batches as `calibrate_bn` takes them.

    Raises:
        UsageError: if the model has no gates, or the loader is no list of batches or the like.
        DataError: if the loader is empty or holds something else.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> _ = nn.init.ones_(model[2].channel_gate.at[0].expand.weight)
    >>> gate_activity(model, [torch.ones(3, 4)])["2"].unique().numel()
    1
    """
    opened = over_batches(model, loader, _opened, "gate_activity")
    images = sum(count for _, count in opened)
    return {name: torch.stack([each[name] for each, _ in opened]).sum(0) / images for name in opened[0][0]}


def _opened(run: GatedPass) -> tuple[dict[str, Tensor], int]:
    """Return for how many of the images each unit is open, and how many images there are."""
    masks = run.masks()
    return {name: mask.double().sum(0) for name, mask in masks.items()}, len(next(iter(masks.values())))


def over_batches(
    model: nn.Module, loader: Iterable[ModelInput], take: Callable[[GatedPass], Taken], where: str
) -> list[Taken]:
    """Run a gated pass in eval mode on each batch, and return what `take` makes of each.

    Raises: as `gate_activity`; `where` is for the message.
    """
    parts_of(where, model)
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise UsageError(f"{where}: loader must hold batches, as [images] does, got {type(loader).__name__}")
    device = next(model.parameters()).device
    found = []
    with in_eval_mode(model):
        for batch in loader:
            args, kwargs = arguments_of(batch, device, where)
            with gated(model) as run:
                model(*args, **kwargs)
            found.append(take(run))
    if not found:
        raise DataError(f"{where}: loader is empty; give at least one batch")
    return found
