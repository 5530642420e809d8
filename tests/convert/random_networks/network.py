"""Random networks: a list of drawn steps becomes a module in which functional operations, caches and layers meet.

A `Layout` prints as the code that makes it, so an example that fails can be pasted into a test:

    Network(Layout(("image",), (Step("conv", 0, 8, 0), Step("relu", 0, 8, 0)), (Output("scores", 0, 0),), "one"))

A step that does not fit the value that it is given (a convolution of a vector) is left out, so any list of steps makes
a network, and a failing one gets smaller by leaving steps out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convert.random_networks import axes, idioms, layers, norms  # noqa: F401  which fill the tables of operations
from tests.convert.random_networks.parts import BINARY, UNARY, Part, UnfitError, channels, forget, need, weight

BATCH, CLASSES, LARGEST = 2, 5, 1536  # the last one: elements of a value, per image
AGAIN = ("again", "twice", "tied")  # steps that use an earlier part once more


class Step(NamedTuple):
    """An operation, which value it reads (0 is the last one), how many units it makes, and in which variant."""

    operation: str
    back: int
    units: int
    variant: int

    def __repr__(self) -> str:
        return f"Step({self.operation!r}, {self.back}, {self.units}, {self.variant})"


class Output(NamedTuple):
    """What is given out, made of which value (0 is the last one), and in which variant."""

    kind: str
    back: int
    variant: int

    def __repr__(self) -> str:
        return f"Output({self.kind!r}, {self.back}, {self.variant})"


class Layout(NamedTuple):
    """The inputs, steps and outputs of a network, and the container of its outputs."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    container: str

    def __repr__(self) -> str:
        return f"Layout({self.inputs}, {self.steps}, {self.outputs}, {self.container!r})"


