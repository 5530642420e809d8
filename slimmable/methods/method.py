"""The base of all methods: encoder, batch, and a training step that runs one width after another."""

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import NoneType
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from slimmable._checks import check_function, check_is_module, check_tensors, checked
from slimmable._distributed import means_over_processes, where_not_finite
from slimmable._width import places_of, set_width
from slimmable.errors import DataError, DivergedError, UsageError
from slimmable.gating import GateBudget, dense, gated, has_gates
from slimmable.losses import OnlineDistillation
from slimmable.training import GradientDiagnostics, SlimRecipe, synchronised_batchnorm
from slimmable.training.recipe import check_recipe


class Encoder(nn.Module):
    """A backbone and its projection head, plain PyTorch: images in, embeddings of shape (batch, proj_dim) out.

    Convert both together: the features between them become narrower with the backbone; the embedding keeps its size.

    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 6))
    >>> encoder = slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    >>> with slimmable.at_width(encoder, 0.5):
    ...     encoder.backbone(torch.zeros(2, 1, 2, 2)).shape, encoder(torch.zeros(2, 1, 2, 2)).shape
    (torch.Size([2, 4]), torch.Size([2, 6]))
    """

    @checked
    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        check_is_module("Encoder: projector", projector)
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of `images`, not scaled to unit length."""
        return cast(Tensor, self.projector(self.backbone(images)))


@dataclass
class Batch:
    """The views of a batch of images, each of shape (batch, channels, height, width), and the labels if needed.

    Narrower widths see the same views, unless `narrow` has others for a width: `{0.5: views}`. What happens once per
    step, such as the keys of a momentum encoder, takes `views`, as does the full width.
    """

    views: Sequence[Tensor]
    labels: Tensor | None = None
    targets: Sequence[Tensor] = ()  # in `forward` and `finish`, the result of `prepare` for all widths
    narrow: Mapping[float, Sequence[Tensor]] = field(default_factory=dict)


@dataclass
class Outcome:
    """A method's scalar loss at one width, and what distillation may compare: tensors (rows, classes), one per view."""

    loss: Tensor
    logits: Sequence[Tensor] = ()
    embeddings: Sequence[Tensor] = ()


