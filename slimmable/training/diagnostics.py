"""Measure how the widths' gradients interact: which one dominates the shared weights, and how well they agree."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from slimmable._atomic import write_aside
from slimmable._checks import check_positive, checked, has_shards
from slimmable._convert import shallow_modules
from slimmable._numerics import at_least_float32
from slimmable._tables import csv_text
from slimmable._width import columns_of, places_of, widths_of
from slimmable.errors import UsageError
from slimmable.view.cuts import Cut, put, take
from slimmable.view.norms import SwitchableContainer, SwitchableNorm
from slimmable.view.state import Column, is_slim, state_of

Sums: TypeAlias = "dict[tuple[str, float, float], float]"
"""(kind, width, the same or another width) -> a sum over the entries of one or several parameters."""


class GradientDiagnostics:
    """Gradient imbalance and divergence between widths during training (SlimCLR, Zhao et al. 2024, Figure 3).

    One step out of `every` is sampled: the gradients are read after each width's `backward` and before the update.
    `theta_w` is the part of the parameters that width w reads, `L` the step's total loss, and `L_w` width w's part of
    it. Only parameters that all widths share count; those of switchable norms and probes belong to one width each. A
    value without `_total` is the mean over those with two or more axes ("layers") in which it is finite, one with
    `_total` that of all as one vector. Values missing from a step, such as those of a width that did not run, are NaN.

    | column | value |
    |---|---|
    | `step` | number of the step, from 0 |
    | `grad_norm/w0.25` | norm of the gradient of `L` in `theta_0.25`; its mean over layers is the published statistic |
    | `grad_ratio/w0.25` | the same norm in `theta_1.0`, divided by that in `theta_0.25`; at least 1 |
    | `rest_ratio/w0.25` | norm in the rest of `theta_1.0`, over that in `theta_0.25`; below 1 a small part dominates |
    | `own_norm/w0.25` | norm of the gradient of `L_0.25` in `theta_0.25` |
    | `own_ratio/w0.25` | norm of the gradient of `L_1.0` divided by that of `L_0.25` |
    | `grad_cosine/w1.0_w0.25` | cosine of the gradients of `L_1.0` and `L_0.25` in the part that both widths read |

    A width's own gradient is what its `backward` added to the sum, with its rounding: use float32 parameters. Random
    widths of a recipe count in `L`, but have no columns. With several processes, own gradients are those of the
    process, or of all if each `backward` averages, and total gradients those present at `after_step`. A sampled step
    needs three times the memory of the gradients, others none.

    Args:
        model: anything that `set_width` takes; not sharded.
        every: number of steps from one sample to the next, starting at step 0.

    Attributes:
        step: number of the current step.
        rows: for each sampled step, column -> value.
        layer_names: names of the layers, in the order of the values in `layers`.
        layers: for each row, column -> float32 tensor of shape (layers,), the values behind the mean.

    Raises: ConversionError: if nothing in `model` reacts to widths.

    >>> from slimmable import SlimLinear, SlimRecipe
    >>> model = SlimLinear(4, 2, widths=(1.0, 0.5), slim_out=False)
    >>> recipe, diagnostics = SlimRecipe(model, loss_weights="ones"), GradientDiagnostics(model, every=50)
    >>> for width in recipe.widths(progress=1.0):
    ...     recipe.loss(model(torch.ones(1, int(4 * width))).sum()).backward()
    ...     diagnostics.after_backward(width)
    >>> diagnostics.after_step()  # half of the weights have the gradient 1 + 1, half have 1
    >>> columns = ("grad_ratio/w0.5", "rest_ratio/w0.5", "grad_cosine/w1.0_w0.5")
    >>> [round(diagnostics.rows[0][column], 4) for column in columns]
    [1.118, 0.5, 1.0]
    """

    @checked
    def __init__(self, model: nn.Module, every: int = 50) -> None:
        self.model, self.every = model, every
        self.widths = widths_of(model)
        self._shared = shared_parameters(model, self.widths)
        if has_shards(shared.parameter for shared in self._shared):
            raise UsageError("GradientDiagnostics: the parameters are sharded over processes; give a model that is not")
        self.layer_names = tuple(shared.name for shared in self._shared if shared.parameter.ndim > 1)
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.layers: list[dict[str, Tensor]] = []
        self.discard()

    def after_backward(self, width: float) -> None:
        """Record what the `backward` of `width` added to the gradients; call it after each `backward`.

        It does nothing in steps that are not sampled. Calls with one width add up. Clear gradients before each step.

        Raises: WidthError: if the model does not have this width.
        """
        check_positive("GradientDiagnostics.after_backward", width=width)
        if self.step % self.every:
            return
        if width not in self.widths:
            columns_of(places_of(self.model), width)
        own = self._own.setdefault(width, {})
        for shared in self._shared:
            if shared.parameter.grad is None:
                continue
            gradient = at_least_float32(shared.parameter.grad.detach())
            added = gradient - self._before.get(shared.name, 0.0)
            self._before[shared.name] = gradient.clone()
            if width in shared.blocks:  # not a random one
                own[shared.name] = own.get(shared.name, 0.0) + take(added, shared.blocks[width])

    @checked
    def after_step(self, scale: float = 1.0) -> None:
        """Count the step, and add its row if it is sampled; call it before the optimizer's update.

        Args:
            scale: the factor that all gradients still have, such as `scaler.get_scale()`; norms are divided by it.

        Raises: UsageError: if a sampled step had no `after_backward`, or no shared parameter has a gradient.
        """
        if self.step % self.every == 0:
            self._sample(scale)
        self.step += 1

    def _sample(self, scale: float) -> None:
        where = "GradientDiagnostics.after_step"
        if not self._own:
            raise UsageError(f"{where}: step {self.step} is sampled, but after_backward was not called in it")
        whole: Sums = {}
        layers: list[Sums] = []
        for shared in self._shared:
            gradient, name = shared.parameter.grad, shared.name
            own = {width: self._own[width][name] for width in self.widths if name in self._own.get(width, {})}
            sums = {} if gradient is None else sums_of(shared, gradient.detach(), own)
            whole |= {key: whole.get(key, 0.0) + value for key, value in sums.items()}
            layers += [sums] * (shared.name in self.layer_names)
        if not whole:
            raise UsageError(f"{where}: no shared parameter has a gradient; call it before the gradients are cleared")
        groups = [whole, *layers]
        joined = {key: torch.tensor([sums.get(key, math.nan) for sums in groups], dtype=torch.float64) for key in whole}
        values = values_of(joined, self.widths, scale)
        row: dict[str, float] = {"step": self.step}
        for name, value in values.items():
            row[name] = value[1:][value[1:].isfinite()].mean().item()
            row[name.replace("/", "_total/")] = value[0].item()
        self.rows.append(row)
        self.layers.append({name: value[1:].float() for name, value in values.items()})
        self.discard()

    def discard(self) -> None:
        """Forget what was recorded since the last step; call it if a step fails and its gradients are cleared."""
        self._own: dict[float, dict[str, Tensor]] = {}  # width -> parameter -> its own gradient, in the width's block
        self._before: dict[str, Tensor] = {}  # parameter -> its gradient at the last call

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the step and the rows and layers so far, for a checkpoint between two steps."""
        return {"step": self.step, "rows": list(self.rows), "layers": list(self.layers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was called."""
        kinds = {"step": int, "rows": list, "layers": list}
        if not isinstance(state, dict) or {name: type(value) for name, value in state.items()} != kinds:
            raise UsageError(f"GradientDiagnostics.load_state_dict: not what its state_dict() returns: {state!r:.80}")
        self.step, self.rows, self.layers = state["step"], list(state["rows"]), list(state["layers"])
        self.discard()

    @checked
    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV; an existing file is replaced once the new one is complete.

        Raises: CheckpointError: if it cannot be written.
        """
        text = csv_text(list(self.rows[0]) if self.rows else ["step"], self.rows)
        write_aside(Path(path), lambda aside: aside.write_text(text, newline=""))


class SharedParameter(NamedTuple):
    """A parameter that all widths share, and the block of it that each width reads."""

    name: str
    parameter: nn.Parameter
    blocks: Mapping[float, Cut]


def shared_parameters(model: nn.Module, widths: Sequence[float]) -> list[SharedParameter]:
    """Return the parameters that all `widths` share, in the model's order, each once, with its first module's block."""
    places = places_of(model)
    column_of = {(m, w): column for w in widths for (m, _), column in zip(places, columns_of(places, w), strict=True)}
    found: dict[int, dict[float, Cut]] = {}
    for module in shallow_modules(model):
        for name, parameter in _parameters_at_all_widths(module).items():
            if parameter is not None:
                blocks = {w: _block(module, name, parameter, column_of.get((module, w))) for w in widths}
                found.setdefault(id(parameter), blocks)
    named = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in found]
    return [SharedParameter(name, parameter, found[id(parameter)]) for name, parameter in named]


def _parameters_at_all_widths(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    if isinstance(module, SwitchableNorm):
        return module.full._parameters if all(map(is_slim, module.narrow)) else {}
    return {} if isinstance(module, SwitchableContainer) else module._parameters


def _block(module: nn.Module, name: str, parameter: Tensor, column: Column | None) -> Cut:
    """Return the block of a parameter that a module's column reads (None for a module without widths)."""
    if column is not None and isinstance(module, SwitchableNorm):
        state = state_of(module.module_at(column.index))  # narrow norms have a view of the full one's gain and bias
        column = None if state is None else state.columns[0]
    cut = None if column is None else column.cuts.get(name)
    return cut or Cut(tuple(parameter.shape), (), (), (), ())


def sums_of(shared: SharedParameter, gradient: Tensor, own: Mapping[float, Tensor]) -> Sums:
    """Return the sums of one parameter; own gradients have the shape of their block.

    The kinds are `total` and `own` (squares of the total and of each width's own gradient in the width's block),
    `product` (of two widths' own gradients), and `first` and `second` (squares of the two in what both widths read).
    """
    blocks, total = shared.blocks, at_least_float32(gradient)
    sums = {("total", width, width): _product(take(total, block)) for width, block in blocks.items()}
    sums |= {("own", width, width): _product(part) for width, part in own.items()}
    zeros = total.new_zeros(()).expand(total.shape)
    spread = {width: put(zeros, blocks[width], part) for width, part in own.items()}
    for first, second in combinations(own, 2):
        part = take(spread[first], blocks[second])
        sums["product", first, second] = _product(part, own[second])
        sums["first", first, second] = _product(part)
        sums["second", first, second] = _product(take(spread[second], blocks[first]))
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def values_of(sums: Mapping[Any, Tensor], widths: Sequence[float], scale: float) -> dict[str, Tensor]:
    """Return column -> values for `Sums` that are tensors, an entry for each group; NaN where there is no sum."""
    missing = torch.full_like(sums["total", 1.0, 1.0], math.nan)
    total, own = ({w: sums.get((kind, w, w), missing) for w in widths} for kind in ("total", "own"))
    values = {f"grad_norm/w{width}": total[width].sqrt() / scale for width in widths}
    values |= {f"grad_ratio/w{width}": (total[1.0] / total[width]).sqrt() for width in widths[1:]}
    values |= {f"rest_ratio/w{w}": ((total[1.0] - total[w]).clamp(min=0) / total[w]).sqrt() for w in widths[1:]}
    values |= {f"own_norm/w{width}": own[width].sqrt() / scale for width in widths}
    values |= {f"own_ratio/w{width}": (own[1.0] / own[width]).sqrt() for width in widths[1:]}
    for first, second in combinations(widths, 2):
        product, *squares = (sums.get((kind, first, second), missing) for kind in ("product", "first", "second"))
        values[f"grad_cosine/w{first}_w{second}"] = product / (squares[0].sqrt() * squares[1].sqrt())
    return values


def _product(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Return the sum of products, or squares, in float64 where the device has it, so that differences are exact."""
    return (a * (a if b is None else b)).sum(dtype=torch.float32 if a.device.type == "mps" else torch.float64)
