"""Comparison of the tensors in a file with those of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], most: int | None = None) -> str:
    """Return how two state dicts differ in names and shapes: one line per kind of difference, or "" for none.

    Each line begins with a line break and two spaces, to be appended to the first line of a message.

    Args:
        expected: tensors of the network by name.
        given: tensors of the file by name.
        most: names listed per line; None for all.

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
    return "".join(f"\n  {kind}: {_listed(names, most)}" for kind, names in kinds.items() if names)


def fits_inside(small: Sequence[int], large: Sequence[int]) -> bool:
    """Tell whether a tensor of shape `small` can be part of one of shape `large`.

    >>> fits_inside((4, 3), (8, 3)), fits_inside((4, 3), (8, 2)), fits_inside((4,), (8, 3))
    (True, False, False)
    """
    return len(small) == len(large) and all(a <= b for a, b in zip(small, large, strict=True))


def _listed(names: Sequence[str], most: int | None) -> str:
    more = 0 if most is None else len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
