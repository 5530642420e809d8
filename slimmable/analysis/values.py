"""Numbers that a trace does know: those computed from integer and boolean inputs, such as masks, lengths, coordinates.

A forward on fake tensors has shapes only. Where the model is given indices or masks, what it computes from them alone
is computed beside the fake tensors, so that code may branch on it, or size a tensor by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from slimmable._inputs import MOST


def know(fake: Tensor, real: Tensor) -> None:
    """Give a fake tensor its numbers."""
    if real.numel() <= MOST:
        with _disable_current_modes():
            fake.slim_value = real.detach().cpu()  # type: ignore[attr-defined]


class Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes the numbers of what is computed from tensors with known numbers only."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = all(hasattr(tensor, "slim_value") for tensor in given)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not known or random:
            if func._schema.name.startswith("aten::index"):
                args = self._masks_as_indices(args)
            out = func(*args, **kwargs)
            self._forget_written(func, args)
            return out
        real = self._real(func, args, kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            return real
        if torch.Tag.dynamic_output_shape in func.tags:
            out = tree_map(lambda value: self._fake(value, given), real)
        else:
            out = func(*args, **kwargs)
        for fake, value in zip(tree_leaves(out), tree_leaves(real), strict=True):
            if isinstance(fake, Tensor):
                know(fake, value)
        return out

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        def value(leaf: Any) -> Any:
            return getattr(leaf, "slim_value", leaf)

        here = {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
        with _disable_current_modes():
            return func(*tree_map(value, args), **{**tree_map(value, kwargs), **here})

    def _fake(self, value: Any, given: list[Tensor]) -> Any:
        if not isinstance(value, Tensor):
            return value
        with _disable_current_modes():
            meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(self.mode, meta, given[0].device)

    def _masks_as_indices(self, args: Any) -> Any:
        """Replace known boolean masks, whose results have unknown shapes, by the indices of what they pick."""
        if not isinstance(args[1], (list, tuple)):
            return args
        indices: list[Any] = []
        for part in args[1]:
            mask = getattr(part, "slim_value", None)
            if mask is not None and mask.dtype == torch.bool:
                with _disable_current_modes():
                    picked = mask.nonzero(as_tuple=True)
                indices += [self._fake(index, [part]) for index in picked]
            else:
                indices.append(part)
        return (args[0], indices, *args[2:])

    @staticmethod
    def _forget_written(func: Any, args: Any) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    tensor.__dict__.pop("slim_value", None)
