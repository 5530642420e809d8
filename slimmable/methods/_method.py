"""What all methods have in common: one training step, at one width after the other."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimmable._inputs import check_module
from slimmable._width import places_of, set_width
from slimmable.errors import DivergedError, UsageError
from slimmable.gating import GateBudget, dense, gated, has_gates
from slimmable.losses import OnlineDistillation
from slimmable.losses._cosines import at_least_float32
from slimmable.methods._batch import Batch, Outcome, check_batch
from slimmable.training._processes import alone, world_size
from slimmable.training.diagnostics import GradientDiagnostics
from slimmable.training.distributed import synchronised_batchnorm
from slimmable.training.recipe import SlimRecipe


class Method(nn.Module):
    """A training method around a converted encoder; subclasses say what happens once per step, and at each width.

    With several processes, each sees its own part of the batch; a step, followed by `average_gradients`, gives the
    gradients of one process that sees all, with the BatchNorm statistics of all.

    Args:
        encoder: an `Encoder`, converted; images in, embeddings (for `Supervised`: scores) out.

    Raises: UsageError: if `encoder` is no module.
    """

    views: ClassVar[int] = 2
    """How many views of each image a step takes."""

    two_passes: ClassVar[bool] = True
    """Whether the encoder sees more than one view, so that one can be the gated network's; see `step`."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        check_module(type(self).__name__, encoder)
        self.encoder = encoder

    @property
    def online(self) -> nn.ModuleList:
        """What is trained and changes its width; goes into `SlimRecipe` and, by its parameters, the optimizer."""
        return nn.ModuleList([self.encoder])

    @property
    def backbone(self) -> nn.Module:
        """What is kept after the training: the encoder without its head.

        Raises: UsageError: if the encoder has no part of this name.
        """
        kept = getattr(self.encoder, "backbone", None)
        if not isinstance(kept, nn.Module):
            raise UsageError(
                f"{type(self).__name__}.backbone: the encoder, {type(self.encoder).__name__}, has no module of this "
                "name; make it a slimmable.methods.Encoder"
            )
        return kept

    @staticmethod
    @abstractmethod
    def distillation() -> OnlineDistillation:
        """Return the distillation that suits this method's outputs."""

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Do what happens once per step, at the full width and without gradients; the result is `batch.targets`."""
        return ()

    @abstractmethod
    def forward(self, batch: Batch) -> Outcome:
        """Return the loss of the active width, and what distillation compares."""

    def embed(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Return the encoder's embeddings of each view; in a gated pass the dense network sees all but the first."""
        first = self.encoder(views[0])
        with dense(self.encoder) if has_gates(self.encoder) else nullcontext():
            return [first, *(self.encoder(view) for view in views[1:])]

    def finish(self, batch: Batch) -> None:
        """Do what follows the last `backward` of a step."""

    def step(
        self,
        recipe: SlimRecipe,
        batch: Batch,
        progress: float,
        *,
        number: int | None = None,
        autocast: torch.dtype | None = None,
        diagnostics: GradientDiagnostics | None = None,
        gates: GateBudget | None = None,
    ) -> dict[float, float]:
        """Add up the gradients of one training step over its widths; return width -> loss, the widest first.

        Clear the gradients before; average them over processes, if there are several, and step the optimizer after.
        When an error passes, the width is 1.0, but widths that ran have left gradients and BatchNorm statistics, and a
        momentum encoder has moved.

        Args:
            recipe: made of `online`.
            batch: views, and labels for methods that look at them.
            progress: share of the training done, in [0, 1].
            number: of this step, see `SlimRecipe.widths`.
            autocast: type of mixed precision, `torch.bfloat16`, or None. Losses are not scaled, as float16 needs.
            diagnostics: told of every `backward`, and to `discard` what it has when an error passes.
            gates: with it the first view is the gated network's, the second the dense one's (Krishna et al. 2023), and
                its losses count too; `progress` is the epoch that it is given, so its `alpha` is that of the whole
                training. Without it gates are off.

        Raises:
            DivergedError: before its `backward`, if a loss is not finite.
            UsageError: if the recipe is of another model, the batch has the wrong number of views, or `gates` is given
                for an encoder without gates, for a method whose encoder sees one view, or with `random_widths`.
            DataError: if views are not tensors with one entry for each image.
        """
        self._check(recipe, batch, autocast, gates)
        set_width(self, 1.0)  # also what only `prepare` runs
        losses = {}
        device = batch.views[0].device.type
        with _left_clean(batch, diagnostics):
            for width in recipe.widths(progress, number):
                if recipe.first:
                    with torch.no_grad(), torch.autocast(device, autocast, enabled=autocast is not None):
                        batch.targets = self.prepare(batch, progress)
                with synchronised_batchnorm():
                    with torch.autocast(device, autocast, enabled=autocast is not None):
                        with nullcontext() if gates is None else gated(self.encoder) as run:
                            outcome = self(batch)
                        loss = outcome.loss if gates is None or run is None else outcome.loss + gates(run, progress)
                        loss = recipe.loss(loss, self._teach(outcome, recipe.distill))
                    losses[width], weighted = _means_of_processes(outcome.loss, loss)
                    if not math.isfinite(losses[width]):
                        raise DivergedError(f"the loss is {losses[width]} at width {width:g}")
                    if not math.isfinite(weighted):
                        raise DivergedError(f"the loss with distillation is {weighted} at width {width:g}")
                    loss.backward()  # type: ignore[no-untyped-call]
                del outcome, loss, run  # or they would be there while the next width runs
                if diagnostics is not None:
                    diagnostics.after_backward(width)
            self.finish(batch)
        return losses

    def _check(self, recipe: SlimRecipe, batch: Batch, autocast: torch.dtype | None, gates: GateBudget | None) -> None:
        """Refuse what a step cannot work with, before anything changes."""
        name = type(self).__name__
        if not isinstance(recipe, SlimRecipe):
            raise UsageError(
                f"{name}.step: recipe must be a SlimRecipe(method.online, ...), got {type(recipe).__name__}"
            )
        switched = {id(module) for module, _ in places_of(recipe.model)}
        if not switched.issuperset(id(module) for module, _ in places_of(self.online)):
            raise UsageError(
                f"{name}.step: the recipe switches the widths of another model, or of a part of this one; "
                "make it of `online`: SlimRecipe(method.online, ...)"
            )
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise UsageError(f"{name}.step: autocast must be a type such as torch.bfloat16, or None, got {autocast!r}")
        if gates is not None:
            if not self.two_passes:
                raise UsageError(
                    f"{name}.step: its encoder sees one view, but gates are trained with one for each of two passes; "
                    "choose SimCLR, VICReg, BYOL or MoCoV3, or run both passes in a loop of your own"
                )
            if not isinstance(gates, GateBudget):
                raise UsageError(f"{name}.step: gates must be a GateBudget or None, got {type(gates).__name__}")
            if not has_gates(self.encoder):
                raise UsageError(f"{name}.step: the encoder has no gates; make some with slimmable.gating.gate")
            if recipe.random_widths:
                raise UsageError(
                    f"{name}.step: the recipe has random_widths, but gates are for the widths that slimify was given; "
                    "make it without them"
                )
        check_batch(name, batch, self.views)

    def _teach(self, outcome: Outcome, distill: OnlineDistillation | None) -> Sequence[Tensor] | None:
        if distill is None:
            return None
        kind = "embeddings" if distill.kind in ("embedding", "mse") else "logits"
        found: Sequence[Tensor] = getattr(outcome, kind)
        if not found:
            raise UsageError(
                f"{type(self).__name__} has no {kind}, which distillation of kind {distill.kind!r} compares; its own "
                f"is {self.distillation().kind!r}"
            )
        return found


@contextmanager
def _left_clean(batch: Batch, diagnostics: GradientDiagnostics | None) -> Iterator[None]:
    """Leave nothing of a step in the batch, and nothing of a step that was broken off in the diagnostics."""
    try:
        yield
    except BaseException:
        if diagnostics is not None:
            diagnostics.discard()
        raise
    finally:
        batch.targets = ()


def _means_of_processes(*values: Tensor) -> list[float]:
    """Return the means, so that all processes see the same, also if one of them has no number."""
    means = torch.stack([at_least_float32(value.detach()).reshape(()) for value in values])
    if not alone(None):
        dist.all_reduce(means)
        means /= world_size()
    found: list[float] = means.tolist()
    return found
