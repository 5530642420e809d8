"""Gates, which decide for each image which units of a layer are open; the dense and the gated pass."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from slimmable._checks import check_floats, check_is_module, check_matrices, check_module, checked
from slimmable._numerics import at_least_float32, widest_float
from slimmable.analysis.plan import Plan
from slimmable.errors import DataError, UsageError
from slimmable.gating._plan import GATE, PLAN, TEMPERATURE, GatePlan, PlannedGate, plan_for
from slimmable.view.norms import SwitchableContainer, SwitchableNorm, copy_of_norm, inner_modules
from slimmable.view.recompute import Active, switch, switched
from slimmable.view.state import Indices

Pass = Enum("Pass", ["DENSE", "GATED"])  # which of the two networks of a gated model runs
_TINY = 1e-8  # keeps the logarithms of the noise finite


@checked
def hard_mask(
    logits: Tensor, uniform: Tensor | None = None, temperature: float = TEMPERATURE, *, open_at_zero: bool = False
) -> Tensor:
    """Return a mask: 1 where a unit is open, 0 where it is closed; all tensors have one shape.

    With noise `uniform`, u in [0, 1), a unit is open if `soft = sigmoid((logits + log u - log(1 - u)) / temperature)`
    is at least 0.5, with the gradient of `soft` (straight-through). Without it, positive logits are open, and 0 with
    `open_at_zero`, and there is no gradient. Source: the binary Gumbel-softmax of Krishna et al. 2023.

    >>> hard_mask(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 1.])
    >>> hard_mask(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.9, 0.4, 0.5]))
    tensor([1., 0., 1.])
    """
    check_floats("hard_mask", logits=logits, uniform=logits if uniform is None else uniform)
    if uniform is None:
        return (logits >= 0 if open_at_zero else logits > 0).to(logits.dtype)
    if uniform.shape != logits.shape:
        raise DataError(f"hard_mask: uniform has shape {tuple(uniform.shape)}, logits {tuple(logits.shape)}")
    noise = torch.log(uniform + _TINY) - torch.log(1 - uniform + _TINY)
    soft = torch.sigmoid((logits + noise) / temperature)
    return (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())


class ChannelGate(nn.Module):
    """Decides for each image which of a layer's units are open.

    A linear layer to a quarter of the channels, BatchNorm, ReLU, and a linear layer to one logit per unit, with noise
    in training mode (see `hard_mask`). Units open where logits, in at least float32, exceed the buffer `threshold`.
    Without `bias`, all logits are 0 for an image without active hidden units.
    Shapes: (images, channels), averaged over positions -> (images, units), zeros and ones.
    Source: Krishna et al. 2023, whose gates have no bias.

    >>> gate = ChannelGate(16, 24).eval()
    >>> gate(torch.randn(2, 16)).shape, gate.macs
    (torch.Size([2, 24]), 160)
    """

    threshold: Tensor

    @checked
    def __init__(
        self,
        channels: int,
        units: int,
        *,
        temperature: float = TEMPERATURE,
        open_at_zero: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden = max(1, channels // 4)
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.expand = nn.Linear(hidden, units, bias=bias)
        for linear in (self.reduce, self.expand):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        if self.expand.bias is not None:
            nn.init.zeros_(self.expand.bias)
        self.temperature, self.open_at_zero = temperature, open_at_zero
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def macs(self) -> int:
        """Multiply-adds per image."""
        return self.reduce.weight.numel() + self.expand.weight.numel()

    @checked
    def logits(self, pooled: Tensor) -> Tensor:
        """Return one logit per unit: (images, channels) -> (images, units)."""
        if not getattr(pooled, "is_meta", False):  # where a forward only finds shapes
            check_matrices("ChannelGate", pooled=pooled)
        return cast(Tensor, self.expand(torch.relu(self.norm(self.reduce(pooled)))))

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the mask."""
        logits = at_least_float32(self.logits(pooled)) - self.threshold
        noise = torch.rand_like(logits) if self.training else None
        return hard_mask(logits, noise, self.temperature, open_at_zero=self.open_at_zero)


@dataclass(frozen=True, eq=False)
class Decision:  # of a gate, in one forward
    mask: Tensor | None = None  # of shape (images, units); None before the gate has decided
    positions: tuple[int, ...] = ()  # shape of the layer's input without its image and channel axes
    index: int = 0  # of the width
    record: "list[Decision] | None" = None  # of those in the same `gated` block


