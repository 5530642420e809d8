"""Latency tables: times of a model's layers by their sizes, from which those of whole sub-networks are predicted."""

import json
import platform
import random
import statistics
import tempfile
import time
import timeit
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from slimmable._atomic import write_aside
from slimmable._checks import check_whole, checked
from slimmable._convert import extract, plan as plan_of
from slimmable._inputs import Arguments, example_of, tensors
from slimmable._modules import in_eval_mode
from slimmable._profile import Profile
from slimmable._widths import kept_of
from slimmable.analysis.plan import Plan, Setting, SubNetwork
from slimmable.deploy.export import export
from slimmable.deploy.onnx import save_onnx, to_onnx
from slimmable.deploy.programs import quiet
from slimmable.errors import CheckpointError, UsageError, explained, require
from slimmable.runtime import Session

_NETWORKS, _ROUNDS = 24, 30  # random sub-networks; timings, of which the least counts: other programs only add time


@dataclass(frozen=True)
class LatencyTable:
    """Times of a model's layers by their sizes on one machine, from which those of its sub-networks are predicted.

    A layer's time is bilinear in the first two sizes of its weight. A prediction is the sum over all layers, with a
    factor for each class, and of what is no layer. The factors are fitted to whole sub-networks, and none is negative.

    Attributes:
        layers: `path`, `class` and `parameter` of each call of a layer, the measured `sizes` and `ms`, and their `fit`.
        factors: by class of layer, and milliseconds for "a forward", "million macs" and "million parameters".
        parameters: name -> shape of each parameter of the full model, by which another model is refused.
        about: the runtime, the shapes of the inputs, the threads, the machine and torch's version.

    >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    >>> model = slimmable.slimify(net, (1.0, 0.25), example_inputs=torch.zeros(1, 64))
    >>> table = slimmable.deploy.LatencyTable.measure(model, torch.zeros(1, 64))
    >>> table.predict(slimmable.plan(model), 0.25) > 0
    True
    """

    layers: list[dict[str, Any]]
    factors: dict[str, float]
    parameters: dict[str, str]
    about: dict[str, Any]

    @classmethod
    @checked
    def measure(
        cls, model: nn.Module, example_inputs: Any = None, runtime: Literal["torch", "onnxruntime"] = "torch"
    ) -> "LatencyTable":
        """Measure the widths of `model` and 24 random sub-networks, in processor time of all threads together.

        Args:
            model: a model on the CPU that `slimify` has returned; it is not changed.
            example_inputs: as for `slimify`; they are what is measured, best with `torch.set_num_threads(1)`.
            runtime: what runs the whole sub-networks; the layers are always measured in torch.

        Raises: ConversionError: if `model` was not converted. MissingPackageError: without the extra `onnx`.
        """
        check_whole("LatencyTable.measure", model)
        if any(weight.device.type != "cpu" for weight in model.parameters()):
            raise UsageError("LatencyTable.measure times the CPU, and the model is on a GPU; pass model.cpu()")
        plan, example, draw = plan_of(model), example_of(model, example_inputs), random.Random(0)
        bounds = [*zip(plan.columns[-1].counts, plan.channels.units, strict=True)]
        subs = [*plan.columns, *(plan.near(tuple(draw.randint(*each) for each in bounds)) for _ in range(_NETWORKS))]
        with in_eval_mode(model), torch.no_grad():
            rows = [_layers(extract(model, sub.counts), example) for sub in subs]
            times = _times([extract(model, sub.counts) for sub in subs], example, runtime)
        layers = []
        for calls in zip(*rows, strict=True):
            sizes, ms = ([call[name] for call in calls] for name in ("sizes", "ms"))
            layers.append({**calls[0], "sizes": sizes, "ms": ms, "fit": _fitted([_terms(*own) for own in sizes], ms)})
        sums = [_sums(layers, sub) for sub in subs]
        factors = dict(zip(sums[0], _fitted([[*each.values()] for each in sums], times), strict=True))
        about = {"runtime": runtime, "inputs": str([tuple(tensor.shape) for tensor in tensors(example)])}
        about |= {"machine": f"{platform.node()}, {platform.platform()}", "torch": torch.__version__}
        return cls(layers, factors, _shapes(plan), {**about, "threads": torch.get_num_threads()})

    @checked
    def predict(self, plan: Plan, setting: Setting) -> float:
        """Return the milliseconds of a forward at a width or sub-network of the model with this plan.

        Raises: UsageError: if the table is of another model. WidthError: if there is no such width.
        """
        if differing := sorted({*_shapes(plan).items()} ^ {*self.parameters.items()}):
            what = "the latency table is of another model: only one of the two has {} of shape {}".format(*differing[0])
            raise UsageError(f"{what}; make a table of this model by `slimmable latency` or LatencyTable.measure")
        return sum(self.factors[name] * value for name, value in _sums(self.layers, plan.sub_network(setting)).items())

    @checked
    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        write_aside(Path(path), lambda aside: aside.write_text(json.dumps(asdict(self))))

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "LatencyTable":
        """Read a table, of any machine. Raises: CheckpointError: if the file holds none."""
        what, advice = f"LatencyTable.load: {path} holds no latency table", "; make one by `slimmable latency`"
        with explained(what, advice, CheckpointError):
            return cls(**json.loads(Path(path).read_text()))


