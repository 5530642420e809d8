"""Measure how the widths' gradients interact: which one dominates the shared weights, and how well they agree."""

import math
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import torch
from torch import Tensor, nn

from slimmable._atomic import write_aside
from slimmable._checks import check_positive, checked, has_shards
from slimmable._convert import shallow_modules
from slimmable._numerics import at_least_float32, widest_float
from slimmable._tables import csv_text
from slimmable._width import columns_of, places_of, widths_of
from slimmable.errors import UsageError
from slimmable.view.norms import SwitchableContainer, SwitchableNorm
from slimmable.view.state import Cut, is_slim, put, state_of, take


class GradientDiagnostics:
    """Gradient imbalance and divergence between widths during training (SlimCLR, Zhao et al. 2024, Figure 3).

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
        step, rows: number of the current step; for each sampled one, column -> value. A resumed run can set them.
        layers: for each row, column -> float32 tensor of shape (layers,), the values behind the mean.
        layer_names: names of these layers.

    Raises: ConversionError: if nothing in `model` reacts to widths.

    >>> model = slimmable.SlimLinear(4, 2, widths=(1.0, 0.5), slim_out=False)
    >>> recipe, diagnostics = slimmable.SlimRecipe(model, loss_weights="ones"), GradientDiagnostics(model, every=50)
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
        if has_shards(parameter for parameter, _ in self._shared.values()):
            raise UsageError("GradientDiagnostics: the parameters are sharded over processes; give a model that is not")
        self.layer_names = tuple(name for name, (parameter, _) in self._shared.items() if parameter.ndim > 1)
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.layers: list[dict[str, Tensor]] = []
        self.discard()

    def after_backward(self, width: float) -> None:
        """Record what the `backward` of `width` added to the gradients, if the step is sampled; call it after each.

        Calls with one width add up. Clear gradients before each step. Raises: WidthError: if the model lacks the width.
        """
        check_positive("GradientDiagnostics.after_backward", width=width)
        if self.step % self.every:
            return
        if width not in self.widths:
            columns_of(places_of(self.model), width)
        own = self._own.setdefault(width, {})
        for name, (parameter, blocks) in self._shared.items():
            if parameter.grad is not None:
                gradient = at_least_float32(parameter.grad.detach())
                added = gradient - self._before.get(name, 0.0)
                self._before[name] = gradient.clone()
                if width in blocks:  # not a random one
                    own[name] = own.get(name, 0.0) + take(added, blocks[width])

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
        where, widths = "GradientDiagnostics.after_step", self.widths
        if not self._own:
            raise UsageError(f"{where}: step {self.step} is sampled, but after_backward was not called in it")
        found = {name: self._sums(name) for name in self._shared}
        whole = {key: sum(sums.get(key, 0.0) for sums in found.values()) for key in set().union(*found.values())}
        if not whole:
            raise UsageError(f"{where}: no shared parameter has a gradient; call it before the gradients are cleared")
        groups = [whole, *(found[name] for name in self.layer_names)]

        def of(kind: str, width: float, other: float) -> Tensor:
            return torch.tensor([sums.get((kind, width, other), math.nan) for sums in groups], dtype=torch.float64)

        total, own = ({width: of(kind, width, width) for width in widths} for kind in ("total", "own"))
        values = {f"grad_norm/w{width}": total[width].sqrt() / scale for width in widths}
        values |= {f"grad_ratio/w{width}": (total[1.0] / total[width]).sqrt() for width in widths[1:]}
        values |= {f"rest_ratio/w{w}": ((total[1.0] - total[w]).clamp(min=0) / total[w]).sqrt() for w in widths[1:]}
        values |= {f"own_norm/w{width}": own[width].sqrt() / scale for width in widths}
        values |= {f"own_ratio/w{width}": (own[1.0] / own[width]).sqrt() for width in widths[1:]}
        for a, b in combinations(widths, 2):
            lengths = of("own", a, b).sqrt() * of("own", b, a).sqrt()
            values[f"grad_cosine/w{a}_w{b}"] = of("product", a, b) / lengths
        row: dict[str, float] = {"step": self.step}
        for name, value in values.items():
            row[name] = value[1:][value[1:].isfinite()].mean().item()
            row[name.replace("/", "_total/")] = value[0].item()
        self.rows.append(row)
        self.layers.append({name: value[1:].float() for name, value in values.items()})
        self.discard()

    def _sums(self, name: str) -> dict[tuple[str, float, float], float]:
        """Return (kind, width, the same or another) -> sum over a parameter's entries, none without a gradient.

        The kinds are `total` (squares of its gradient in the width's block), `own` (squares of the width's own gradient
        in what both widths read), and `product` (of the two widths' own gradients).
        """
        parameter, blocks = self._shared[name]
        if parameter.grad is None:
            return {}
        total = at_least_float32(parameter.grad.detach())
        parts = {w: self._own[w][name] for w in self.widths if name in self._own.get(w, {})}
        own = {w: put(torch.zeros_like(total), blocks[w], part) for w, part in parts.items()}
        sums = {("total", width, width): _product(part := take(total, block), part) for width, block in blocks.items()}
        for a, b in product(own, repeat=2):
            sums["own", a, b] = _product(part := take(own[a], blocks[b]), part)
            sums["product", a, b] = _product(own[a], own[b])
        return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))

    def discard(self) -> None:
        """Forget what was recorded since the last step; call it if a step fails and its gradients are cleared."""
        self._own: dict[float, dict[str, Tensor]] = {}  # width -> parameter -> its own gradient, in the width's block
        self._before: dict[str, Tensor] = {}  # parameter -> its gradient at the last call

    @checked
    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV, in place of an existing file. Raises: CheckpointError: if it cannot be written."""
        text = csv_text(list(self.rows[0]) if self.rows else ["step"], self.rows)
        write_aside(Path(path), lambda aside: aside.write_text(text, newline=""))


def shared_parameters(model: nn.Module, widths: Sequence[float]) -> dict[str, tuple[nn.Parameter, dict[float, Cut]]]:
    """Return name -> parameter that all `widths` share, and width -> the block of it that its first module reads."""
    found: dict[int, dict[float, Cut]] = {}
    for module in shallow_modules(model):
        state, shares = state_of(module), isinstance(module, SwitchableNorm) and all(map(is_slim, module.narrow))
        if isinstance(module, SwitchableContainer) and not shares:
            continue  # each width has parameters of its own
        cuts = {width: state.columns[state.widths.index(width)].cuts if state else {} for width in widths}
        for name, parameter in module._parameters.items():  # of a norm, those of the full width
            if parameter is not None:
                whole = Cut(tuple(parameter.shape), (), (), (), ())
                found.setdefault(id(parameter), {width: cuts[width].get(name, whole) for width in widths})
    named = model.named_parameters()
    return {name: (parameter, found[id(parameter)]) for name, parameter in named if id(parameter) in found}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of products in float64 where the device has it, so that differences are exact."""
    return (a * b).sum(dtype=widest_float(a.device))
