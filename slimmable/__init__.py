"""Slimmable networks: one set of weights that runs at several widths.

>>> import torch, slimmable
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> model = slimmable.slimify(net, widths=(1.0, 0.5), example_inputs=torch.zeros(2, 8))
>>> slimmable.set_width(model, 0.5)
>>> model[0].weight.shape
torch.Size([8, 8])

The rest lives in the submodules `layers`, `losses`, `training`, `evaluation`, `methods`, `integrations`, `gating`,
`rules`, `deploy`, `runtime` and `errors`. Examples in docstrings presume `torch`, `torch.nn` as `nn` and `slimmable`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimmable._convert import extract, plan, slimify
    from slimmable._inference import inference
    from slimmable._inputs import Inputs
    from slimmable._profile import profile, search
    from slimmable._repair import repair
    from slimmable._width import AllWidths, at_width, run_widths, set_width, width_of, widths_of
    from slimmable.cli.calls import pretrain
    from slimmable.deploy.export import export
    from slimmable.errors import SlimmableError
    from slimmable.files.hub import from_pretrained, push_to_hub, save_pretrained
    from slimmable.files.model import full_state_dict, load, save
    from slimmable.files.slimclr import load_slimclr
    from slimmable.layers import SlimConv2d, SlimLinear, SwitchableBatchNorm, SwitchableProbe
    from slimmable.losses import OnlineDistillation
    from slimmable.rules import register_rule
    from slimmable.training import SlimRecipe, calibrate_bn

    from . import deploy, errors, evaluation, gating, integrations, layers, losses, methods, rules, runtime, training  # noqa: F401

__version__ = "0.1.0"

__all__ = [
    "AllWidths", "Inputs", "OnlineDistillation", "SlimConv2d", "SlimLinear", "SlimRecipe", "SlimmableError",
    "SwitchableBatchNorm", "SwitchableProbe", "at_width", "calibrate_bn", "export", "extract", "from_pretrained",
    "full_state_dict", "inference", "load", "load_slimclr", "plan", "pretrain", "profile", "push_to_hub",
    "register_rule", "repair", "run_widths", "save", "save_pretrained", "search", "set_width", "slimify", "width_of",
    "widths_of",
]  # fmt: skip

_HOMES = (
    "_convert", "_inference", "_inputs", "_profile", "_repair", "_width", "deploy.export", "errors",
    "files.hub", "files.model", "files.slimclr", "layers", "losses", "rules", "training", "cli.calls",
)  # fmt: skip
_SUBMODULES = (
    "deploy", "errors", "evaluation", "gating", "integrations", "layers", "losses", "methods", "rules", "runtime",
    "training",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name, and torch with it, on first use, which keeps `slimmable --help` quick."""
    if name in _SUBMODULES:
        return import_module(f"slimmable.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = (import_module(f"slimmable.{home}") for home in _HOMES)
    globals()[name] = next(vars(home)[name] for home in homes if name in vars(home))
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES]
