"""Choosing the width on a device, by a deadline or by each image; for an ONNX file this needs no torch."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from itertools import product
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

import slimmable
from slimmable._widths import check_widths, number_or_nan, width_index
from slimmable.errors import CheckpointError, DataError, UsageError, explained

__all__ = ["Answer", "Cascade", "Session", "WidthController", "calibrate_cascade"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Confidence: TypeAlias = "Literal['probability', 'margin'] | Callable[[Any], Any]"
_TRIED = 8000  # combinations of thresholds


class WidthController:
    """Keep calls to a deadline: run each at the widest width that would have kept it in the last calls.

    A call that took `r` times the milliseconds of the table says that any width now takes `r` times as long. For the
    next call, the `quantile` of `r` over the last `window` calls is expected, as in conformal prediction (Vovk et al.
    2005): while the load stays alike, at most a share 1 - `quantile` of the calls takes longer. By default that is the
    slowest of 20. Where no width fits, the fastest runs.

    Args:
        latencies: milliseconds by width, measured on this machine: a dict, or what `slimmable.profile` returns.
        deadline_ms, quantile, window: milliseconds for a call, the share of calls to keep them, calls to look back on.

    >>> controller = WidthController({1.0: 8.0, 0.5: 3.0, 0.25: 1.0}, deadline_ms=10)
    >>> with controller.call() as width:
    ...     width  # run the network at this width, and on a GPU wait for it
    1.0
    >>> controller.record(1.0, 24.0)  # the same by hand: this one took three times as long as it should
    >>> controller.width
    0.5
    """

    def __init__(self, latencies: Any, *, deadline_ms: float, quantile: float = 0.95, window: int = 20) -> None:
        rows = getattr(latencies, "rows", None)
        self._ms = _by_width("latencies", latencies if rows is None else {row.width: row.latency_ms for row in rows})
        _check(0 < number_or_nan(deadline_ms) < math.inf, "deadline_ms must be positive", deadline_ms)
        _check(0 < number_or_nan(quantile) < 1, "quantile must be in (0, 1)", quantile)
        _check(type(window) is int and 1 <= window < 2**31, "window must be a number of calls", window)
        self._deadline, self._quantile = deadline_ms, quantile
        self._ratios: deque[float] = deque(maxlen=window)
        self.width = self._widest(1.0)
        """The width for the next call."""

    def record(self, width: float, ms: float) -> None:
        """Note that a call at `width` took `ms` milliseconds, and choose the next width."""
        width_index(width, [*self._ms])
        _check(0 <= number_or_nan(ms) < math.inf, "ms must be a number of milliseconds", ms)
        self._ratios.append(ms / self._ms[width])
        rank = math.ceil((len(self._ratios) + 1) * self._quantile)
        self.width = self._widest(sorted(self._ratios)[:rank][-1])

    @contextmanager
    def call(self) -> Iterator[float]:
        """Give the width to a block that runs the network, and record how long the block takes, unless it fails."""
        width, start = self.width, time.perf_counter()
        yield width
        self.record(width, 1000 * (time.perf_counter() - start))

    def _widest(self, ratio: float) -> float:
        fits = (width for width, ms in self._ms.items() if ms * ratio <= self._deadline)
        return next(fits, min(self._ms, key=self._ms.__getitem__))


class Session:
    """An ONNX file with all widths, as `slimmable.export` writes it, in onnxruntime; each call names its width.

    `session(images, width=0.5)` takes an array or tensor for each input of the file, and returns the like: its output,
    or a list of several. `widths` are those of the file, `macs` their multiply-adds for one image, if it names them.

    Args:
        model: path of the file, or an `onnxruntime.InferenceSession` of it, with providers and options of your own.

    Raises: CheckpointError: if it is no such file. DataError: if a call's inputs are not those of the file.
    """

    def __init__(self, model: Any) -> None:
        if isinstance(model, (str, os.PathLike)):
            with explained(f"Session: {str(model)!r} cannot be read", "; is onnxruntime installed?", CheckpointError):
                runtime = import_module("onnxruntime")
                model = runtime.InferenceSession(os.fspath(model), providers=runtime.get_available_providers())
        _check(hasattr(model, "get_modelmeta"), "model must be a path or an onnxruntime session", model)
        said = model.get_modelmeta().custom_metadata_map
        if "slimmable.widths" not in said:
            raise CheckpointError("Session: the file does not name its widths; write it with slimmable.export")
        self.session, self._order = model, json.loads(said["slimmable.widths"])
        self.widths = check_widths(self._order)
        macs = zip(self._order, json.loads(said.get("slimmable.macs", "[]")), strict=False)
        self.macs = {width: each for width, each in macs if each}  # null if unknown

    def __call__(self, *inputs: Any, width: float = 1.0) -> Any:
        """Return the outputs at one of `widths`."""
        position = np.array(width_index(width, self._order), np.int64)
        names = [each.name for each in self.session.get_inputs() if each.name != "width"]
        with explained(f"the file cannot take inputs of shapes {_shapes(inputs)}", kind=DataError):
            given = dict(zip(names, map(_array, inputs), strict=True))
            outputs = self.session.run(None, {**given, "width": position})
            if hasattr(inputs[0], "detach"):
                outputs = [import_module("torch").from_numpy(output).to(inputs[0].device) for output in outputs]
        return outputs[0] if len(outputs) == 1 else outputs


class _Module:
    """A PyTorch model, called like a `Session`; its multiply-adds are those of the first batch's images."""

    def __init__(self, model: Any) -> None:
        self.model, self.widths, self.macs = model, slimmable.widths_of(model), dict[float, float]()

    def __call__(self, *inputs: Any, width: float) -> Any:
        import torch

        from slimmable._modules import in_eval_mode

        device = next((weight.device for weight in self.model.parameters()), None)
        given = tuple(torch.as_tensor(each, device=device) for each in inputs)
        with torch.no_grad(), in_eval_mode(self.model), slimmable.at_width(self.model, width):
            scores = self.model(*given)
        if not self.macs:
            rows = slimmable.profile(self.model, example_inputs=tuple(each[:1] for each in given), repeats=0).rows
            self.macs = {row.width: row.macs for row in rows}
        return getattr(scores, "logits", scores)


