"""What all methods have in common: one training step, at one width after the other."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimmable._errors import DivergedError, UsageError
from slimmable.losses import OnlineDistillation
from slimmable.losses._cosines import at_least_float32
from slimmable.methods._encoder import Encoder
from slimmable.training.diagnostics import GradientDiagnostics
from slimmable.training.distributed import synchronised_batchnorm
from slimmable.training.recipe import SlimRecipe


@dataclass
class Outcome:
    """What a method makes of a batch at one width.

    `loss` is the scalar of the method; `logits` and `embeddings` are what the distillation can compare between widths,
    each entry of shape (rows, classes), one for each direction or view.
    """

    loss: Tensor
    logits: Sequence[Tensor] = ()
    embeddings: Sequence[Tensor] = ()


@dataclass
class Batch:
    """The views of a batch of images, each of shape (batch, channels, height, width), and labels where they count."""

    views: Sequence[Tensor]
    labels: Tensor | None = None
    targets: Sequence[Tensor] = field(default=())  # what `prepare` found, once for all widths


class Method(nn.Module):
    """A training method around a converted encoder; subclasses say what happens once per step, and at each width.

    With several processes, each sees its own part of the batch; a step, followed by `average_gradients`, gives the
    gradients of one process that sees all, with the BatchNorm statistics of all.

    Args:
        encoder: an `Encoder`, converted; images in, embeddings (for `Supervised`: scores) out.
    """

    views: ClassVar[int] = 2
    """How many views of each image a step takes."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def online(self) -> nn.ModuleList:
        """What is trained and changes its width; goes into `SlimRecipe` and, by its parameters, the optimizer."""
        return nn.ModuleList([self.encoder])

    @property
    def backbone(self) -> nn.Module:
        """What is kept after the training: the encoder without its head."""
        return cast(Encoder, self.encoder).backbone

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
    ) -> dict[float, float]:
        """Add up the gradients of one training step over its widths; return width -> loss, the widest first.

        Clear the gradients before; average them over processes, if there are several, and step the optimizer after.

        Args:
            recipe: made of `online`.
            batch: views, and labels for methods that look at them.
            progress: share of the training done, in [0, 1].
            number: of this step, see `SlimRecipe.widths`.
            autocast: type of mixed precision, such as `torch.bfloat16`, or None.
            diagnostics: told of every `backward`.

        Raises:
            DivergedError: before its `backward`, if a loss is not finite.
            UsageError: if the batch has the wrong number of views.
        """
        if len(batch.views) != self.views:
            raise UsageError(f"{type(self).__name__}: takes {self.views} views of each image, got {len(batch.views)}")
        losses = {}
        device = batch.views[0].device.type
        for width in recipe.widths(progress, number):
            if recipe.first:
                with torch.no_grad(), torch.autocast(device, autocast, enabled=autocast is not None):
                    batch.targets = self.prepare(batch, progress)
            with synchronised_batchnorm():
                with torch.autocast(device, autocast, enabled=autocast is not None):
                    outcome = self(batch)
                    loss = recipe.loss(outcome.loss, self._teach(outcome, recipe.distill))
                losses[width] = _mean_of_processes(outcome.loss)
                if not math.isfinite(losses[width]):
                    raise DivergedError(f"the loss is {losses[width]} at width {width:g}")
                loss.backward()  # type: ignore[no-untyped-call]
            if diagnostics is not None:
                diagnostics.after_backward(width)
        self.finish(batch)
        return losses

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


def _mean_of_processes(value: Tensor) -> float:
    """Return the mean, so that all processes see the same, also if one of them has no number."""
    value = at_least_float32(value.detach()).clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def checked_labels(method: Method, batch: Batch) -> Tensor:
    """Return the labels.

    Raises: UsageError: if there are none.
    """
    if batch.labels is None:
        raise UsageError(f"{type(method).__name__} learns from labels; give the batch some")
    return batch.labels
