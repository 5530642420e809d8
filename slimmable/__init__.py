"""Slimmable networks: one set of weights that runs at several widths.

>>> import torch, slimmable
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> model = slimmable.slimify(net, widths=(1.0, 0.5), example_inputs=torch.zeros(2, 8))
>>> slimmable.set_width(model, 0.5)
>>> model[0].weight.shape
torch.Size([8, 8])

The rest lives in the submodules `layers`, `losses`, `training`, `evaluation`, `methods`, `integrations`, `gating`,
`rules` and `errors`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimmable import errors as errors
    from slimmable import evaluation as evaluation
    from slimmable import gating as gating
    from slimmable import integrations as integrations
    from slimmable import layers as layers
    from slimmable import losses as losses
    from slimmable import methods as methods
    from slimmable import rules as rules
    from slimmable import training as training
    from slimmable._public import *
    from slimmable.cli.calls import pretrain as pretrain

__version__ = "0.1.0"

__all__ = [
    "AllWidths", "Inputs", "OnlineDistillation", "SlimConv2d", "SlimLinear", "SlimRecipe", "SlimmableError",
    "SwitchableBatchNorm", "SwitchableProbe", "at_width", "calibrate_bn", "extract", "from_pretrained",
    "full_state_dict", "load", "load_slimclr", "plan", "pretrain", "profile", "push_to_hub", "register_rule",
    "run_widths", "save", "save_pretrained", "search", "set_width", "slimify", "width_of", "widths_of",
]  # fmt: skip

_SUBMODULES = ("errors", "evaluation", "gating", "integrations", "layers", "losses", "methods", "rules", "training")


def __getattr__(name: str) -> Any:
    """Import a public name, and torch with it, on first use, which keeps `slimmable --help` quick."""
    if name in _SUBMODULES:
        return import_module(f"slimmable.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "slimmable.cli.calls" if name == "pretrain" else "slimmable._public"
    globals()[name] = getattr(import_module(module), name)
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES]
