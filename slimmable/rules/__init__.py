"""Rules of operations: what an operation does with the units on the axes of its tensors.

`register_rule` gives your own operations one, as it does those here; the basic ones are in `slimmable.analysis`.
"""

from slimmable.rules import _torch as _torch
from slimmable.rules._operation import Operation, register_rule

__all__ = ["Operation", "register_rule"]
