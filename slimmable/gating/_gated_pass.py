"""What a gated pass has decided, and what that costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimmable._inputs import image_batch
from slimmable.errors import UsageError
from slimmable.gating._costs import Costs
from slimmable.gating._find import GatePlan, costs_for
from slimmable.gating._gate import ChannelGate
from slimmable.gating._layer_gates import Decision
from slimmable.gating._parts import GATE, PLAN, LayerGates


class GatedPass:
    """What the gates have decided in the forwards of one `with gated(model) as run:` block.

    Images of several forwards, at one width, stand one behind the other. All results keep their gradient; a forward in
    `torch.utils.checkpoint.checkpoint` has none with `use_reentrant=True`, so give it `use_reentrant=False`.
    """

    def __init__(self, model: nn.Module, gates: list[LayerGates]) -> None:
        self._model = model
        self._seen: dict[LayerGates, list[Decision]] = {each: [] for each in gates}
        self._sizes: dict[tuple[int, ...], Costs] = {}

    def masks(self) -> dict[str, Tensor]:
        """Return for each gate, by the name of the layer that makes its units, its mask: shape (images, units).

        A layer that makes several groups has `/1` and so on behind its name, from the second one on.

        Raises: UsageError: if the model has not run in the block, or at several widths, or not to its end.
        """
        self._index()
        if not all(self._seen.values()):
            idle = next(gates.name for gates, seen in self._seen.items() if not seen)
            raise UsageError(f"the gate of {idle} has decided nothing: run the model inside `with gated(model)`")
        found = {
            gates.name: torch.cat([each.mask for each in seen if each.mask is not None])
            for gates, seen in self._seen.items()
        }
        if len({len(mask) for mask in found.values()}) > 1:
            counts = ", ".join(f"{name} {len(mask)}" for name, mask in found.items())
            raise UsageError(
                f"the gates have decided for different numbers of images ({counts}): a forward was broken off, which "
                "takes a new `with gated(model)` block, or at this image size some layers see windows and not images"
            )
        return found

    def layer_macs(self, input_size: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        """Return layer -> its multiply-adds for each image, in float64, shape (images,).

        The sum is that of convolutions and matrix products of the network with the open channels alone, as `profile`
        counts it. The cost of a gate is under the name of its layer with `.channel_gate` behind it.

        Args:
            input_size: of one image, such as (3, 224, 224); None for the size of the example that `gate` had.

        Raises: UsageError: if the model has not run in the block, or on another size.
        """
        masks = self.masks()
        found, costs = self._costs(input_size)
        group_of = {gate.name: gate.group for gate in found.gates}
        index = self._index()
        counts = found.plan.columns[index].counts
        doubles = {name: mask.double() for name, mask in masks.items()}
        some = next(iter(doubles.values()))
        layers = costs.layers({group_of[name]: mask for name, mask in doubles.items()}, counts)

        def of_each_image(cost: Tensor | float) -> Tensor:
            return cost if isinstance(cost, Tensor) else some.new_full(some.shape[:1], cost)

        macs = {path: of_each_image(cost) for path, cost in layers.items()}
        for each in self._seen:
            own = each.module_at(index)
            cost = own.macs if isinstance(own, ChannelGate) else 0
            macs[f"{each.name}.{GATE}"] = of_each_image(cost)
        return macs

    def macs(self, input_size: tuple[int, ...] | None = None) -> Tensor:
        """Return the multiply-adds of each image, the gates' own included: shape (images,), float64.

        Args and errors: as `layer_macs`.
        """
        return torch.stack(list(self.layer_macs(input_size).values())).sum(0)

    def dense_macs(self, input_size: tuple[int, ...] | None = None) -> float:
        """Return the multiply-adds of an image in the dense pass, at the width that the model has run at."""
        found, costs = self._costs(input_size)
        counts = found.plan.columns[self._index()].counts
        return float(sum(costs.layers({}, counts).values()))

    def share(self, input_size: tuple[int, ...] | None = None) -> Tensor:
        """Return the multiply-adds of each image over those of the dense pass: shape (images,)."""
        return self.macs(input_size) / self.dense_macs(input_size)

    def _index(self) -> int:
        """Return the index of the width that the model has run at; before it has, of the active one."""
        found = {each.index for seen in self._seen.values() for each in seen}
        if len(found) > 1:
            raise UsageError("the model has run at several widths; give each a `with gated(model)` block of its own")
        return found.pop() if found else next(iter(self._seen))._slim.index

    def _costs(self, input_size: tuple[int, ...] | None) -> tuple[GatePlan, Costs]:
        root = next((module for module in self._model.modules() if PLAN in module.__dict__), None)
        if root is None:
            raise UsageError("multiply-adds are those of the model that gate was given; this is a part of it")
        found: GatePlan = root.__dict__[PLAN]
        if input_size is None:
            costs = found.costs
        else:
            if not isinstance(input_size, (tuple, list)):
                raise UsageError(f"input_size is the size of one image, such as (3, 224, 224), got {input_size!r}")
            key = tuple(input_size)
            if key not in self._sizes:
                self._sizes[key] = costs_for(root, found, image_batch(root, key, images=1))
            costs = self._sizes[key]
        for gates, seen in self._seen.items():
            expected = costs.positions[gates.name.partition("/")[0]]
            for positions in {each.positions for each in seen}:
                if positions != expected:
                    raise UsageError(
                        f"{gates.name} has read {positions} positions, but for the size to be counted it reads "
                        f"{expected}; give the input_size that the model has run on"
                    )
        return found, costs