class LayerGates(SwitchableContainer):
    """The gates of one group of units, one per width, and their decision in the current forward.

    In the state dict they are `channel_gate.at.0` (full width), `.1` and so on, and `channel_gate_1` for a second group
    of the same layer. Any module that maps pooled (images, channels) to a mask (images, units) can be a gate.
    """

    def __init__(self, planned: PlannedGate, plan: Plan, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__(plan.widths)
        self.name, self.axis = planned.name, planned.axis
        self.reader_axes = [reader.axis for reader in planned.readers]
        self.active_pass, self.decision = Active(Pass.DENSE), Active(Decision())
        self.at = nn.ModuleList()
        self._units: dict[tuple[int, int], Indices] = {}  # reader's number and width's index -> unit at each position,
        grouping = plan.channels.needed.grouping  # unless in order; the first of the mask, unit -1, is always open
        for index, column in enumerate(plan.columns):
            counts = np.array([*column.counts, 1])
            self.at.append(make(grouping.count(counts, planned.channels), column.counts[planned.group]))
            for number, reader in enumerate(planned.readers):
                units = reader.units[grouping.mask(counts, reader.ids)].tolist()
                if units != list(range(len(units))):
                    self._units[number, index] = Indices([unit + 1 for unit in units])

    def module_at(self, index: int) -> nn.Module:
        return _in_gated_pass(self, "at", index)

    @property
    def idle(self) -> bool:  # in the dense pass
        return self.active_pass.active is Pass.DENSE

    def own_at(self, index: int) -> nn.Module:
        """Return the whole, which `ungate` then removes, since extracted networks have no gates."""
        return self

    def decide(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the layer that makes the units: decide from its input, and keep the mask for those that read them."""
        if self.idle:
            return
        source: Tensor = args[0]
        others = [axis for axis in range(1, source.ndim) if axis != self.axis % source.ndim]
        mask = self.module_at(self._slim.index)(source.mean(others) if others else source)
        record = self.decision.active.record
        decision = Decision(mask, tuple(source.shape[axis] for axis in others), self._slim.index, record)
        is_repeated = switch([(self.decision, decision)])
        if record is not None and not is_repeated:
            record.append(decision)

    def mask(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before a reader, given by its number: return its arguments, with closed units set to zero."""
        source, *more = args
        if self.idle:
            return self.linked(source), *more
        mask = self.decision.active.mask
        if mask is None or len(mask) != len(source):
            found = "not decided" if mask is None else f"decided for {len(mask)} images, not {len(source)}"
            raise UsageError(f"a layer reads {self.name}, but its gate has {found}; run the whole model gated")
        units = self._units.get((number, self._slim.index))
        if units is not None:
            mask = torch.cat([mask.new_ones(len(mask), 1), mask], 1).index_select(1, units.on(mask.device))
        shape = [1] * source.ndim
        shape[0], shape[self.reader_axes[number]] = mask.shape
        return self.linked(source * mask.to(source.dtype).view(shape)), *more

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of a running forward."""
        return {**self.__dict__, "decision": Active(Decision())}


def _in_gated_pass(container: SwitchableContainer, name: str, index: int) -> nn.Module:
    """Return the module that a gated pass runs at the width with this index, from a list in a container."""
    modules = inner_modules(container, name)
    if str(index) not in modules:
        widths, active = container.widths[: len(modules)], container._slim.active.width
        raise UsageError(f"gates are for the widths {widths}, not for the active {active}; set one, or run dense")
    return modules[str(index)]


def gates_in(model: nn.Module) -> list[LayerGates]:
    return [module for module in model.modules() if isinstance(module, LayerGates)]


def has_gates(model: nn.Module) -> bool:
    """Return whether a model has gates."""
    check_is_module("has_gates", model)
    return bool(gates_in(model))


# -- the two passes
class PassNorm(SwitchableNorm):
    """A `SwitchableNorm` with further norms for the gated pass, one per width: `gated.0` and so on in the state dict.

    A checkpoint without them loads into the norms of both passes. Source: Krishna et al. 2023.
    """

    active_pass: Active[Pass]
    gated: nn.ModuleList
    _lists: ClassVar[dict[str, int]] = {"narrow": 1, "gated": 0}

    @staticmethod
    def of(norm: nn.Module, widths: int) -> "PassNorm":
        """Give copies for the gated pass to the first `widths` of a norm, which is put inside a new one if plain."""
        own = norm if isinstance(norm, SwitchableNorm) else SwitchableNorm(norm, (1.0,), (None,))
        copies = [copy_of_norm(own.own_at(index)) for index in range(min(widths, 1 + len(own.narrow)))]
        vars(own).update(inside=own is not norm, active_pass=Active(Pass.DENSE))
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
        if self.active_pass.active is Pass.DENSE:
            return super().module_at(index)
        return _in_gated_pass(self, "gated", index)


class GatedPass:
    """The gates' decisions in the forwards of one `with gated(model) as run:` block.

    The images of several forwards, at one width, are concatenated. All results keep their gradient; forwards inside
    `torch.utils.checkpoint.checkpoint` need `use_reentrant=False` for that.
    """

    def __init__(self, plan: GatePlan | None, gates: list[LayerGates]) -> None:
        self._plan = plan  # that of the model, if `gate` returned it, for images of the size that it runs on
        self._records: dict[LayerGates, list[Decision]] = {each: [] for each in gates}

    def masks(self) -> dict[str, Tensor]:
        """Return gate name, the maker's with `/1` from its second gate on -> mask, shape (images, units).

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

    def layer_macs(self) -> dict[str, Tensor]:
        """Return layer -> its multiply-adds for each image, shape (images,), float64 or float32 as the device can.

        They are those of open channels, as `profile` counts them; a gate's own are under its name and `.channel_gate`.
        Raises: UsageError: as `masks`; also if the model has run on images of another size than `gated` was told.
        """
        masks = {name: mask.to(widest_float(mask.device)) for name, mask in self.masks().items()}
        plan, counts = self._costs()
        layers = plan.macs.by_layer({gate.group: masks[gate.name] for gate in plan.gates}, counts)
        for gates in self._records:
            cost = getattr(gates.module_at(self._width_index()), "macs", 0)
            layers[f"{gates.name}.{GATE}"] = masks[gates.name].new_full((len(masks[gates.name]),), cost)
        return layers

    def macs(self) -> Tensor:
        """Return the multiply-adds of each image, with the gates: shape (images,); else as `layer_macs`."""
        return torch.stack(list(self.layer_macs().values())).sum(0)

    def dense_macs(self) -> float:
        """Return the multiply-adds of one image in the dense pass, at the width at which the model has run."""
        plan, counts = self._costs()
        return plan.macs.total(counts)

    def share(self) -> Tensor:
        """Return the multiply-adds of each image as a share of the dense pass's: shape (images,)."""
        return self.macs() / self.dense_macs()

    def _width_index(self) -> int:
        """Return the index of the width at which the model has run, or of the active one if it has not."""
        found = {decision.index for record in self._records.values() for decision in record}
        if len(found) > 1:
            raise UsageError("the model has run at several widths; give each a `with gated(model)` block of its own")
        return found.pop() if found else next(iter(self._records))._slim.index

    def _costs(self) -> tuple[GatePlan, tuple[int, ...]]:
        """Return the gate plan, which has the multiply-adds, and the units that the width keeps."""
        if self._plan is None:
            raise UsageError("multiply-adds are known only for the model that gate returned; this is a part of it")
        for gates, record in self._records.items():
            expected = self._plan.macs.positions[gates.name.partition("/")[0]]
            for positions in {decision.positions for decision in record} - {expected}:
                what = f"has read {positions} positions, but would read {expected}"
                raise UsageError(f"{gates.name} {what}; give gated the input_size that the model runs on")
        return self._plan, self._plan.plan.columns[self._width_index()].counts


@contextmanager
def gated(model: nn.Module, input_size: tuple[int, ...] | None = None) -> Iterator[GatedPass]:
    """Run a block with the gates on, and yield the record of their decisions; the previous pass is restored afterwards.

    In training mode the gates decide with noise, in eval mode without; untrained gates give a warning in eval mode.
    `model` may be wrapped. A copy made inside the block stays gated, so make copies outside. Multiply-adds are counted
    for images of `input_size`, such as (3, 224, 224), by default that of the example.
    Raises: UsageError: if the model has no gates, or holds several gated models, or `input_size` is no size.

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
        held = f"this {type(model).__name__} holds {len(roots)} gated models, {', '.join(roots)}"
        raise UsageError(f"gated: {held}; give each a `with gated(...)` of its own")
    first = gates[0].at[0]
    if isinstance(first, ChannelGate) and not first.training:
        batches = first.norm.num_batches_tracked
        if batches is not None and not batches.is_meta and batches == 0:
            warnings.warn("the gates of this model were never trained; what they open is random", stacklevel=3)
    run = GatedPass(next((plan_for(root, input_size) for root in roots.values()), None), gates)
    undecided = [(each.decision, Decision(record=record)) for each, record in run._records.items()]
    with _during(Pass.GATED, model), switched(undecided):
        yield run


def dense(model: nn.Module) -> AbstractContextManager[None]:
    """Run a block with the gates off, even inside `gated`; the previous pass is restored afterwards.

    Raises: UsageError: if the model has no gates.

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
    if gates := gates_in(model):
        return gates
    raise UsageError(f"{where}: this {type(model).__name__} has no gates; make some with slimmable.gating.gate")


def _during(wanted: Pass, model: nn.Module) -> AbstractContextManager[None]:
    having = (each for each in model.modules() if isinstance(each, (LayerGates, PassNorm)))
    return switched([(each.active_pass, wanted) for each in having])