class Answer(NamedTuple):
    """Scores (images, classes), the width that made each image's, and the mean cost of all that ran, NaN if unknown."""

    logits: Any
    widths: Array
    macs: float


class Cascade:
    """Run the narrowest width first, and the next wider one on those images only of which it is not sure.

    Called with a batch, it returns an `Answer`, of arrays for arrays; a PyTorch model runs in eval mode.

    Args:
        model: a converted PyTorch model, a `Session`, or what is called like one; images in, class scores out.
        threshold: how sure a width must be to answer: a number, or a list of one for each width but the widest, the
            narrowest first. A width with `math.inf` does not run, one with `-math.inf` always answers.
        confidence: the "probability" of the best class by softmax, its "margin" to the second best, or a function of
            scores (images, classes) that returns a number for each image; NaN is not sure.
        macs: cost of an image by width, in any unit; by default multiply-adds, counted, or as the file names them.

    Source: Wang et al., *IDK Cascades*, 2018, arXiv 1706.00885; here the models are the widths of one network.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> model = slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(1, 4))
    >>> logits, widths, macs = Cascade(model, 0.9)(torch.zeros(2, 4))
    >>> logits.shape, widths, macs  # 28 at half width, and 56 more
    (torch.Size([2, 3]), array([1., 1.]), 84.0)
    """

    def __init__(self, model: Any, threshold: Any, *, confidence: Confidence = "probability", macs: Any = None) -> None:
        is_module = hasattr(model, "named_modules") and not isinstance(model, type)
        _check(is_module or hasattr(model, "widths"), "model must be a converted model or a Session", model)
        self._net: Any = _Module(model) if is_module else model
        self.widths: tuple[float, ...] = self._net.widths
        is_function = callable(confidence) and not isinstance(confidence, type)
        known = is_function or (isinstance(confidence, str) and confidence in ("probability", "margin"))
        _check(known, "confidence must be 'probability', 'margin' or a function", confidence)
        self.confidence, self._macs = confidence, None if macs is None else _by_width("macs", macs, self.widths)
        steps = self.widths[:0:-1]
        given: Any = [*threshold] if isinstance(threshold, (Sequence, np.ndarray)) else [threshold] * len(steps)
        fit = len(given) == len(steps) and not any(math.isnan(number_or_nan(each)) for each in given)
        _check(fit, f"threshold must be a number, or one for each of the widths {steps}", threshold)
        self.thresholds = dict(zip(steps, map(float, given), strict=True))
        """Width -> how sure it must be to answer, from the narrowest; the widest always answers."""

    def __call__(self, *inputs: Any) -> Answer:
        """Return the `Answer` for a batch, the first axis of each input of the model."""
        left, logits, ran = np.arange(len(inputs[0])), None, {}
        widths = np.ones(len(left))
        for width, threshold in {**self.thresholds, self.widths[0]: -math.inf}.items():
            if threshold < math.inf and (logits is None or len(left)):
                scores = self._scores([each[left] for each in inputs], width)
                logits = deepcopy(scores) if logits is None else logits
                logits[left], widths[left], ran[width] = scores, width, len(left)
                left = left[self._sureness(scores) < threshold]
        spent = sum(self.macs.get(width, math.nan) * images for width, images in ran.items())
        return Answer(logits, widths, spent / max(1, len(widths)))

    @property
    def macs(self) -> Mapping[float, float]:
        """The cost of an image by width; of a PyTorch model, the multiply-adds of an image of the first batch."""
        return self._macs or getattr(self._net, "macs", {})

    def _scores(self, inputs: Sequence[Any], width: float) -> Any:
        with explained(f"Cascade: the model cannot take inputs of shapes {_shapes(inputs)}", kind=DataError):
            scores = self._net(*inputs, width=width)
        if len(getattr(scores, "shape", ())) != 2 or len(scores) != len(inputs[0]):
            raise DataError(f"Cascade: the model must return scores (images, classes), got {_shapes([scores])}")
        return scores

    def _sureness(self, scores: Any) -> Array:
        """Return how sure each image's scores are; minus infinity for NaN."""
        if callable(self.confidence):
            sure = _array(self.confidence(scores))
            _check(sure.shape == (len(scores),), "confidence must return a number for each image", sure)
        else:
            exact = _array(scores).astype(float)
            powers = np.exp(exact - exact.max(1, keepdims=True))
            best = np.sort(powers / powers.sum(1, keepdims=True), 1)
            sure = best[:, -1] - (best[:, -2] if self.confidence == "margin" else 0)
        return np.where(np.isnan(sure), -np.inf, sure)


