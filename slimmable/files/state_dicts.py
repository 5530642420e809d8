"""State dicts: the full network's of a converted model, and the differences between those of a file and a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from slimmable._checks import check_module
from slimmable._convert import plain
from slimmable._modules import replace_modules
from slimmable._tables import listed
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
    found: dict[str, Tensor] = full_network(model).state_dict(prefix=prefix, keep_vars=keep_vars)
    return found


def full_network(model: nn.Module) -> nn.Module:
    """Return the plain network of the full width, with the tensors of `model`, which is returned if it is plain."""
    bare = plain(model)
    full = {id(each): each.module_at(0) for each in bare.modules() if isinstance(each, SwitchableContainer)}
    return replace_modules(bare, full)


def differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], most: int | None = None) -> str:
    """Return how two state dicts differ in names and shapes: one line per kind of difference, or "" for none.

    Each line begins with a line break and two spaces, to be appended to the first line of a message. `expected` are the
    tensors of the network, `given` those of the file, and `most` is how many names a line lists, None for all.

    >>> import torch
    >>> one, two = torch.zeros(1), torch.zeros(2)
    >>> print("not the same:" + differences({"a": two, "b": one}, {"a": one, "c": one}))
    not the same:
      missing: b
      unknown: c
      of another shape: a (1,), expected (2,)
    """
    kinds = {
        "missing": [name for name in expected if name not in given],
        "unknown": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in given and given[name].shape != tensor.shape
        ],
    }
    return "".join(f"\n  {kind}: {listed(names, most)}" for kind, names in kinds.items() if names)


def fits_inside(small: Sequence[int], large: Sequence[int]) -> bool:
    """Tell whether a tensor of shape `small` can be part of one of shape `large`."""
    return len(small) == len(large) and all(a <= b for a, b in zip(small, large, strict=True))