class Method(nn.Module):
    """A training method around a converted `Encoder`; subclasses define what happens once per step, and at each width.

    With several processes, each sees its own part of the batch. A step followed by `average_gradients` then gives the
    gradients, and the BatchNorm statistics, of one process that sees the whole batch.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    >>> encoder = slimmable.methods.Encoder(backbone, slimmable.methods.SimCLR.projector(8, 16, 4))
    >>> encoder = slimmable.slimify(encoder, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    >>> method = slimmable.methods.SimCLR(encoder)
    >>> recipe = slimmable.SlimRecipe(method.online, distill=method.distillation())
    >>> list(method.step(recipe, slimmable.methods.Batch([torch.rand(8, 1, 2, 2)] * 2), progress=0.7))
    [1.0, 0.5]
    """

    views: int = 2
    """How many views of each image a step takes."""

    two_passes: ClassVar[bool] = True
    """Whether the encoder sees two views one by one, so that one can go through the gated network; see `step`."""

    bn_groups: int = 1
    """How many parts of the joined batch get BatchNorm statistics of their own; see `synchronised_batchnorm`."""

    @checked
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def online(self) -> nn.ModuleList:
        """The modules that are trained and switch widths: give it to `SlimRecipe`, its parameters to the optimizer."""
        return nn.ModuleList([self.encoder])

    @property
    def backbone(self) -> nn.Module:
        """The encoder's submodule of this name, without the projection head, which is kept after training."""
        kept = getattr(self.encoder, "backbone", None)
        if not isinstance(kept, nn.Module):
            kind = type(self.encoder).__name__
            raise UsageError(f"backbone: the encoder, {kind}, has no module of this name; make it a methods.Encoder")
        return kept

    @staticmethod
    def distillation() -> OnlineDistillation | None:
        """Return the distillation that suits this method; by default that of SlimCLR, on cosines at temperature 5."""
        return OnlineDistillation()

    def prepare(self, batch: Batch, progress: float) -> Sequence[Tensor]:
        """Prepare a step, once, at full width and without gradients; the result becomes `batch.targets`."""
        return ()

    @abstractmethod
    def forward(self, batch: Batch) -> Outcome:
        """Return the loss of the active width, and the outputs that distillation compares."""

    def embed(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Return the encoder's embeddings of each view; in a gated pass, the dense network embeds all but the first."""
        first = self.encoder(views[0])
        with dense(self.encoder) if has_gates(self.encoder) else nullcontext():
            return [first, *(self.encoder(view) for view in views[1:])]

    def finish(self, batch: Batch) -> None:
        """Finish a step after its last `backward`."""

    def step(
        self,
        recipe: SlimRecipe,
        batch: Batch,
        progress: float,
        *,
        step: int | None = None,
        autocast: torch.dtype | None = None,
        backward: Callable[[Tensor], object] = Tensor.backward,
        diagnostics: GradientDiagnostics | None = None,
        gates: GateBudget | None = None,
    ) -> dict[float, float]:
        """Add up the gradients of one training step over its widths; return width -> loss, the widest first.

        Clear the gradients first; then average them over several processes, and step the optimizer. After an error the
        width is 1.0, but gradients and BatchNorm statistics have changed, and a momentum encoder has moved.

        Args:
            recipe: the recipe made from `online`.
            batch: views, and labels for methods that use them.
            progress, step: as for `SlimRecipe.widths`.
            autocast: dtype for mixed precision, such as `torch.bfloat16`, or None.
            backward: function to call with each width's loss; for float16 `lambda loss: scaler.scale(loss).backward()`.
            diagnostics: records every `backward`; after an error, its records of this step are discarded.
            gates: if given, the first view goes through the gated network, the second through the dense one (Krishna et
                al. 2023), and its losses, with `progress` as the epoch, are added. Otherwise gates are off.

        Raises: DivergedError: if a loss is not finite; all gradients are then cleared. Infinite gradients are no error,
            as a GradScaler looks for them. UsageError: if the recipe belongs to another model, or the `gates` or the
            number of views do not fit. DataError: if a view is not a tensor, or their numbers of images differ.
        """
        self._check(recipe, batch, backward, autocast=autocast, diagnostics=diagnostics, gates=gates)
        set_width(self, 1.0)  # including the modules that only `prepare` runs
        found: dict[float, tuple[Tensor, Tensor]] = {}  # each width's own loss, and its loss with distillation
        batch = replace(batch)  # the caller's keeps no targets
        mixed = partial(torch.autocast, batch.views[0].device.type, autocast, enabled=autocast is not None)
        try:
            for width in recipe.widths(progress, step):
                if recipe.first:
                    with torch.no_grad(), mixed():
                        batch.targets = self.prepare(batch, progress)
                with synchronised_batchnorm(self.bn_groups):
                    with mixed():
                        with nullcontext() if gates is None else gated(self.encoder) as run:
                            outcome = self(replace(batch, views=batch.narrow.get(width, batch.views)))
                        loss = outcome.loss if gates is None or run is None else outcome.loss + gates(run, progress)
                        loss = recipe.loss(loss, self._teach(outcome, recipe.distill))
                    found[width] = outcome.loss.detach(), loss.detach()
                    backward(loss)
                del outcome, loss, run  # otherwise they stay alive while the next width runs
                if diagnostics is not None:
                    diagnostics.after_backward(width)
            losses = _finite_losses(found, self.parameters())
            self.finish(batch)
        except BaseException as error:
            if isinstance(error, DivergedError):
                self.zero_grad()
            if diagnostics is not None:
                diagnostics.discard()
            raise
        return losses

    def _check(self, recipe: SlimRecipe, batch: object, backward: object, **optional: object) -> None:
        where = f"{type(self).__name__}.step"
        check_recipe(where, recipe=recipe)
        switched = {module for module, _ in places_of(recipe.model)}
        if not switched.issuperset(module for module, _ in places_of(self.online)):
            raise UsageError(f"{where}: the SlimRecipe is of another model, or a part of this; make it from `online`")
        check_function(where, backward=backward)
        for name, kind in (("autocast", torch.dtype), ("diagnostics", GradientDiagnostics), ("gates", GateBudget)):
            if not isinstance(optional[name], (kind, NoneType)):
                raise UsageError(f"{where}: {name} must be a {kind.__name__} or None, got {optional[name]!r:.80}")
        faults = {
            "its encoder sees one view, or all together, not one for each pass; take BYOL, say": not self.two_passes,
            "the encoder has no gates; make some with slimmable.gating.gate": not has_gates(self.encoder),
            "the recipe has random_widths, but gates are for the widths of slimify": recipe.random_widths,
        }
        for fault, found in faults.items() if optional["gates"] is not None else ():
            if found:
                raise UsageError(f"{where}: {fault}")
        if not isinstance(batch, Batch):
            raise UsageError(f"{where}: batch must be a Batch(views, labels), got {type(batch).__name__}")
        if not isinstance(batch.narrow, Mapping) or not set(batch.narrow) <= set(recipe.loss_weights) - {1.0}:
            raise UsageError(f"{where}: batch.narrow must hold views for narrower widths, got {batch.narrow!r:.80}")
        views: list[Tensor] = []
        for each in (batch.views, *batch.narrow.values()):
            if not isinstance(each, Collection) or len(each) != self.views:
                given = len(each) if isinstance(each, Collection) else repr(each)
                raise UsageError(f"{where}: takes {self.views} views of each image, got {given}")
            views.extend(each)
        check_tensors(where, **{f"view {number}": view for number, view in enumerate(views)})
        if len({view.shape[:1] for view in views}) > 1 or not views[0].ndim:
            shapes = " and ".join(str(tuple(view.shape)) for view in views)
            raise DataError(f"{where}: views have shapes {shapes}; row i of each must belong to the same image")

    def _teach(self, outcome: Outcome, distill: OnlineDistillation | None) -> Sequence[Tensor] | None:
        if distill is None:
            return None
        kind = "embeddings" if distill.kind in ("embedding", "mse") else "logits"
        found: Sequence[Tensor] = getattr(outcome, kind)
        if not found:
            what = f"{kind}, which distillation of kind {distill.kind!r} compares; its own is {self.distillation()}"
            raise UsageError(f"{type(self).__name__} has no {what}")
        return found


def _finite_losses(found: Mapping[float, tuple[Tensor, Tensor]], weights: Iterable[Tensor]) -> dict[float, float]:
    """Return each width's own loss, averaged over the processes; raise `DivergedError` if one is not finite."""
    own = [loss for pair in found.values() for loss in pair]
    numbers = means_over_processes(*own)
    for at, number in enumerate(numbers):
        if not math.isfinite(number):
            what = "loss with distillation" if at % 2 else "loss"
            where = where_not_finite(own[0].device, weights=weights, losses=own)
            raise DivergedError(f"the {what} is {number} at width {list(found)[at // 2]:g}{where}")
    return dict(zip(found, numbers[::2], strict=True))