def _shapes(plan: Plan) -> dict[str, str]:
    return {f"{path}.{name}".lstrip("."): str(tuple(shape)) for (path, name), shape in plan.channels.sizes.items()}


def _terms(first: int, second: int) -> tuple[int, ...]:
    return 1, second, first, first * second


def _sums(layers: Sequence[dict[str, Any]], sub: SubNetwork) -> dict[str, float]:
    """Return what the factors of a table are multiplied by."""
    sums = {"a forward": 1.0, "million macs": sub.macs / 1e6, "million parameters": sub.parameters / 1e6}
    for layer in layers:
        kept = [*sub.tensors.get((layer["path"], layer["parameter"]), ()), None, None]
        terms = _terms(*map(kept_of, layer["sizes"][0], kept))
        sums[layer["class"]] = sums.get(layer["class"], 0.0) + float(np.dot(terms, layer["fit"]))
    return sums


def _fitted(terms: Any, times: Sequence[float]) -> list[float]:
    """Return factors of the terms, none negative, whose sums are nearest to the times, relatively (Lee, Seung 2001)."""
    shares = np.array(terms) / np.maximum(times, 1e-6)[:, None]
    squares, factors = shares.T @ shares, 1 / shares.mean(0)
    for _ in range(5000):
        factors *= shares.sum(0) / (squares @ factors)
    return [*map(float, factors)]


def _layers(network: nn.Module, example: Arguments) -> list[dict[str, Any]]:
    """Return the calls of layers, which are leaves with parameters, in a forward of a network, which keeps hooks."""
    names = {layer: name for name, layer in network.named_modules() if layer._parameters and not layer._modules}
    started, rounds = list[float](), list[list[tuple[nn.Module, float]]]()
    for layer in names:
        layer.register_forward_pre_hook(lambda *_: started.append(time.process_time()))
        layer.register_forward_hook(lambda layer, *_: rounds[-1].append((layer, time.process_time() - started.pop())))
    for _ in range(_ROUNDS):
        rounds.append([])
        network(*example[0], **example[1])
    found = []
    for calls in zip(*rounds, strict=True):
        layer, seconds = calls[0][0], min(seconds for _, seconds in calls)
        parameter, weight = next(layer.named_parameters())
        named = {"path": names[layer], "class": type(layer).__name__, "parameter": parameter}
        found.append({**named, "sizes": [*weight.shape, 1, 1][:2], "ms": 1000 * seconds})
    return found


def _times(networks: Sequence[nn.Module], example: Arguments, runtime: str) -> list[float]:
    """Return the milliseconds of a forward of each network, the least of several rounds of all."""
    runs = list[Any](networks)
    for at, network in enumerate(networks if runtime == "onnxruntime" else ()):
        with tempfile.TemporaryDirectory() as folder, explained("torch.export cannot follow the model"), quiet():
            runs[at] = save_onnx(to_onnx(torch.export.export(network, *example)), Path(folder, "network.onnx"))
    timers = [timeit.Timer(partial(run, *example[0], **example[1]), timer=time.process_time) for run in runs]
    rounds = [[timer.timeit(1) for timer in timers] for _ in range(_ROUNDS)]
    return [1000 * min(seconds) for seconds in zip(*rounds, strict=True)]


def in_onnxruntime(model: nn.Module, images: Tensor, table: Profile, threads: int = 0) -> Profile:
    """Return the table with the median latencies of a file with all widths, on so many threads; 0: on all."""
    runtime, rows = require("onnxruntime", "onnxruntime", extra="onnx"), []
    (options := runtime.SessionOptions()).intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        export(model, path := Path(folder, "model.onnx"), example_inputs=images)
        session = Session(runtime.InferenceSession(path, options))
        for row in table.rows:
            _, *times = timeit.repeat(partial(session, images, width=row.width), number=1, repeat=6)
            rows.append(replace(row, latency_ms=1000 * statistics.median(times)))
    return Profile(tuple(rows))
