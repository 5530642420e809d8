"""The dense and the gated pass of a model, their BatchNorms, a gated pass's decisions and cost, and losses on both."""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from slimmable._checks import check_floats, check_module, check_not_negative, check_number, checked
from slimmable._distributed import gather
from slimmable._inputs import image_batch, is_size
from slimmable.errors import DataError, UsageError
from slimmable.gating._gates import GATE, ChannelGate, Decision, LayerGates, Pass, gates_in
from slimmable.gating._plan import PLAN, GatePlan, LayerMacs, macs_for
from slimmable.view.norms import SwitchableNorm, copy_of_norm, inner_modules
from slimmable.view.recompute import Active, switched


class PassNorm(SwitchableNorm):
    """A `SwitchableNorm` with further norms for the gated pass, one per width: `gated.0` and so on in the state dict.

    Source: Krishna et al. 2023. A checkpoint without them loads into the norms of both passes.
    """

    active_pass: Active[Pass]
    gated: nn.ModuleList
    _lists: ClassVar[dict[str, int]] = {"narrow": 1, "gated": 0}

    @staticmethod
    def of(norm: nn.Module, widths: int) -> "PassNorm":
        """Give a norm, switchable or not, norms for the gated pass, which start as copies.

        Only the first `widths` widths get them. A switchable norm is changed in place, others are put inside a new one.
        """
        own = norm if isinstance(norm, SwitchableNorm) else SwitchableNorm(norm, (1.0,), (None,))
        copies = [copy_of_norm(own.own_at(index)) for index in range(min(widths, 1 + len(own.narrow)))]
        own.__dict__["inside"] = own is not norm
        own.__dict__["active_pass"] = Active(Pass.DENSE)
        own.__class__ = PassNorm
        own.add_module("gated", nn.ModuleList(copies))
        own.gated.training = own.training
        return cast(PassNorm, own)

    def without(self) -> nn.Module:
        """Undo `of`: return the original norm, switchable or not."""
        del self._modules["gated"], self.__dict__["active_pass"]
        self.__class__ = SwitchableNorm  # type: ignore[assignment]
        return self.to_plain() if self.__dict__.pop("inside") else self

    def module_at(self, index: int) -> nn.Module:
        """Return the active pass's norm of the width with this index."""
        if self.__dict__["active_pass"].active is Pass.DENSE:
            return super().module_at(index)
        return inner_modules(self, "gated")[str(index)]


