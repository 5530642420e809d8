"""The weights of the plain full-width network, without those that only the narrower widths have."""

from __future__ import annotations

from torch import Tensor, nn

from slimmable._checks import check_module
from slimmable._convert import plain
from slimmable._modules import replace_modules
from slimmable.view.container import SwitchableContainer


def full_state_dict(model: nn.Module, *, prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the state dict of the full-width plain network, which loads strictly into the model before conversion.

    It has no narrower norms and no gates, whatever the active width. That of a model without widths is its own.

    Args:
        model: a converted or gated model, a part or wrapper of one, a model built by hand, or a plain model.
        prefix, keep_vars: as in `torch.nn.Module.state_dict`: what to put before each name, and whether to return the
            Parameters themselves.

    Raises: UsageError: if `model` is not a module.

    >>> import torch
    >>> from slimmable import slimify
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> slim = slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    >>> "1.narrow.0.weight" in slim.state_dict()
    True
    >>> net.load_state_dict(full_state_dict(slim))
    <All keys matched successfully>
    """
    check_module("full_state_dict", model)
    bare = plain(model)
    full = {id(each): each.module_at(0) for each in bare.modules() if isinstance(each, SwitchableContainer)}
    found: dict[str, Tensor] = replace_modules(bare, full).state_dict(prefix=prefix, keep_vars=keep_vars)
    return found