def calibrate_cascade(
    model: Any, loader: Iterable[Any], target: float, *, of: Literal["accuracy", "macs"] = "accuracy", **options: Any
) -> Cascade:
    """Return a `Cascade` of `model`, or a given one, with thresholds chosen on held-out images.

    With `of="accuracy"` it is the cheapest with at least the share `target` of the full width's accuracy, with
    `of="macs"` the most accurate that costs at most the share `target` of the full width, on average. Widths that are
    not worth running do not run. On these images no fixed width is better. Hold out some thousand untrained images.

    Args:
        model, options: as for `Cascade`, such as `confidence`.
        loader: batches (images, class numbers); of a model with several inputs, the class numbers come last.
        target, of: a share of the full width's accuracy or "macs", in (0, 1].

    Raises: UsageError: if the narrowest width costs more than `target`. DataError: if the model gives no class scores.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> model = slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(1, 4))
    >>> held_out = [(torch.rand(20, 4), torch.arange(20) % 3)]
    >>> list(calibrate_cascade(model, held_out, 0.99, confidence="margin").thresholds)
    [0.5]
    """
    cascade: Cascade = model if isinstance(model, Cascade) else Cascade(model, math.inf, **options)
    _check(0 < number_or_nan(target) <= 1, "target must be in (0, 1]", target)
    _check(isinstance(of, str) and of in ("accuracy", "macs"), "of must be 'accuracy' or 'macs'", of)
    order, parts = (*cascade.thresholds, cascade.widths[0]), []
    for batch in loader if isinstance(loader, Iterable) else [loader]:
        pair = isinstance(batch, (tuple, list)) and len(batch) > 1
        _check(pair, "loader must give batches (images, class numbers)", batch)
        scores = [cascade._scores(batch[:-1], width) for width in order]
        with explained("loader must give class numbers", kind=DataError):
            labels, classes = _array(batch[-1]), scores[0].shape[1]
        fit = labels.shape == scores[0].shape[:1] and labels.dtype.kind in "iu" and len(labels) > 0
        fit = fit and 0 <= labels.min() <= labels.max() < classes
        _check(fit, f"loader must give a class number below {classes} for each image", batch)
        parts.append([[cascade._sureness(x), _array(x).argmax(1) != labels] for x in scores])
    _check(bool(parts), "loader must give batches (images, class numbers)", loader)
    _check({*order} <= {*cascade.macs}, "macs must be given, as the file does not name multiply-adds", cascade.macs)
    sure, wrong = np.concatenate(parts, 2).swapaxes(0, 1)  # of each width and image
    share = np.array([cascade.macs[width] for width in order]) / cascade.macs[order[-1]]
    ends = np.linspace(0, 1, max(2, int(_TRIED ** (1 / max(1, len(order) - 1))) - 1))
    tried = [[-math.inf, *np.quantile(each, ends, method="lower")[1:], math.inf] for each in sure[:-1]]
    means = []
    for chosen in product(*reversed(tried)):
        errors, spent = wrong[-1], np.array(share[-1])  # of each image that gets to a step
        for threshold, at, is_wrong, cost in zip(chosen, sure[-2::-1], wrong[-2::-1], share[-2::-1], strict=True):
            if threshold < math.inf:
                goes_on = at < threshold
                errors, spent = np.where(goes_on, errors, is_wrong), cost + goes_on * spent
        means.append((float(errors.mean()), float(spent.mean()), chosen[::-1]))
    most = 1 - target * (1 - wrong[-1].mean()) if of == "accuracy" else 1.0
    fits = [each for each in means if each[0] <= most + 1e-9 and (of == "accuracy" or each[1] <= target + 1e-9)]
    _check(bool(fits), f"target must be at least {share[0]:.3f}, which the narrowest width costs", target)
    best = min(fits, key=lambda each: each[1::-1] if of == "accuracy" else each[:2])
    cascade.thresholds = dict(zip(order[:-1], best[2], strict=True))
    return cascade


def _check(holds: bool, what: str, value: object) -> None:
    if not holds:
        raise UsageError(f"{what}, got {value!r:.80}")


def _by_width(what: str, given: Any, widths: Iterable[float] = ()) -> dict[float, float]:
    """Return positive numbers by width, the widest first."""
    holds = isinstance(given, Mapping) and given and set(widths) <= set(given)
    holds = holds and all(0 < number_or_nan(width) <= 1 for width in given)
    holds = holds and all(0 < number_or_nan(each) < math.inf for each in given.values())
    _check(bool(holds), f"{what} must be a positive number for each width", given)
    return dict(sorted(given.items(), reverse=True))


def _shapes(inputs: Iterable[Any]) -> str:
    return ", ".join(str(tuple(each.shape)) if hasattr(each, "shape") else type(each).__name__ for each in inputs)


def _array(value: Any) -> Array:
    """Return the numbers of an array or of a tensor, on any device, as an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
    return np.asarray(value)
