"""Methods of solo-learn at all widths; the Trainer's part is `slimmable.integrations.lightning`."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from slimmable._checks import check_module
from slimmable._convert import copy_of, slimify
from slimmable._widths import WIDTHS
from slimmable.training import SlimRecipe
from slimmable.view.state import is_slim


def slim_recipe(method: Any, widths: Iterable[float] = WIDTHS, *, example_inputs: Any, **options: Any) -> SlimRecipe:
    """Convert a method of solo-learn in place, and return its recipe, which `SlimCallback` takes.

    Momentum networks become copies of the converted online ones, with their own weights, since solo-learn updates their
    parameters in pairs. They run once per step, at full width. Distillation compares the embeddings or predictions.

    Args:
        method: as its constructor returns it.
        widths, example_inputs: as for `slimmable.slimify`; a batch of images of the size that the method is trained on.
        options: as for `SlimRecipe`.
    """
    check_module("slim_recipe", method)
    pairs = list(getattr(method, "momentum_pairs", ()))
    names = {module: name for name, module in method.named_modules()}
    weights = [momentum.state_dict() for _, momentum in pairs]
    slimify(method, widths, example_inputs=example_inputs, inplace=True)
    twins = []
    for (online, momentum), state in zip(pairs, weights, strict=True):
        twin = copy_of(online).requires_grad_(False)
        twin.load_state_dict(state)
        method.set_submodule(names[momentum], twin)
        twins.append(twin)
    networks = [child for child in method.children() if child not in twins and any(map(is_slim, child.modules()))]
    return SlimRecipe(nn.ModuleList(networks), frozen=twins, **options)