# -- inputs, outputs and the network
def made_inputs(names: tuple[str, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"image": (3, 8, 8), "tokens": (9, 6), "vector": (7,), "image 2": (3, 8, 8)}
    found = []
    for name in names:
        if name == "ids":
            found.append(torch.randint(0, 6, (BATCH, 9), generator=generator))
        else:
            found.append(torch.randn(BATCH, *shapes[name], generator=generator, dtype=torch.float64))
    return tuple(found)


def pooled(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.mean((2, 3)) if x.ndim == 4 else x.flatten(1, -2).mean(1)


def head(m: Part, x: Tensor, kind: str, variant: int) -> Callable[..., Any]:
    """Return what makes an output of a value."""
    c, tail = x.shape[channels(x)], variant % 6
    bounded: Callable[[Tensor, int], Tensor] = (
        lambda y, axis: y,
        lambda y, axis: y.softmax(axis),
        lambda y, axis: F.log_softmax(y, dim=axis),
        lambda y, axis: y.sigmoid(),
        lambda y, axis: F.normalize(y, dim=axis) * 4,
        lambda y, axis: y.tanh().clamp(-0.9, 0.9),
    )[tail]
    if kind == "dense":
        if x.ndim == 3:
            m.layer = nn.Linear(c, CLASSES)
            return lambda m, x: bounded(m.layer(x), -1)
        need(x.ndim == 4)
        if tail == 5:
            m.conv = nn.Conv2d(c, 12, 1)
            return lambda m, x: F.pixel_shuffle(m.conv(x), 2).tanh()
        m.conv, m.weight = nn.Conv2d(c, CLASSES, 3, padding=1), weight(CLASSES, c, 1, 1)
        if tail == 0:
            return lambda m, x: F.interpolate(F.conv2d(x, m.weight), scale_factor=2.0, mode="bilinear")
        return lambda m, x: F.interpolate(bounded(m.conv(x), 1), size=(8, 8))
    if kind == "scores":
        m.layer, m.weight = nn.Linear(c, CLASSES), weight(CLASSES, c)
        if tail == 4:
            return lambda m, x: F.linear(F.normalize(pooled(x), dim=1), F.normalize(m.weight, dim=1)) * 4
        return lambda m, x: bounded(m.layer(pooled(x)), 1)
    if kind == "embedding":
        m.layer, m.norm = nn.Linear(c, 6), nn.BatchNorm1d(6)
        m.predictor = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        encode: Callable[..., Tensor] = (
            (lambda m, x: m.layer(pooled(x)))
            if tail % 2
            else (lambda m, x: F.normalize(m.norm(m.layer(pooled(x))), dim=1))
        )

        def run(m: Part, x: Tensor) -> Any:
            z = encode(m, x)
            if tail < 2:
                return z, m.predictor(z)
            if tail < 4:
                return m.predictor(z), z.detach()
            other = encode(m, x.flip(0))
            return m.predictor(z), m.predictor(other), z.detach(), other.detach()

        return run
    need(kind == "features")
    return lambda m, x: x


@dataclass
class Result:
    """A dataclass of outputs, as of transformers."""

    scores: Any
    more: Any = None


@dataclass(frozen=True)
class Wire:
    """Which values a part reads; not a tuple of integers, which would be traced as sizes."""

    sources: tuple[int, ...]


CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "one": lambda found: found[0] if len(found) == 1 else tuple(found),
    "list": list,
    "dict": lambda found: {f"output {i}": each for i, each in enumerate(found)},
    "dataclass": lambda found: Result(found[0], found[1:]),
}


class Network(nn.Module):
    """The network of a layout; `layout` holds the steps that fit."""

    def __init__(self, layout: Layout):
        super().__init__()
        torch.manual_seed(0)
        forget()
        self.parts, self.heads = nn.ModuleList(), nn.ModuleList()
        self.wires: list[Wire] = []
        self.head_wires: list[Wire] = []
        self.container = layout.container
        values: list[Any] = list(made_inputs(layout.inputs))
        self.kept: list[bool] = []  # for each output, whether it must keep its size
        self.used: set[int] = set()
        self.values = values
        with torch.no_grad():
            for i, name in enumerate(layout.inputs):
                if name == "ids":
                    self._embed(i)
            steps = tuple(filter(None, map(self._add, layout.steps)))
            outputs = tuple(filter(None, map(self._add_output, layout.outputs)))
            leaves = [i for i, value in enumerate(values) if i not in self.used and value.dtype == torch.float64]
            self.leaves = Wire(tuple(leaves))
            total = sum(pooled(values[i]).shape[1] for i in leaves)
            self.head = nn.Linear(max(total, 1), CLASSES).double()  # not used if every value is read
            self.classes = len(leaves) > 0
            self.kept = [True] * self.classes + self.kept
        del self.values
        self.layout = Layout(layout.inputs, steps, outputs, layout.container)
        self.operations = {step.operation for step in steps}
        self.eval()

    def _embed(self, i: int) -> None:
        part = Part("embedding")
        part.table = nn.Embedding(6, 8)
        part.run = lambda m, x: m.table(x)
        self._append(part.double(), (i,))

    def _append(self, part: Part, sources: tuple[int, ...]) -> None:
        """Add a part, if it runs.

        Raises: UnfitError: if it does not, or what it makes is too large.
        """
        try:
            out = part(*(self.values[i].clone() for i in sources))
        except Exception as error:  # whatever says that it does not fit
            raise UnfitError from error
        found = list(out) if isinstance(out, (tuple, list)) else [out]
        for value in found:
            need(2 <= value.ndim <= 5, value.shape[0] == BATCH, value[0].numel() <= LARGEST, value.numel())
            need(all(size > 0 for size in value.shape), value.isfinite().all(), value.abs().max() < 1e3)
        self.parts.append(part)
        self.wires.append(Wire(sources))
        self.values += found
        self.used.update(sources)

    def _add(self, step: Step) -> Step | None:
        """Add a step to the first value that it fits, from `back` on; return it with that place."""
        for back in range(len(self.values)):
            back = (step.back + back) % len(self.values)
            source = len(self.values) - 1 - back
            try:
                need(self.values[source].dtype == torch.float64)
                if step.operation in AGAIN:
                    self._again(step, source)
                elif step.operation in UNARY:
                    part = Part(step.operation)
                    part.run = UNARY[step.operation](part, self.values[source], step.units, step.variant)
                    self._append(part.double(), (source,))
                else:
                    self._join(step, source)
            except (UnfitError, IndexError):
                continue
            return step._replace(back=back)
        return None

    def _join(self, step: Step, source: int) -> None:
        for other in reversed(range(len(self.values))):
            if other == source or self.values[other].dtype != torch.float64:
                continue
            part = Part(step.operation)
            try:
                values = self.values[source], self.values[other]
                part.run = BINARY[step.operation](part, *values, step.units, step.variant)
                self._append(part.double(), (source, other))
            except UnfitError:
                continue
            return
        raise UnfitError

    def _again(self, step: Step, source: int) -> None:
        """Use an earlier part a second time, on another value, several times, or its weight transposed."""
        for earlier in reversed(range(len(self.parts))):
            part = self.parts[earlier]
            if len(self.wires[earlier].sources) != 1 or not list(part.parameters()):
                continue
            if step.operation == "tied":
                weights = [p for p in part.parameters() if p.ndim == 2]
                if not weights or weights[0].shape[0] != self.values[source].shape[-1]:
                    continue
                tied = Part("tied")
                tied.weight = weights[0]
                tied.run = (lambda m, x: x @ m.weight, lambda m, x: F.linear(x, m.weight.t()))[step.variant % 2]
                return self._append(tied, (source,))
            if self.wires[earlier].sources[0] == source and step.operation == "again":
                continue
            try:
                if step.operation == "again":
                    return self._append(part, (source,))
                twice = Part("twice")
                twice.part = part
                twice.run = lambda m, x: m.part(m.part(x) * 0.5 + x)
                return self._append(twice, (source,))
            except UnfitError:
                continue
        raise UnfitError

    def _add_output(self, output: Output) -> Output | None:
        for back in range(len(self.values)):
            back = (output.back + back) % len(self.values)
            source = len(self.values) - 1 - back
            value, part = self.values[source], Part(output.kind)
            try:
                need(value.dtype == torch.float64)
                part.run = head(part, value, output.kind, output.variant)
            except UnfitError:
                continue
            made = part.double()(value.clone())
            self.heads.append(part)
            self.kept += [output.kind != "features"] * (len(made) if isinstance(made, tuple) else 1)
            self.head_wires.append(Wire((source,)))
            self.used.add(source)
            return output._replace(back=back)
        return None

    def forward(self, *inputs: Tensor) -> Any:
        values = list(inputs)
        for part, wire in zip(self.parts, self.wires, strict=True):
            out = part(*(values[i] for i in wire.sources))
            values += out if isinstance(out, (tuple, list)) else [out]
        found = [
            part(*(values[i] for i in wire.sources)) for part, wire in zip(self.heads, self.head_wires, strict=True)
        ]
        if self.classes:
            found.insert(0, self.head(torch.cat([pooled(values[i]) for i in self.leaves.sources], 1)))
        return CONTAINERS[self.container](found)
