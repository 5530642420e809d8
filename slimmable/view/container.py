"""Switchable containers, which hold one real module per width and run that of the active width."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel

from slimmable._distributed import alone, check_same_widths, in_group, note_width
from slimmable._widths import check_widths
from slimmable.view.state import Column, HasWidths, WidthState

_COMPARED = 8  # forwards with DistributedDataParallel in which a container compares widths


class SwitchableContainer(HasWidths):
    """One real module per width; see `SwitchableNorm` and `SwitchableProbe`."""

    _static_graph = False  # of the DistributedDataParallel around it
    _compared = 0  # forwards before whose backward the processes have compared their widths

    def __init__(self, widths: Iterable[float]) -> None:
        super().__init__()
        self.__dict__["_slim"] = WidthState(map(Column, check_widths(widths)))

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths, from the widest to the narrowest."""
        return self._slim.numbers

    @property
    def width(self) -> float:
        """The active width."""
        return cast(float, self._slim.active.width)

    def module_at(self, index: int) -> nn.Module:
        """Return the module of the width with this index; 0 is the full width."""
        raise NotImplementedError

    def own_at(self, index: int) -> nn.Module:
        """Return the module of the width with this index, or a copy if it shares tensors with others."""
        return self.module_at(index)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module of the active width."""
        return self.linked(self.module_at(self._slim.index)(*args, **kwargs))

    def linked(self, output: Any) -> Any:
        """Return `output`; with a process group, its graph then has the idle modules' parameters too, unused.

        DistributedDataParallel waits for the gradient of every parameter; that of an idle one counts as zero there.
        """
        if not in_group() or not isinstance(output, Tensor):
            return output
        wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is not None:  # None in the forwards that checkpointing repeats
            self._static_graph = wrapper.static_graph
        if not torch.is_grad_enabled():
            return output
        linked: Tensor = _Linked.apply(output, self._static_graph, *self.parameters())
        if not is_compiling() and linked.requires_grad and not alone():
            self._compare(wrapper, linked)
        return linked

    def _compare(self, wrapper: DistributedDataParallel | None, output: Tensor) -> None:
        """Let the processes notice that they train at different widths: now, or when they average gradients."""
        width = str(self._slim.active.width)
        output.register_hook(lambda grad: note_width(self, width))  # type: ignore[no-untyped-call]
        averages = wrapper is not None and wrapper.training and wrapper.require_backward_grad_sync
        if wrapper is not None and averages and self._compared < _COMPARED and not wrapper._join_config.enable:
            self._compared += 1
            check_same_widths("DistributedDataParallel", width, output.device, wrapper.process_group)

    def extra_repr(self) -> str:
        """Return the widths and the active one."""
        return f"widths={self.widths}, width={self.width}"


class _Linked(Function):
    """The identity, whose backward reaches further tensors without a gradient for them.

    Or with zeros: what has no gradient in its first step, a static graph never reduces.
    """

    @staticmethod
    def forward(output: Tensor, zeros: bool, *idle: Tensor) -> Tensor:
        return output.detach()  # not a view for autograd, so it may be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, zeros, *idle = inputs
        ctx.count = len(idle)
        ctx.save_for_backward(*idle if zeros else ())
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        missing: list[Tensor | None] = [None] * ctx.count
        return grad, None, *([torch.zeros_like(idle) for idle in ctx.saved_tensors] or missing)


def inner_modules(container: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the modules of a list inside a container, faster than through attribute access."""
    return cast("dict[str, nn.Module]", container._modules[name]._modules)  # type: ignore[union-attr]
