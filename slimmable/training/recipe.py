"""The training step of SlimCLR for an existing loop: which widths run, and what each one's loss is."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from slimmable._width import places_of, set_width, widths_of
from slimmable.errors import DataError, UsageError, WidthError
from slimmable.losses import OnlineDistillation, slim_term, width_weights
from slimmable.losses._checks import as_number, check_count


class SlimRecipe:
    """Slow start, online distillation and loss re-weighting (SlimCLR, Zhao et al. 2024) around one training step.

    The loop over `widths` runs the model at one width after the other, `loss` makes each width's part of the step's
    loss, and the loop body calls `backward` on it: the gradients add up to those of the summed loss, and one graph is
    alive at a time. Several models that switch together, such as an encoder and a predictor, go in as one
    `nn.ModuleList`.

    Args:
        model: anything that `set_width` takes.
        distill: how wider widths teach narrower ones, or None.
        weights: a mode of `slimmable.losses.width_weights`, one number per width from the widest on, or a mapping from
            width to number.
        slow_start: share of the training, in [0, 1], before which only the widest width is trained, unweighted.
        random_widths: with a universal model, train at the widest, the narrowest, and this many widths drawn between
            them, anew in each step (the sandwich rule of Yu and Huang, Universally Slimmable Networks, ICCV 2019,
            section 3.1; they draw 2). 0 trains at the model's own widths. `weights` then is a mode.
        seed: of the draws; processes that train together need the same.

    Raises: UsageError or WidthError: if an argument does not fit, with the values.

    >>> from slimmable.layers import SlimLinear
    >>> from slimmable._width import width_of
    >>> model = SlimLinear(4, 8, widths=(1.0, 0.5), slim_in=False)
    >>> recipe = SlimRecipe(model, slow_start=0.5)
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
        weights: str | Sequence[float] | Mapping[float, float] = "widest_plus_rest",
        slow_start: float = 0.0,
        random_widths: int = 0,
        seed: int = 0,
    ) -> None:
        if distill is not None and not (callable(distill) and hasattr(distill, "teachers")):
            raise UsageError(f"SlimRecipe: distill must be an OnlineDistillation or None, got {distill!r}")
        self.model = model
        self.distill = distill
        self.weights = _weight_of_each(widths_of(model), weights)
        self._mode = _check_sandwich(model, weights, random_widths) if random_widths else None
        self.random_widths, self._seed, self._random = random_widths, seed, random.Random(seed)
        self.slow_start = _check_share("slow_start", slow_start)
        self._step: _Step | None = None
        self._loop: weakref.ref[Generator[float, None, None]] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the running loop, which cannot be copied; a copy starts outside of any loop."""
        return {**self.__dict__, "_step": None, "_loop": None}

    @property
    def first(self) -> bool:
        """True while the loop is at the widest width: the place for what must happen once per step.

        A momentum encoder's keys are computed here. A queue takes them in after the loop only: narrower widths must not
        meet the keys of their own batch among the negatives. For criteria that change themselves when called see
        `once`.
        """
        return self._step is not None and self._step.first

    def widths(self, progress: float, step: int | None = None) -> Iterator[float]:
        """Switch the model to each width of this step in turn, from the widest on, and yield it.

        When the loop ends, also by `break` or an exception, the width is 1.0 again.

        Args:
            progress: share of the training done, in [0, 1].
            step: number of this step. With it, random widths depend on `seed` and step alone, so that a training that
                goes on from a checkpoint draws what it would have drawn; without, on the draws before.

        Raises: UsageError: if `progress` is not in [0, 1].
        """
        slow = _check_share("progress", progress) < self.slow_start
        previous = self._loop() if self._loop is not None else None
        if previous is not None:  # one that was left half-way and is still referred to
            previous.close()
        if step is not None:
            self._random.seed(f"{self._seed} {step}")
        loop = self._run(slow)
        self._loop = weakref.ref(loop)
        return loop

    @contextmanager
    def once(self, *modules: nn.Module) -> Iterator[None]:
        """Let `modules` change once per step, though the block runs once per width.

        For criteria that keep something in buffers and change it when called, such as a queue or a centre: in every
        width's block the buffers are as they were before the widest width's, and the widest width's change stays.

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

    def loss(
        self, contrastive: torch.Tensor, teach: torch.Tensor | Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return the active width's part of the step's loss; call it once per width, then `backward` on the result.

        Args:
            contrastive: the self-supervised loss `C_w` of this width, a scalar.
            teach: what distillation compares between widths, shape (batch, classes): logits or embeddings. Several
                tensors (such as the two directions of MoCo v3) are compared each with its own, and the losses added.
                Without `distill`, and during the slow start, it is not looked at.

        Raises: UsageError: if called outside the loop, twice at one width, or without the `teach` that `distill` needs.
            DataError: if `contrastive` is no scalar, or `teach` holds something else than tensors.
        """
        step = self._step
        if step is None:
            raise UsageError(
                "SlimRecipe.loss: no loop is running; call it inside `for width in recipe.widths(progress):`"
            )
        if step.done:
            raise UsageError(
                f"SlimRecipe.loss: called twice at width {step.width}; add the losses up, then call it once"
            )
        if not isinstance(contrastive, torch.Tensor) or contrastive.numel() != 1:
            shape = f"a tensor of shape {tuple(contrastive.shape)}" if hasattr(contrastive, "shape") else contrastive
            raise DataError(f"SlimRecipe.loss: the loss of width {step.width} must be a scalar tensor, got {shape}")
        step.done = True
        if step.slow:
            return slim_term(contrastive)
        weight = step.weights[step.width]
        if self.distill is None:
            return slim_term(contrastive, weight=weight)
        views = self._views(step, teach)
        distillation = None if step.first else _sum_of_views(self.distill, views, list(step.teachers.values()))
        if step.first or self.distill.teachers == "all wider":
            step.teachers[step.width] = [view.detach() for view in views]
        return slim_term(contrastive, distillation, weight, self.distill.weight)

    def _run(self, slow: bool) -> Generator[float, None, None]:
        step = self._step = _Step(slow, self.weights if self._mode is None else self._drawn(self._mode))
        try:
            for width in list(step.weights)[: 1 if slow else None]:
                set_width(self.model, width)
                step.begin(width)
                yield width
        finally:
            if self._step is step:
                self._step = None
            set_width(self.model, 1.0)

    def _drawn(self, mode: str) -> dict[float, float]:
        """Return width -> weight of a step with random widths, from the widest to the narrowest."""
        widest, *_, narrowest = self.weights
        drawn = [self._random.uniform(narrowest, widest) for _ in range(self.random_widths)]
        return _weight_of_each(sorted([widest, *drawn, narrowest], reverse=True), mode)

    def _views(self, step: _Step, teach: torch.Tensor | Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
        if teach is None:
            raise UsageError(f"SlimRecipe.loss: distill is on, but teach is missing at width {step.width}")
        if not step.first and not step.teachers:
            raise UsageError(
                f"SlimRecipe.loss: width {step.width} has no teacher; call loss(..., teach=...) at the widest width too"
            )
        views = [teach] if isinstance(teach, torch.Tensor) else list(teach) if isinstance(teach, Iterable) else [None]
        if not all(isinstance(view, torch.Tensor) for view in views):
            raise DataError(f"SlimRecipe.loss: teach must be one or several tensors, got {teach!r}")
        expected = len(step.teachers[1.0]) if step.teachers else max(1, len(views))
        if len(views) != expected:
            raise UsageError(
                f"SlimRecipe.loss: {len(views)} tensors to teach at width {step.width}, expected {expected}, "
                "as many as at the widest width"
            )
        return views


class _Step:
    """Where the loop of one step is, and the outputs that teach."""

    def __init__(self, slow: bool, weights: Mapping[float, float]) -> None:
        self.slow = slow
        self.weights = weights  # of each width, from the widest on
        self.first = False
        self.done = False
        self.width = math.nan
        self.teachers: dict[float, list[torch.Tensor]] = {}  # of each width that teaches, the views
        self.buffers: dict[int, dict[str, torch.Tensor | None]] = {}  # by module, as they were before the step

    def begin(self, width: float) -> None:
        self.first = width == 1.0
        self.done = False
        self.width = width


def _copies(buffers: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return {name: None if buffer is None else buffer.detach().clone() for name, buffer in buffers.items()}


def _sum_of_views(
    distill: OnlineDistillation, views: Sequence[torch.Tensor], teachers: Sequence[Sequence[torch.Tensor]]
) -> torch.Tensor:
    losses = [distill(view, [teacher[i] for teacher in teachers]) for i, view in enumerate(views)]
    return torch.stack(losses).sum()


def _check_share(name: str, value: float) -> float:
    if not 0 <= as_number(value) <= 1:
        raise UsageError(f"SlimRecipe: {name} is a share of the training and must be in [0, 1], got {value!r}")
    return float(value)


def _check_sandwich(model: nn.Module, weights: object, random_widths: int) -> str:
    check_count("SlimRecipe", "random_widths", random_widths, 0)
    if not isinstance(weights, str):
        raise UsageError(f"SlimRecipe: with random_widths, weights must be a mode such as 'ones', got {weights!r}")
    if not all(state.plan is not None and state.plan.universal for _, state in places_of(model)):
        raise WidthError(
            "SlimRecipe: random_widths is for universal models; convert the model with slimify(..., universal=True)"
        )
    if len(widths_of(model)) < 2:
        raise WidthError("SlimRecipe: random_widths needs a narrowest width below 1.0, the model's only one")
    return weights


def _weight_of_each(
    widths: Sequence[float], weights: str | Sequence[float] | Mapping[float, float]
) -> dict[float, float]:
    """Return width -> weight, from the widest on."""
    if isinstance(weights, str):
        return dict(zip(widths, width_weights(widths, weights), strict=True))
    if isinstance(weights, Mapping):
        if set(weights) != set(widths):
            raise WidthError(f"SlimRecipe: weights are for widths {sorted(weights)}, the model has {sorted(widths)}")
        given = {width: weights[width] for width in widths}
    else:
        if not hasattr(weights, "__len__"):
            raise UsageError(f"SlimRecipe: weights are a mode, a list or a dict of numbers, got {weights!r}")
        if len(weights) != len(widths):
            raise WidthError(
                f"SlimRecipe: {len(weights)} weights {tuple(weights)} for the {len(widths)} widths {widths}"
            )
        given = dict(zip(widths, weights, strict=True))
    for width, weight in given.items():
        if not 0 <= as_number(weight) < math.inf:
            raise WidthError(f"SlimRecipe: the weight of width {width} must be a number from 0 on, got {weight!r}")
    return {width: float(weight) for width, weight in given.items()}
