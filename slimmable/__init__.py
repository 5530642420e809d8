"""Slimmable networks: one set of weights that runs at several widths.

>>> import torch, slimmable
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> model = slimmable.slimify(net, widths=(1.0, 0.5), example_inputs=torch.zeros(2, 8))
>>> slimmable.set_width(model, 0.5)
>>> model[0].weight.shape
torch.Size([8, 8])
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from slimmable._public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    """Import the public names, and torch with them, when one is first asked for: `slimmable --help` is quick."""
    public = {} if name.startswith("_") else vars(_import_module("slimmable._public"))
    if name not in public:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = public[name]
    return public[name]


def __dir__() -> list[str]:
    return sorted(name for name in vars(_import_module("slimmable._public")) if not name.startswith("_"))
