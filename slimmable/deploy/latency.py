"""Latency tables: times of a model's layers by their sizes, from which those of whole sub-networks are predicted."""

import json
import platform
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from slimmable._atomic import write_aside
from slimmable._checks import check_path, check_whole, checked
from slimmable._convert import extract
from slimmable._convert import plan as plan_of
from slimmable._inputs import Arguments, example_of, tensors
from slimmable._modules import in_eval_mode
from slimmable._widths import kept_of
from slimmable.analysis.plan import Plan, Setting, SubNetwork
from slimmable.deploy.onnx import save_onnx
from slimmable.deploy.programs import quiet
from slimmable.errors import CheckpointError, UsageError, explained

_NETWORKS, _ROUNDS = 24, 15  # random sub-networks; timings, of which the least counts: other programs only add time


@dataclass(frozen=True)
class LatencyTable:
    """Times of a model's layers by their sizes on one machine, from which those of its sub-networks are predicted.

    A layer's time is bilinear in the first two sizes of its weight. A prediction is the sum of all, each with a factor
    for its class, and a constant: these, fitted to the times of whole sub-networks, stand for what is no layer.

    Attributes:
        layers: of each call of a layer its `path`, `class`, `parameter`, the `fit` of its time, and the measurements,
            `sizes` and `ms`, of the full layer first.
        factors: by class of layer; that of "" is the constant, in milliseconds.
        parameters: name -> shape of each parameter of the full model.
        about: the runtime, the shapes of the inputs, the threads, the machine and torch's version.

    >>> import slimmable
    >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    >>> model = slimmable.slimify(net, (1.0, 0.25), example_inputs=torch.zeros(1, 64))
    >>> LatencyTable.measure(model, torch.zeros(1, 64)).predict(slimmable.plan(model), 0.25) > 0
    True
    """

    layers: list[dict[str, Any]]
    factors: dict[str, float]
    parameters: dict[str, list[int]]
    about: dict[str, Any]

    @classmethod
    @checked
    def measure(
        cls, model: nn.Module, example_inputs: Any = None, runtime: Literal["torch", "onnxruntime"] = "torch"
    ) -> "LatencyTable":
        """Measure 24 random sub-networks of `model`, and its widths: processor time if torch has one thread, or time.

        Args:
            model: a model on the CPU that `slimify` has returned; it is not changed.
            example_inputs: as for `slimify`; their batch is what is measured.
            runtime: what runs the whole sub-networks; the layers are always measured in torch.

        Raises: ConversionError: if `model` was not converted. MissingPackageError: without the extra `onnx`.
        """
        check_whole("LatencyTable.measure", model)
        plan, example, generator = plan_of(model), example_of(model, example_inputs), random.Random(0)
        bounds = [*zip(plan.columns[-1].counts, plan.channels.units, strict=True)]
        drawn = [plan.near(tuple(generator.randint(*each) for each in bounds)) for _ in range(_NETWORKS)]
        subs = [*plan.columns, *drawn]
        with in_eval_mode(model), torch.no_grad():
            rows = zip(*(_layer_times(extract(model, sub.counts), example) for sub in subs), strict=True)
            times = _fastest([_program(extract(model, sub.counts), example, runtime) for sub in subs])
        layers = []
        for named, sizes, ms in (zip(*row, strict=True) for row in rows):
            terms = np.array([_terms(each, sizes[0]) for each in sizes]) / np.array(ms)[:, None]
            fit = np.linalg.lstsq(terms, np.ones(len(ms)), rcond=None)[0].tolist()
            layers.append({**named[0], "sizes": [*sizes], "ms": [*ms], "fit": fit})
        about: dict[str, Any] = {"runtime": runtime, "inputs": [[*tensor.shape] for tensor in tensors(example)]}
        about |= {"threads": torch.get_num_threads(), "machine": f"{platform.node()}, {platform.platform()}"}
        sums = [_sums(layers, sub) for sub in subs]
        shares = np.array([[*each.values()] for each in sums]) / np.array(times)[:, None]
        factors = np.ones(len(sums[0]))
        for _ in range(20_000):  # towards least squares; by Lee and Seung's updates all stay positive
            factors *= shares.sum(0) / (shares.T @ (shares @ factors))
        found = dict(zip(sums[0], factors.tolist(), strict=True))
        return cls(layers, found, _shapes(plan), {**about, "torch": torch.__version__})

    def predict(self, plan: Plan, setting: Setting) -> float:
        """Return the milliseconds of a forward at a width or sub-network of the model with this plan.

        Raises: UsageError: if the table is of another model. WidthError: if there is no such width.
        """
        here, there = _shapes(plan), self.parameters
        for name in {**here, **there} if here != there else ():
            if here.get(name) != there.get(name):
                what = f"{name} has shape {here.get(name)}, and {there.get(name)} in the latency table"
                raise UsageError(f"{what}, which is of another model; make one of this by `slimmable latency`")
        return sum(self.factors[kind] * ms for kind, ms in _sums(self.layers, plan.sub_network(setting)).items())

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        check_path("LatencyTable.save", path=path)
        write_aside(Path(path), lambda aside: aside.write_text(json.dumps(asdict(self))))

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Read a table of any machine. Raises: CheckpointError: if the file holds none."""
        with explained(f"{path} holds no latency table", "; make one by `slimmable latency`", CheckpointError):
            return cls(**json.loads(Path(path).read_text()))


def _shapes(plan: Plan) -> dict[str, list[int]]:
    return {f"{path}.{name}".lstrip("."): [*shape] for (path, name), shape in plan.channels.sizes.items()}


def _terms(sizes: Sequence[int], full: Sequence[int]) -> Any:
    first, second, *_ = *(size / most for size, most in zip(sizes, full, strict=True)), 1.0
    return np.array([1.0, first, second, first * second])


def _sums(layers: Sequence[dict[str, Any]], sub: SubNetwork) -> dict[str, float]:
    """Return the sum of the times of all layers of each class in a sub-network, and 1 for the constant."""
    sums = {"": 1.0}
    for layer in layers:
        full, kept = layer["sizes"][0], sub.tensors.get((layer["path"], layer["parameter"]), [None, None])
        terms = _terms([*map(kept_of, full, kept)], full)
        sums[layer["class"]] = sums.get(layer["class"], 0.0) + max(0.0, float(terms @ layer["fit"]))
    return sums


def _layer_times(network: nn.Module, example: Arguments) -> list[tuple[dict[str, str], list[int], float]]:
    """Return name, first sizes and milliseconds of each call in a forward of a layer: a leaf that has parameters."""
    rounds, started = list[list[Any]](), list[float]()
    names = {layer: name for name, layer in network.named_modules() if layer._parameters and not layer._modules}
    for layer in names:
        layer.register_forward_pre_hook(lambda *_: started.append(time.process_time()))
        layer.register_forward_hook(lambda layer, *_: rounds[-1].append((layer, time.process_time() - started.pop())))
    for _ in range(_ROUNDS):
        rounds.append([])
        network(*example[0], **example[1])
    found = []
    for calls in zip(*rounds, strict=True):
        layer, ms = calls[0][0], 1000 * min(seconds for _, seconds in calls)
        parameter, weight = next(layer.named_parameters())
        named = {"path": names[layer], "class": type(layer).__name__, "parameter": parameter}
        found.append((named, [*weight.shape[:2]], ms))
    return found


def _program(network: nn.Module, example: Arguments, runtime: str) -> Callable[[], object]:
    program: Any = network
    if runtime == "onnxruntime":
        with tempfile.TemporaryDirectory() as folder, explained("torch.export cannot follow the model"), quiet():
            program = save_onnx(torch.export.export(network, *example), Path(folder, "network.onnx"))
    return partial(program, *example[0], **example[1])


def _fastest(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Return the least milliseconds of each call in several rounds of all."""
    rounds: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, times in zip(calls, rounds, strict=True):
            start = time.process_time()
            call()
            times.append(1000 * (time.process_time() - start))
    return [*map(min, rounds)]
