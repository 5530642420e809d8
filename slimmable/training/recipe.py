"""SlimCLR's training step for an existing loop: which widths run, and the loss of each."""

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, ParamSpec, TypeAlias

import torch
from torch import Tensor, nn

from slimmable._checks import check_count, check_floats, check_fraction, check_function, checked, must_be
from slimmable._distributed import averaged_once, check_same_settings, note_width
from slimmable._width import places_of, set_width, widths_of
from slimmable._widths import number_or_nan
from slimmable.errors import DataError, UsageError, WidthError
from slimmable.losses import OnlineDistillation, slim_term, width_weights
from slimmable.training import around
from slimmable.view.state import READ

LossWeights = str | Sequence[float] | Mapping[float, float]
Loss: TypeAlias = "Tensor | tuple[Tensor, Tensor | Sequence[Tensor]]"
Modules: TypeAlias = Iterable[nn.Module]
P = ParamSpec("P")


class SlimRecipe:
    """Slow start, online distillation and loss re-weighting (SlimCLR, Zhao et al. 2024) around one training step.

    `backward` runs a step's forward and backward passes at one width after another, the widest first. The gradients add
    up to those of the summed loss, with one graph alive at a time. For full control, loop over `widths` and use `loss`.

    Args:
        model: anything that `set_width` takes; several, such as an encoder and a predictor, in one `nn.ModuleList`.
        distill: how wider widths teach narrower ones, or None.
        loss_weights: a mode of `losses.width_weights`, a number per width from the widest down, or width -> number.
        slow_start: fraction of the training, in [0, 1], before which only the widest width is trained, unweighted.
        random_widths: how many widths each step draws between the widest and the narrowest and runs, uncompiled: the
            sandwich rule of universal models (Yu and Huang 2019, section 3.1, with 2). `loss_weights` must be a mode.
        seed: seed of the draws; processes that train together need the same one.
        steps: how often the whole training will call `backward` or `total`; needed there for a slow start.
        frozen: modules without gradient that the step calls, such as a momentum encoder or a teacher. They run at the
            widest width only, and narrower widths get the same outputs.
        once: modules whose state changes once per step, such as a criterion with a queue; see the method `once`. So do
            the model's own buffers in `backward` and `total`, unless they belong to a width.
        backward: called with each width's loss, such as `accelerator.backward`, instead of `Tensor.backward`.

    Attributes:
        losses: width -> its own loss in the last step, detached.
        distillations: width -> its distillation in the last step, detached, less its `OnlineDistillation.floor`.
        steps_done: how many steps `backward` and `total` have run.

    >>> model = slimmable.SlimLinear(4, 8, widths=(1.0, 0.5), slim_in=False)
    >>> recipe = SlimRecipe(model, slow_start=0.5, steps=2)
    >>> recipe
    SlimRecipe(widths=(1.0, 0.5), distill=None, loss_weights=(1.5, 1.0), slow_start=0.5, random_widths=0)
    >>> for step in range(2):
    ...     loss = recipe.backward(lambda: model(torch.ones(2, 4)).square().mean())
    ...     bool(loss == recipe.losses[1.0]), list(recipe.losses)
    (True, [1.0])
    (True, [1.0, 0.5])
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        distill: OnlineDistillation | None = None,
        loss_weights: LossWeights = "widest_plus_rest",
        slow_start: float = 0.0,
        random_widths: int = 0,
        seed: int = 0,
        *,
        steps: int | None = None,
        frozen: Modules = (),
        once: Modules = (),
        backward: Callable[[Tensor], object] | None = None,
    ) -> None:
        if distill is not None and not (callable(distill) and hasattr(distill, "teachers")):
            raise UsageError(f"SlimRecipe: distill must be an OnlineDistillation or None, got {distill!r}")
        self.model, self.distill = model, distill
        self.loss_weights = _weight_of_each(widths_of(model), loss_weights)
        self._mode = loss_weights if random_widths and isinstance(loss_weights, str) else None
        if random_widths and self._mode is None:
            raise UsageError(f"SlimRecipe: with random_widths, loss_weights must be a mode, got {loss_weights!r}")
        universal = all(state.plan is not None and state.plan.universal for _, state in places_of(model))
        if random_widths and (not universal or len(self.loss_weights) < 2):
            raise WidthError("SlimRecipe: random_widths needs slimify(..., universal=True) and a width below 1.0")
        self.random_widths, self._seed, self._random = random_widths, seed, random.Random(seed)
        self.slow_start, self.steps, self.steps_done = float(slow_start), steps, 0
        self._compared = False  # with the recipes of other processes
        self._frozen, self._once = _modules("frozen", frozen), _modules("once", once)
        self._backward = Tensor.backward if backward is None else backward
        self.losses: dict[float, Tensor] = {}
        self.distillations: dict[float, Tensor] = {}
        self._step: _Step | None = None
        self._calls: around.Calls | None = None
        self._optimizers = around.OptimizerCheck(model)

    def __repr__(self) -> str:
        weights = tuple(self.loss_weights.values()) if self._mode is None else self._mode
        given = f"widths={tuple(self.loss_weights)}, distill={self.distill}, loss_weights={weights!r}"
        return f"SlimRecipe({given}, slow_start={self.slow_start}, random_widths={self.random_widths})"

    def __getstate__(self) -> dict[str, object]:
        """Leave out the running loop and what is noted of optimizers; a copy starts outside any loop."""
        return {**self.__dict__, "_step": None, "_calls": None, "_optimizers": around.OptimizerCheck(self.model)}

    def backward(
        self, closure: Callable[[], Loss], *, backward: Callable[[Tensor], object] | None = None, **modules: Modules
    ) -> Tensor:
        """Add up the gradients of one step over its widths, and return the loss of the widest, detached.

        Clear gradients before, not after. DistributedDataParallel averages them once, at the end (not under `no_sync`).

        Args:
            closure: runs the model and returns the loss, a scalar, or `(loss, teach)`, see `loss`. Without `teach`,
                distillation compares what the model returned: scores or embeddings (..., classes), maps (batch,
                classes, height, width), the `logits` of a dict; for a model that returns its loss, what the last module
                directly in it returned; of two matrices of one shape, two views, most kinds their `nt_xent_logits`.
            backward: as for the class.
            modules: `frozen` and `once`, as for the class, which add to those given there.

        Raises: UsageError: if a slow start lacks `steps`, or distillation has nothing to compare. Also as `loss`.
        """
        run_backward = self._backward if backward is None else backward
        check_function("SlimRecipe", closure=closure, backward=run_backward)
        with averaged_once(self.model):
            for part in self.parts(closure, **modules):
                kind = part.device.type  # the whole step may be in autocast
                with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
                    try:
                        run_backward(part)
                    except RuntimeError as error:
                        if "a second time" not in str(error):
                            raise
                        way = "make it in the closure, return (loss, teach), or call backward on recipe.total(closure)"
                        raise UsageError(f"SlimRecipe: the loss reads a graph that is freed already; {way}") from error
        return self.losses[1.0]

    def total(self, closure: Callable[[], Loss], **modules: Modules) -> Tensor:
        """Return the weighted sum of all widths' losses, for code that calls `backward` itself.

        All widths' graphs are alive until then. Arguments and errors are those of `backward`.

        >>> model = slimmable.SlimLinear(4, 8, widths=(1.0, 0.5), slim_in=False)
        >>> recipe = SlimRecipe(model, loss_weights="ones")
        >>> total = recipe.total(lambda: model(torch.ones(2, 4)).square().mean())
        >>> bool(total.isclose(sum(recipe.losses.values())))
        True
        """
        return torch.stack([part - self._running("total").excess for part in self.parts(closure, **modules)]).sum()

    def parts(self, closure: Callable[[], Loss], *, frozen: Modules = (), once: Modules = ()) -> Iterator[Tensor]:
        """Yield each width's part of the loss, whose backward pass belongs before the next; then count the step.

        Arguments and errors are those of `backward`.
        """
        check_function("SlimRecipe", closure=closure)
        if self.slow_start and self.steps is None:
            raise UsageError("SlimRecipe: a slow start needs the length of the training: steps=epochs * len(loader)")
        teachers = [*self._frozen, *_modules("frozen", frozen)]
        replayed = {part for module in teachers for part in module.modules()}
        given = around.shared_by_widths([*self._once, *_modules("once", once)], without=replayed)
        own = around.shared_by_widths([self.model], without=replayed.union(given))
        stores, left = [*around.stores_of(given), *(part._buffers for part in own)], around.stores_of(replayed)
        state, replay = around.Once(self.model), around.Replay(teachers)
        if self._calls is None or self._calls.model is not self.model:
            self._calls = around.Calls(self.model)
        outputs: dict[float, Sequence[Tensor]] = {}
        for width in self.widths(self.progress, self.steps_done):
            with state.changes(stores, self.first, left), self._calls.noted(), replay.run(self.first):
                result = closure()
            loss, teach = result if isinstance(result, (tuple, list)) and len(result) == 2 else (result, None)
            returned = self._calls.outputs()
            step = self._step
            if returned is not None and teach is None and step is not None and step.distill is not None:
                with torch.set_grad_enabled(not self.first):
                    *wider, teach = around.compared({**outputs, width: returned}, step.distill.kind).values()
                step.teachers = dict(zip(outputs, wider, strict=True))
                outputs[width] = [tensor.detach() for tensor in returned]
            part = self.loss(loss, teach)
            del result, loss, teach, returned  # otherwise the graph stays alive while the next width runs
            yield part
        self.steps_done += 1

    @checked
    def step(self, function: Callable[P, Loss]) -> Callable[P, Tensor]:
        """Decorate a function that returns a loss, so that calling it is `backward` on it, with its arguments.

        >>> model = slimmable.SlimLinear(4, 8, widths=(1.0, 0.5), slim_in=False)
        >>> @SlimRecipe(model).step
        ... def training_step(x):
        ...     return model(x).square().mean()
        >>> training_step(torch.ones(2, 4)).requires_grad
        False
        """

        @wraps(function)
        def stepped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            return self.backward(partial(function, *args, **kwargs))

        return stepped

    @property
    def progress(self) -> float:
        """Fraction of the training that `backward` and `total` have done, in [0, 1]; 1 without a number of `steps`."""
        return 1.0 if self.steps is None else min(1.0, self.steps_done / self.steps)

    def state_dict(self) -> dict[str, int]:
        """Return how far `backward` and `total` have got, for a checkpoint."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the recipe of a `state_dict` had got. Raises: DataError: if it is not such a state."""
        done = state.get("steps_done") if isinstance(state, Mapping) and len(state) == 1 else None
        if type(done) is not int or done < 0:
            raise DataError(f"SlimRecipe.load_state_dict: expected {{'steps_done': a count}}, got {state!r}")
        self.steps_done, self._compared = done, False

    @property
    def first(self) -> bool:
        """Whether the loop is at the widest width, for what happens once per step; fill a queue only after the loop."""
        return self._step is not None and self._step.width == 1.0

    def widths(self, progress: float, step: int | None = None) -> Iterator[float]:
        """Switch the model to each width of this step in turn, from the widest down, and yield it.

        At each width, call `backward` on the result of `loss`. When the loop ends in any way, the width is 1.0 again.

        Args:
            progress: fraction of the training done, in [0, 1].
            step: number of this step; random widths then depend only on it and `seed`, not on the draws before.

        >>> model = slimmable.SlimLinear(4, 8, widths=(1.0, 0.5), slim_in=False)
        >>> recipe = SlimRecipe(model)
        >>> for width in recipe.widths(progress=0.9):
        ...     recipe.loss(model(torch.ones(2, 4)).square().mean()).backward()
        >>> width, slimmable.width_of(model)
        (0.5, 1.0)
        """
        check_fraction("SlimRecipe", progress=progress)
        self._optimizers.before_gradients()
        if step is not None:
            check_count("SlimRecipe.widths", least=0, step=step)
            self._random.seed(f"{self._seed} {step}")
        return self._run(slow=progress < self.slow_start)

    def once(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """Let `modules` change once per step, although the block runs once per width.

        This covers buffers, parameters without gradient, and attributes that are numbers, tensors, arrays or containers
        of these. Every block starts with them as the widest width's did, and only that one's change is kept.

        Raises: UsageError: if called outside the loop, or at a narrower width but not at the widest.

        >>> model, norm = slimmable.SlimLinear(4, 8, widths=(1.0, 0.5), slim_out=False), nn.BatchNorm1d(8)
        >>> recipe = SlimRecipe(model)
        >>> for width in recipe.widths(progress=1.0):
        ...     with recipe.once(norm):
        ...         loss = recipe.loss(norm(model(torch.ones(2, 4)[:, : int(4 * width)])).mean())
        >>> int(norm.num_batches_tracked)
        1
        """
        changes = self._running("once").once.changes
        return changes(around.stores_of(around.shared_by_widths(_modules("once", modules))), self.first)

    def loss(self, loss: Tensor, teach: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Return the active width's part of the step's loss; call it once per width, then `backward` on the result.

        Args:
            loss: the method's own loss at this width, a scalar.
            teach: logits or embeddings (batch, classes) that `distill` compares; several tensors' distillations add up.

        Raises: UsageError: if called outside the loop, twice at one width, or without the `teach` that `distill` needs.
            DataError: if `loss` is not a scalar, or `teach` is not one or several tensors.
        """
        step = self._running("loss")
        width, weight = step.width, step.loss_weights[step.width]
        where = f"SlimRecipe.loss at width {width}"
        if width in self.losses:
            raise UsageError(f"{where}: called twice; add up the losses first")
        check_floats(where, 1, loss=loss)
        self.losses[width] = loss.detach()
        note_width(places_of(self.model)[0][0], width)
        if teach is not None and self.distill is None:
            warnings.warn("SlimRecipe: teach is given, but without distill nothing is taught", stacklevel=2)
        step.excess = 0.0
        if step.distill is None:
            return slim_term(loss, weight=weight)
        if teach is None:
            raise UsageError(f"{where}: teach is missing; call the recipe's model, or return (loss, teach)")
        if not self.first and not step.teachers:
            raise UsageError(f"{where}: there is no teacher; give teach at the widest width too")
        # one tensor per view or direction
        views = list(teach) if isinstance(teach, Iterable) and not isinstance(teach, Tensor) else [teach]
        check_floats(where, None, **{f"teach[{at}]": view for at, view in enumerate(views)})
        expected = max(1, len(views)) if self.first else len(step.teachers[1.0])
        if len(views) != expected:
            raise UsageError(f"{where}: teach has {len(views)} tensors, expected {expected} as at 1.0")
        distillation = None
        if not self.first:
            taught = [(view, teachers) for view, *teachers in zip(views, *step.teachers.values(), strict=True)]
            distillation = torch.stack([step.distill(view, teachers) for view, teachers in taught]).sum()
            floor = torch.stack([step.distill.floor(teachers) for _, teachers in taught]).sum()
            self.distillations[width] = distillation.detach() - floor
            step.excess = weight * step.distill.weight * floor
        if self.first or step.distill.teachers == "all wider":
            step.teachers[width] = [view.detach() for view in views]
        return slim_term(loss, distillation, weight, step.distill.weight)

    def _running(self, where: str) -> "_Step":
        if self._step is None:
            raise UsageError(f"SlimRecipe.{where}: no loop is running; use it in that over recipe.widths(progress)")
        return self._step

    def _run(self, slow: bool) -> Iterator[float]:
        weights = self.loss_weights
        if self._mode is not None:
            widest, *_, narrowest = weights
            drawn = [self._random.uniform(narrowest, widest) for _ in range(self.random_widths)]
            weights = _weight_of_each(sorted([widest, *drawn, narrowest], reverse=True), self._mode)
        step = _Step(None, {1.0: 1.0}) if slow else _Step(self.distill, weights)
        if not self._compared:
            self._compared = True
            done = f"{self.steps_done} of {self.steps} steps done, slow start {self.slow_start}, seed {self._seed}"
            check_same_settings("SlimRecipe", f"{', '.join(map(str, step.loss_weights))} ({done})", self.model)
        self._step, self.losses, self.distillations, self._optimizers.in_step = step, {}, {}, True
        try:
            for width in step.loss_weights:
                set_width(self.model, width)
                step.width = width
                READ.set({})
                with torch.compiler.set_stance("force_eager") if width not in self.loss_weights else nullcontext():
                    yield width
                if self._step is not step:  # this loop was left early, and another one has begun
                    return
                if width not in self.losses:
                    warnings.warn(f"SlimRecipe: width {width} ran without recipe.loss, so unweighted", stacklevel=2)
        finally:
            if self._step is step:
                self._step, self._optimizers.in_step = None, False
                READ.set(None)
                set_width(self.model, 1.0)


@dataclass
class _Step:
    """The state of one step's loop, and the outputs that teach."""

    distill: OnlineDistillation | None  # None during the slow start
    loss_weights: Mapping[float, float]  # of each width, from the widest down
    width: float = math.nan
    excess: Tensor | float = 0.0  # of this width's loss over the one with distillation as a divergence
    teachers: dict[float, list[Tensor]] = field(default_factory=dict)  # width -> its views, for widths that teach
    once: around.Once = field(default_factory=around.Once)


check_recipe = must_be("a SlimRecipe", lambda value: isinstance(value, SlimRecipe))


def _modules(name: str, given: Any) -> list[nn.Module]:
    several = isinstance(given, Iterable) and (not isinstance(given, nn.Module) or isinstance(given, nn.ModuleList))
    modules = list(given) if several else [given]
    for module in modules:
        if not isinstance(module, nn.Module):
            raise UsageError(f"SlimRecipe: {name} must be a list of modules, got {module!r}")
    return modules


def _weight_of_each(widths: Sequence[float], loss_weights: LossWeights) -> dict[float, float]:
    if isinstance(loss_weights, str):
        loss_weights = width_weights(widths, loss_weights)
    if not isinstance(loss_weights, Mapping):
        if not hasattr(loss_weights, "__len__"):
            raise UsageError(f"SlimRecipe: loss_weights must be a mode, a list or a dict, got {loss_weights!r}")
        if len(loss_weights) != len(widths):
            raise WidthError(f"SlimRecipe: loss_weights {loss_weights!r} do not match the widths {widths}")
        loss_weights = dict(zip(widths, loss_weights, strict=True))
    if set(loss_weights) != set(widths):
        raise WidthError(f"SlimRecipe: loss_weights are for {sorted(loss_weights)}, the model has {sorted(widths)}")
    for width, weight in loss_weights.items():
        if not 0 <= number_or_nan(weight) < math.inf:
            raise WidthError(f"SlimRecipe: the loss weight of width {width} must be a number from 0, got {weight!r}")
    return {width: float(loss_weights[width]) for width in widths}