class GatedPass:
    """The gates' decisions in the forwards of one `with gated(model) as run:` block.

    The images of several forwards, at one width, are concatenated. All results keep their gradient; forwards inside
    `torch.utils.checkpoint.checkpoint` need `use_reentrant=False` for that.
    """

    def __init__(self, root: nn.Module | None, gates: list[LayerGates]) -> None:
        self._root = root  # that `gate` returned
        self._records: dict[LayerGates, list[Decision]] = {each: [] for each in gates}
        self._sizes: dict[tuple[int, ...], LayerMacs] = {}

    def masks(self) -> dict[str, Tensor]:
        """Return gate name -> mask, shape (images, units). The name is the maker's, with `/1` from its second gate on.

        Raises: UsageError: if the model has not run in the block, ran at several widths, or broke off.
        """
        self._width_index()
        found = {}
        for gates, record in self._records.items():
            if not record:
                raise UsageError(f"the gate of {gates.name} has decided nothing: run the model in `with gated(model)`")
            found[gates.name] = torch.cat([decision.mask for decision in record if decision.mask is not None])
        if len({len(mask) for mask in found.values()}) > 1:
            counts = ", ".join(f"{name} {len(mask)}" for name, mask in found.items())
            why = "a forward was broken off, so use a new `with` block, or at this image size some layers see windows"
            raise UsageError(f"the gates have decided for different numbers of images ({counts}): {why}")
        return found

    def layer_macs(self, input_size: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        """Return layer -> its multiply-adds for each image, float64, shape (images,).

        They cover convolutions and matrix products of open channels, as `profile` counts them; a gate's own are under
        its name and `.channel_gate`. `input_size` is one image's, such as (3, 224, 224), by default the example's.

        Raises: UsageError: as `masks`; also if the model has run on images of another size.
        """
        masks = {name: mask.double() for name, mask in self.masks().items()}
        found, macs, counts = self._plan(input_size)
        by_group = {gate.group: masks[gate.name] for gate in found.gates}
        layers = macs.by_layer(by_group, counts)
        for gates in self._records:
            own = gates.module_at(self._width_index())
            cost = own.macs if isinstance(own, ChannelGate) else 0
            layers[f"{gates.name}.{GATE}"] = masks[gates.name].new_full((len(masks[gates.name]),), cost)
        return layers

    def macs(self, input_size: tuple[int, ...] | None = None) -> Tensor:
        """Return the multiply-adds of each image, with the gates: shape (images,), float64; else as `layer_macs`."""
        return torch.stack(list(self.layer_macs(input_size).values())).sum(0)

    def dense_macs(self, input_size: tuple[int, ...] | None = None) -> float:
        """Return the multiply-adds of one image in the dense pass, at the width at which the model has run."""
        _, macs, counts = self._plan(input_size)
        return macs.total(counts)

    def share(self, input_size: tuple[int, ...] | None = None) -> Tensor:
        """Return the multiply-adds of each image as a share of the dense pass's: shape (images,)."""
        return self.macs(input_size) / self.dense_macs(input_size)

    def _width_index(self) -> int:
        """Return the index of the width at which the model has run, or of the active one if it has not."""
        found = {decision.index for record in self._records.values() for decision in record}
        if len(found) > 1:
            raise UsageError("the model has run at several widths; give each a `with gated(model)` block of its own")
        return found.pop() if found else next(iter(self._records))._slim.index

    def _plan(self, input_size: tuple[int, ...] | None) -> tuple[GatePlan, LayerMacs, tuple[int, ...]]:
        """Return the gate plan, the multiply-adds for images of a size, and the units that the width keeps."""
        if self._root is None:
            raise UsageError("multiply-adds are known only for the model that gate returned; this is a part of it")
        found: GatePlan = self._root.__dict__[PLAN]
        macs = found.macs
        if input_size is not None:
            if not is_size(input_size) or not input_size:
                raise UsageError(f"input_size must be the size of one image, such as (3, 224, 224), got {input_size!r}")
            size = tuple(input_size)
            if size not in self._sizes:
                self._sizes[size] = macs_for(self._root, found, image_batch(self._root, size, images=1))
            macs = self._sizes[size]
        for gates, record in self._records.items():
            expected = macs.positions[gates.name.partition("/")[0]]
            for positions in {decision.positions for decision in record} - {expected}:
                what = f"has read {positions} positions, but would read {expected} for the counted size"
                raise UsageError(f"{gates.name} {what}; give the input_size that the model has run on")
        return found, macs, found.plan.columns[self._width_index()].counts


@contextmanager
def gated(model: nn.Module) -> Iterator[GatedPass]:
    """Run a block with the gates on, and yield the record of their decisions; the previous pass is restored afterwards.

    In training mode the gates decide with noise, in eval mode without; untrained gates give a warning in eval mode.
    `model` may be wrapped. A copy made inside the block stays gated, so make copies outside.

    Raises: UsageError: if the model has no gates, or holds several gated models.

    >>> import torch, slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> with gated(model) as run:
    ...     scores = model(torch.randn(3, 4))
    >>> run.macs().shape, run.dense_macs()
    (torch.Size([3]), 352.0)
    """
    gates = gates_of("gated", model)
    roots = {path: module for path, module in model.named_modules() if PLAN in module.__dict__}
    if len(roots) > 1:
        held = f"{len(roots)} gated models, {', '.join(roots)}"
        raise UsageError(f"gated: this {type(model).__name__} holds {held}; give each a `with gated(...)` of its own")
    first = gates[0].at[0]
    if isinstance(first, ChannelGate) and not first.training:
        batches = first.norm.num_batches_tracked
        if batches is not None and not batches.is_meta and batches == 0:
            name = type(model).__name__
            warnings.warn(f"the gates of this {name} were never trained; what they open is random", stacklevel=3)
    run = GatedPass(next(iter(roots.values()), None), gates)
    undecided = [Decision(record=record) for record in run._records.values()]
    with _during(Pass.GATED, model), switched([(None, each.decision) for each in gates], undecided):
        yield run


def dense(model: nn.Module) -> AbstractContextManager[None]:
    """Run a block with the gates off, even inside `gated`; the previous pass is restored afterwards.

    Raises: UsageError: if the model has no gates.

    >>> import torch, slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> with dense(model):
    ...     torch.equal(model(torch.ones(1, 4)), net(torch.ones(1, 4)))
    True
    """
    gates_of("dense", model)
    return _during(Pass.DENSE, model)


def gates_of(where: str, model: nn.Module) -> list[LayerGates]:
    """Return the gates of a model, of which there must be some."""
    check_module(where, model)
    gates = gates_in(model)
    if not gates:
        raise UsageError(f"{where}: this {type(model).__name__} has no gates; make some with slimmable.gating.gate")
    return gates


def _during(wanted: Pass, model: nn.Module) -> AbstractContextManager[None]:
    passes = [(None, each.active_pass) for each in model.modules() if isinstance(each, (LayerGates, PassNorm))]
    return switched(passes, [wanted] * len(passes))


# -- the losses that keep a gated network to its budget
@checked
def annealed(
    epoch: float, *, start: float = 1.0, end: float = 0.0, alpha: float = 0.02, first_epoch: float = 0
) -> float:
    """Return `end + (start - end) exp(-alpha (epoch - first_epoch))`, which decays from `start` towards `end`.

    Before `first_epoch` it is `start`. With the defaults it is `p` of the bound loss (Krishna et al. 2023).

    >>> annealed(0), round(annealed(50), 4), round(annealed(50, first_epoch=10), 4)
    (1.0, 0.3679, 0.4493)
    """
    check_number("annealed", start=start)
    return end + (start - end) * math.exp(-alpha * max(0.0, epoch - first_epoch))


@checked
def budget_loss(share: Tensor, budget: float, weight: float = 5.0) -> Tensor:
    """Return `weight * (mean share - budget)^2` (Krishna et al. 2023, computational budget).

    `share` holds the multiply-adds of each image as a share of the dense network's, in any shape; `budget`, the target
    mean, is in (0, 1). The weight is the paper's lambda.

    >>> budget_loss(torch.tensor([0.4, 0.6]), budget=0.3)
    tensor(0.2000)
    """
    check_not_negative("budget_loss", weight=weight)
    check_floats("budget_loss", share=share)
    return weight * (share.mean() - budget) ** 2


@checked
def bound_loss(open_fractions: Tensor, budget: float, p: float, weight: float = 1.0) -> Tensor:
    """Return the penalty on gates that open less than `p s` or more than `1 - p + p s` of their units.

    `s` is the square root of the budget, as a layer's cost is proportional to its open inputs times its open outputs.
    As `p` goes from 1 to 0 the bounds widen, so no gate closes or opens for good early on (Krishna et al. 2023).

    Args:
        open_fractions: of shape (gates,), from the function `open_fractions`.
        budget: as for `budget_loss`.
        p: tightness of the bounds, in [0, 1]; see `annealed`.
        weight: the paper's gamma.

    Raises: DataError: if there is no gate.

    >>> bound_loss(torch.tensor([0.1, 0.5, 1.0]), budget=0.25, p=1.0)
    tensor(0.1367)
    """
    check_not_negative("bound_loss", weight=weight)
    check_floats("bound_loss", open_fractions=open_fractions)
    if open_fractions.ndim != 1:
        raise DataError(f"bound_loss: expected one number per gate, shape (gates,), got {tuple(open_fractions.shape)}")
    root = math.sqrt(budget)
    below = torch.relu(p * root - open_fractions)
    above = torch.relu(open_fractions - (1 - p + p * root))
    return weight * (below.square().mean() + above.square().mean())


@checked
def open_fractions(masks: Iterable[Tensor], *, closed_gradient: bool = True) -> Tensor:
    """Return the fraction of units that each gate opens, averaged over the images: shape (gates,).

    Args:
        masks: one of shape (images, units) per gate, zeros and ones.
        closed_gradient: if False, use the L1 norm of the masks, as published. Its gradient is zero at closed units, so
            a loss on it can close units but not open them.

    Raises: DataError: if there is no mask.

    >>> open_fractions([torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.zeros(2, 4)])
    tensor([0.7500, 0.0000])
    """
    masks = list(masks)
    check_floats("open_fractions", **{f"masks[{at}]": mask for at, mask in enumerate(masks)})
    found = [mask.mean() if closed_gradient else mask.abs().mean() for mask in masks]
    if not found:
        raise DataError("open_fractions: there is no mask; run the model in a gated pass first")
    return torch.stack(found)


class GateBudget(nn.Module):
    """Sum of the budget loss and the bound loss of a gated pass; the bounds widen over the epochs.

    With several processes the losses are those of the joined batch; average the gradients. `reached` is the mean share
    of multiply-adds of the last batch, without gradient, None at first, and `reached_at` maps each width to its last.
    The defaults are those of Krishna et al. 2023.

    Args:
        budget: target share of the dense network's multiply-adds, in (0, 1), including the gates.
        budget_weight, bound_weight: weights of the two losses, the paper's lambda and gamma.
        alpha, first_epoch: how fast the bounds widen, and from when on, see `annealed`.
        closed_gradient: as in `open_fractions`.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> model = slimmable.gating.gate(net, example_inputs=torch.zeros(2, 4))
    >>> criterion = GateBudget(0.5)
    >>> with slimmable.gating.gated(model) as run:
    ...     scores = model(torch.randn(8, 4))
    >>> criterion(run, epoch=3).shape
    torch.Size([])
    """

    @checked
    def __init__(
        self,
        budget: float,
        *,
        budget_weight: float = 5.0,
        bound_weight: float = 1.0,
        alpha: float = 0.02,
        first_epoch: float = 0,
        closed_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.budget, self.budget_weight, self.bound_weight = budget, budget_weight, bound_weight
        self.alpha, self.first_epoch, self.closed_gradient = alpha, first_epoch, closed_gradient
        self.reached: Tensor | None = None
        self.reached_at: dict[float, Tensor] = {}

    def forward(self, run: GatedPass, epoch: float) -> Tensor:
        """Return the sum of both losses for a gated pass, a scalar.

        Raises: UsageError: if `run` is not a gated pass, or `epoch` is not a number.
        """
        if not isinstance(run, GatedPass):
            raise UsageError(f"GateBudget: expected the run of `with gated(model) as run`, got {type(run).__name__}")
        p = annealed(epoch, alpha=self.alpha, first_epoch=self.first_epoch)
        own = open_fractions(run.masks().values(), closed_gradient=self.closed_gradient)
        share = gather(run.share())
        width = next(iter(run._records)).widths[run._width_index()]
        self.reached = self.reached_at[width] = share.detach().mean()
        bound = bound_loss(gather(own[None]).mean(0), self.budget, p, self.bound_weight)
        return budget_loss(share, self.budget, self.budget_weight) + bound

    def extra_repr(self) -> str:
        """Return the settings, as in the constructor."""
        weights = f"budget_weight={self.budget_weight}, bound_weight={self.bound_weight}"
        return f"budget={self.budget}, {weights}, alpha={self.alpha}"
