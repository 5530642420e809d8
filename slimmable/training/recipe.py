"""SlimCLR's training step for an existing loop: which widths run, and the loss of each."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimmable._checks import check_count, check_fraction, number_or_nan
from slimmable._width import places_of, set_width, widths_of
from slimmable.errors import DataError, UsageError, WidthError
from slimmable.losses import OnlineDistillation, slim_term, width_weights

LossWeights = str | Sequence[float] | Mapping[float, float]


class SlimRecipe:
    """Slow start, online distillation and loss re-weighting (SlimCLR, Zhao et al. 2024) around one training step.

    Looping over `widths` switches the model to one width after another. At each, `loss` returns that width's part of
    the step's loss, and the loop body calls `backward` on it. The gradients add up to those of the summed loss, while
    only one graph is alive at a time. Put several models that switch together, such as an encoder and a predictor, into
    one `nn.ModuleList`.

    Args:
        model: anything that `set_width` takes.
        distill: how wider widths teach narrower ones, or None.
        loss_weights: a mode of `slimmable.losses.width_weights`, one number per width from the widest down, or a
            mapping from width to number.
        slow_start: fraction of the training, in [0, 1], before which only the widest width is trained, unweighted.
        random_widths: how many widths to draw in each step, between the widest and the narrowest, which both run too.
            This is the sandwich rule for universal models (Yu and Huang, Universally Slimmable Networks, ICCV 2019,
            section 3.1; they draw 2), and `loss_weights` must be a mode. With 0 the model's own widths run.
        seed: seed of the draws; processes that train together need the same one.

    Raises: UsageError or WidthError: if an argument is invalid.

    >>> from slimmable.layers import SlimLinear
    >>> from slimmable._width import width_of
    >>> model = SlimLinear(4, 8, widths=(1.0, 0.5), slim_in=False)
    >>> recipe = SlimRecipe(model, slow_start=0.5)
    >>> recipe
    SlimRecipe(widths=(1.0, 0.5), distill=None, loss_weights=(1.5, 1.0), slow_start=0.5, random_widths=0)
    >>> [width for width in recipe.widths(progress=0.1)], [width for width in recipe.widths(progress=0.9)]
    ([1.0], [1.0, 0.5])
    >>> for width in recipe.widths(progress=0.9):
    ...     loss = recipe.loss(model(torch.ones(2, 4)).square().mean())
    ...     loss.backward()
    >>> width_of(model)
    1.0
    """

    def __init__(
        self,
        model: nn.Module,
        distill: OnlineDistillation | None = None,
        loss_weights: LossWeights = "widest_plus_rest",
        slow_start: float = 0.0,
        random_widths: int = 0,
        seed: int = 0,
    ) -> None:
        if distill is not None and not (callable(distill) and hasattr(distill, "teachers")):
            raise UsageError(f"SlimRecipe: distill must be an OnlineDistillation or None, got {distill!r}")
        self.model = model
        self.distill = distill
        self.loss_weights = _weight_of_each(widths_of(model), loss_weights)
        self._mode = _check_sandwich(model, loss_weights, random_widths) if random_widths else None
        self.random_widths, self._seed, self._random = random_widths, seed, random.Random(seed)
        check_fraction("SlimRecipe", slow_start=slow_start)
        self.slow_start = float(slow_start)
        self._step: _Step | None = None
        self._loop: weakref.ref[Generator[float, None, None]] | None = None

    def __repr__(self) -> str:
        weights = tuple(self.loss_weights.values()) if self._mode is None else self._mode
        return (
            f"SlimRecipe(widths={tuple(self.loss_weights)}, distill={self.distill}, loss_weights={weights!r}, "
            f"slow_start={self.slow_start}, random_widths={self.random_widths})"
        )

    def __getstate__(self) -> dict[str, object]:
        """Leave out the running loop, which cannot be copied; a copy starts outside any loop."""
        return {**self.__dict__, "_step": None, "_loop": None}

    @property
    def first(self) -> bool:
        """Whether the loop is at the widest width: the place for what must happen once per step.

        Compute a momentum encoder's keys here. Add them to a queue only after the loop: narrower widths must not meet
        the keys of their own batch among the negatives. For criteria that change when called, see `once`.
        """
        return self._step is not None and self._step.first

    def widths(self, progress: float, step: int | None = None) -> Iterator[float]:
        """Switch the model to each width of this step in turn, from the widest down, and yield it.

        When the loop ends, even by `break` or an exception, the width is 1.0 again.

        Args:
            progress: fraction of the training done, in [0, 1].
            step: number of this step. If given, random widths depend only on `seed` and `step`, so training resumed
                from a checkpoint draws the same ones; otherwise they depend on the draws before.

        Raises: UsageError: if `progress` is not in [0, 1].
        """
        check_fraction("SlimRecipe", progress=progress)
        previous = self._loop() if self._loop is not None else None
        if previous is not None:  # a loop that was left early and is still referenced
            previous.close()
        if step is not None:
            self._random.seed(f"{self._seed} {step}")
        loop = self._run(slow=progress < self.slow_start)
        self._loop = weakref.ref(loop)
        return loop

    @contextmanager
    def once(self, *modules: nn.Module) -> Iterator[None]:
        """Let `modules` change once per step, although the block runs once per width.

        This is for criteria that change their own buffers when called, such as a queue or a centre. Every width's block
        starts with the buffers as they were before the widest width's block, and only the widest width's change is
        kept.

        Raises: UsageError: if called outside the loop, or at a narrower width but not at the widest.

        >>> from slimmable.layers import SlimLinear
        >>> model, norm = SlimLinear(4, 8, widths=(1.0, 0.5), slim_out=False), nn.BatchNorm1d(8)
        >>> recipe = SlimRecipe(model)
        >>> for width in recipe.widths(progress=1.0):
        ...     with recipe.once(norm):
        ...         loss = recipe.loss(norm(model(torch.ones(2, 4)[:, : int(4 * width)])).mean())
        >>> int(norm.num_batches_tracked)
        1
        """
        step = self._step
        if step is None:
            raise UsageError("SlimRecipe.once: no loop is running; use it inside the loop over recipe.widths(progress)")
        stores = {id(m): m._buffers for module in modules for m in module.modules()}
        if step.first:
            step.buffers.update({key: _copies(store) for key, store in stores.items()})
            yield
            return
        if not stores.keys() <= step.buffers.keys():
            raise UsageError(f"SlimRecipe.once: at width {step.width}, but not used at the widest width of this step")
        after = {key: dict(store) for key, store in stores.items()}
        for key, store in stores.items():
            store.update(_copies(step.buffers[key]))
        try:
            yield
        finally:
            for key, store in stores.items():
                store.update(after[key])

    def loss(self, loss: Tensor, teach: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Return the active width's part of the step's loss; call it once per width, then `backward` on the result.

        Args:
            loss: the method's own loss at this width, a scalar.
            teach: logits or embeddings that distillation compares between widths, shape (batch, classes). Of several
                tensors, such as the two directions of MoCo v3, each is compared with its counterpart, and the losses
                are added. Ignored without `distill` and during the slow start.

        Raises: UsageError: if called outside the loop, twice at one width, or without the `teach` that `distill` needs.
            DataError: if `loss` is not a scalar, or `teach` is not one or several tensors.
        """
        step = self._step
        if step is None:
            raise UsageError(
                "SlimRecipe.loss: no loop is running; call it inside `for width in recipe.widths(progress):`"
            )
        if step.done:
            raise UsageError(
                f"SlimRecipe.loss: called twice at width {step.width}; add up the losses, then call it once"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f"a tensor of shape {tuple(loss.shape)}" if hasattr(loss, "shape") else loss
            raise DataError(f"SlimRecipe.loss: the loss of width {step.width} must be a scalar tensor, got {shape}")
        step.done = True
        if step.slow:
            return slim_term(loss)
        weight = step.loss_weights[step.width]
        if self.distill is None:
            return slim_term(loss, weight=weight)
        views = _views(step, teach)
        distillation = None
        if not step.first:
            taught = zip(views, *step.teachers.values(), strict=True)
            distillation = torch.stack([self.distill(view, teachers) for view, *teachers in taught]).sum()
        if step.first or self.distill.teachers == "all wider":
            step.teachers[step.width] = [view.detach() for view in views]
        return slim_term(loss, distillation, weight, self.distill.weight)

    def _run(self, slow: bool) -> Generator[float, None, None]:
        weights = self.loss_weights
        if self._mode is not None:
            widest, *_, narrowest = weights
            drawn = [self._random.uniform(narrowest, widest) for _ in range(self.random_widths)]
            weights = _weight_of_each(sorted([widest, *drawn, narrowest], reverse=True), self._mode)
        step = self._step = _Step(slow, weights)
        try:
            for width in list(step.loss_weights)[: 1 if slow else None]:
                set_width(self.model, width)
                step.width, step.done = width, False
                yield width
        finally:
            if self._step is step:
                self._step = None
            set_width(self.model, 1.0)


@dataclass
class _Step:
    """The state of one step's loop, and the outputs that teach."""

    slow: bool
    loss_weights: Mapping[float, float]  # of each width, from the widest down
    width: float = math.nan
    done: bool = False  # whether this width has had its loss
    teachers: dict[float, list[Tensor]] = field(default_factory=dict)  # width -> its views, for widths that teach
    buffers: dict[int, dict[str, Tensor | None]] = field(default_factory=dict)  # by module, from before the step

    @property
    def first(self) -> bool:
        return self.width == 1.0


def _views(step: _Step, teach: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """Return the outputs by which the active width teaches or learns, one tensor per view or direction."""
    if teach is None:
        raise UsageError(f"SlimRecipe.loss: distill is on, but teach is missing at width {step.width}")
    if not step.first and not step.teachers:
        raise UsageError(
            f"SlimRecipe.loss: width {step.width} has no teacher; call loss(..., teach=...) at the widest width too"
        )
    views = [teach] if isinstance(teach, Tensor) else list(teach) if isinstance(teach, Iterable) else [None]
    if not all(isinstance(view, Tensor) for view in views):
        raise DataError(f"SlimRecipe.loss: teach must be one or several tensors, got {teach!r}")
    expected = len(step.teachers[1.0]) if step.teachers else max(1, len(views))
    if len(views) != expected:
        raise UsageError(
            f"SlimRecipe.loss: teach has {len(views)} tensors at width {step.width}, expected {expected}, "
            "as many as at the widest width"
        )
    return views


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if buffer is None else buffer.detach().clone() for name, buffer in buffers.items()}


def _check_sandwich(model: nn.Module, loss_weights: LossWeights, random_widths: int) -> str:
    """Return the mode of the loss weights; raise an error if the model or the weights do not allow random widths."""
    check_count("SlimRecipe", least=0, random_widths=random_widths)
    if not isinstance(loss_weights, str):
        raise UsageError(
            f"SlimRecipe: with random_widths, loss_weights must be a mode such as 'ones', got {loss_weights!r}"
        )
    if not all(state.plan is not None and state.plan.universal for _, state in places_of(model)):
        raise WidthError(
            "SlimRecipe: random_widths is for universal models; convert the model with slimify(..., universal=True)"
        )
    if len(widths_of(model)) < 2:
        raise WidthError("SlimRecipe: random_widths needs a narrowest width below 1.0, the model's only one")
    return loss_weights


def _weight_of_each(widths: Sequence[float], loss_weights: LossWeights) -> dict[float, float]:
    """Return width -> loss weight, from the widest down."""
    if isinstance(loss_weights, str):
        return dict(zip(widths, width_weights(widths, loss_weights), strict=True))
    if isinstance(loss_weights, Mapping):
        if set(loss_weights) != set(widths):
            raise WidthError(
                f"SlimRecipe: loss_weights are for widths {sorted(loss_weights)}, the model has {sorted(widths)}"
            )
        given = {width: loss_weights[width] for width in widths}
    elif not hasattr(loss_weights, "__len__"):
        raise UsageError(f"SlimRecipe: loss_weights must be a mode, a list or a dict of numbers, got {loss_weights!r}")
    elif len(loss_weights) != len(widths):
        raise WidthError(
            f"SlimRecipe: {len(loss_weights)} loss weights {tuple(loss_weights)} for the {len(widths)} widths {widths}"
        )
    else:
        given = dict(zip(widths, loss_weights, strict=True))
    for width, weight in given.items():
        if not 0 <= number_or_nan(weight) < math.inf:
            raise WidthError(
                f"SlimRecipe: the loss weight of width {width} must be a finite number of at least 0, got {weight!r}"
            )
    return {width: float(weight) for width, weight in given.items()}
