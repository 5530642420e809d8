"""What is tried on a GPU: each part is a generator of rows, and runs in a process of its own.

    python -m benchmarks.gpu.parts step    # one part alone; a line of JSON for each row

Images, labels and weights are random. A part raises where it finds something wrong.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

import slimmable
from benchmarks.measuring import Times, compare_wall, interleaved
from slimmable import methods, training

ROOT = Path(__file__).parents[2]
WIDTHS = (1.0, 0.75, 0.5, 0.25)
CLASSES = 1000
Row = dict[str, Any]
Call = Callable[[], object]
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Sizes:
    """On which device, and how much of everything."""

    device: str
    model: str = "resnet50"
    batch: int = 128
    image: int = 224
    forward_batches: tuple[int, ...] = (1, 16, 256)
    seconds: float = 1.0
    least: int = 6
    steps: int = 100

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    @classmethod
    def tiny(cls, device: str) -> Sizes:
        """Return sizes for a smoke run."""
        return cls(device, "resnet10t", 4, 32, (1, 2), seconds=0, least=2, steps=20)

    def converted(self) -> nn.Module:
        """Return a slimmable network on the device; always with the same weights."""
        torch.manual_seed(0)
        plain = timm.create_model(self.model, num_classes=CLASSES)
        return slimmable.slimify(plain, WIDTHS, example_inputs=torch.zeros(2, 3, 64, 64)).to(self.device)

    def images(self, count: int) -> Tensor:
        """Return random images on the device."""
        return torch.randn(count, 3, self.image, self.image, device=self.device)

    def timed(self, calls: dict[str, Call], factor: float = 1.0) -> dict[str, Times]:
        """Time the calls in turn."""
        wait = {"wait": torch.cuda.synchronize} if self.gpu else {}
        return interleaved(calls, factor * self.seconds, self.least, **wait)

    def compared(self, call: Call, baseline: Call, factor: float = 1.0) -> Row:
        """Return the time of a call against that of another."""
        times = self.timed({"call": call, "baseline": baseline}, factor)
        return compare_wall(times["call"], times["baseline"])


def take_step(network: nn.Module, run: Run, images: Tensor, recipe: slimmable.SlimRecipe | None = None) -> None:
    """Clear the gradients and make new ones, of every width with a recipe; in bfloat16 but for images in float64."""
    network.zero_grad()
    labels = torch.arange(len(images), device=images.device) % CLASSES
    for _ in [1.0] if recipe is None else recipe.widths(1.0):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.dtype == torch.float32):
            loss = F.cross_entropy(run(images), labels)
        (loss if recipe is None else recipe.loss(loss)).backward()


@torch.no_grad()
def infer(network: Run, images: Tensor) -> Tensor:
    return network(images)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], most: float) -> float:
    """Return the largest difference, over the largest number of its tensor.

    Raises: RuntimeError: if it is above `most`.
    """
    with torch.no_grad():
        shares = [(a - b).abs().max() / b.abs().max().clamp_min(1e-9) for a, b in zip(found, expected, strict=True)]
        worst = torch.stack(shares).max().item()
    if not worst <= most:  # nor if it is no number
        raise RuntimeError(f"differs by {worst:.1e}, expected at most {most:.0e}")
    return float(f"{worst:.1e}")


def run_tests(sizes: Sizes) -> Iterator[Row]:
    """The tests that need CUDA; other files are left out, since what they import may be missing."""
    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "pytest.mark.cuda" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={report}"]
        told = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest did not run: {(told.stderr or told.stdout).strip().splitlines()[-1]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    yield {"what": "CUDA tests", "passed": passed, "failed": len(failed), "skipped": len(skipped)}
    if failed or told.returncode or (sizes.gpu and not passed):
        print(told.stdout, file=sys.stderr)
        names = ", ".join(case.get("name", "?") for case in failed) or "no test passed, or pytest ended in an error"
        raise RuntimeError(f"pytest ended with {told.returncode}: {names}")


def step(sizes: Sizes) -> Iterator[Row]:
    """A step of four widths against plain steps, as torch runs it, in both memory formats."""
    for layout in (torch.contiguous_format, torch.channels_last):
        yield from _steps(sizes, f"eager, {str(layout).removeprefix('torch.')}", layout, lambda network: network)


def compiled(sizes: Sizes) -> Iterator[Row]:
    """The same, compiled."""
    backend = "inductor" if sizes.gpu else "eager"
    with torch._dynamo.config.patch(recompile_limit=64):  # all graphs are of the same `forward`
        yield from _steps(sizes, "compiled", torch.contiguous_format, partial(torch.compile, backend=backend))


def _steps(sizes: Sizes, kind: str, layout: torch.memory_format, treat: Callable[[nn.Module], Run]) -> Iterator[Row]:
    model = sizes.converted().to(memory_format=layout)
    images = sizes.images(sizes.batch).to(memory_format=layout)
    plain = [slimmable.extract(model, width).to(memory_format=layout) for width in WIDTHS]
    networks = [(network, treat(network)) for network in plain]
    four = partial(take_step, model, treat(model), images, slimmable.SlimRecipe(model))

    def apart(count: int) -> None:
        for network, run in networks[:count]:
            take_step(network, run, images)

    for against, count in (("the full plain network", 1), ("four plain networks", 4)):
        begin = time.perf_counter()
        four()
        apart(count)
        row = {"what": f"step of four widths / {against}, {kind}", "first_s": round(time.perf_counter() - begin, 1)}
        row |= sizes.compared(four, partial(apart, count), 5)
        if sizes.gpu:
            peak, baseline = (_peak_mb(call, [model, *plain]) for call in (four, partial(apart, count)))
            row |= {"peak_mb": peak, "baseline_peak_mb": baseline, "peak_ratio": round(peak / baseline, 4)}
        yield row


def _peak_mb(call: Call, models: Sequence[nn.Module]) -> float:
    """Return how much more is allocated at the peak of a step than before it, gradients included, in MB."""
    for model in models:
        model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def forward(sizes: Sizes) -> Iterator[Row]:
    """Inference with bfloat16 weights against the extracted network, and what a switch of the width takes."""
    model = sizes.converted().eval().bfloat16()
    for batch, width in itertools.product(sizes.forward_batches, WIDTHS):
        slimmable.set_width(model, width)
        images = sizes.images(batch).bfloat16()
        found = sizes.compared(partial(infer, model, images), partial(infer, slimmable.extract(model, width), images))
        yield {"what": f"forward / extracted network, width {width:g}, {batch} images", **found}
    times = sizes.timed({str(width): partial(slimmable.set_width, model, width) for width in WIDTHS})
    switches = [ms for each in times.values() for ms in each.wall]
    yield {"what": "set_width", "ms": round(statistics.median(switches), 4), "modules": len(list(model.modules()))}


def processes(sizes: Sizes) -> Iterator[Row]:
    """DistributedDataParallel, averaged gradients and SyncBatchNorm in a group of one process, in float64."""
    model, images = sizes.converted().double(), sizes.images(sizes.batch)[:16].double()
    wrapped, synchronised = copy.deepcopy(model), nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    take_step(model, model, images, slimmable.SlimRecipe(model))
    backend = "nccl" if sizes.gpu else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            parallel = DistributedDataParallel(wrapped)
            with parallel.no_sync():
                take_step(wrapped, parallel, images, slimmable.SlimRecipe(wrapped))
            training.average_gradients(parallel)
            if sizes.gpu:  # in a group, SyncBatchNorm refuses the CPU
                take_step(synchronised, synchronised, images, slimmable.SlimRecipe(synchronised))
        finally:
            dist.destroy_process_group()
    if not sizes.gpu:
        take_step(synchronised, synchronised, images, slimmable.SlimRecipe(synchronised))
    for what, network in ((f"DistributedDataParallel, {backend}", wrapped), ("SyncBatchNorm", synchronised)):
        yield {"what": what, "difference": difference(_gradients(network), _gradients(model), 1e-6)}


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def optimizers(sizes: Sizes) -> Iterator[Row]:
    """Three updates by fused optimizers against plain ones with the same gradients, in float64."""
    model, images = sizes.converted().double(), sizes.images(sizes.batch)[:16].double()
    for make in (partial(torch.optim.AdamW, lr=1e-3), partial(torch.optim.SGD, lr=1e-2, momentum=0.9)):
        plain, fused = copy.deepcopy(model), copy.deepcopy(model)
        ours, others = make(fused.parameters(), fused=True), make(plain.parameters())
        for _ in range(3):
            take_step(plain, plain, images, slimmable.SlimRecipe(plain))
            for there, here in zip(fused.parameters(), plain.parameters(), strict=True):
                there.grad = None if here.grad is None else here.grad.clone()
            ours.step()
            others.step()
        differs = difference(list(fused.parameters()), list(plain.parameters()), 1e-6)
        found = sizes.compared(ours.step, others.step)
        yield {"what": f"{make.func.__name__}, fused / not fused", "difference": differs, **found}


def graphs(sizes: Sizes) -> Iterator[Row]:
    """A CUDA graph for each width, replayed while the model is at another, for one image."""
    model, images = sizes.converted().eval().bfloat16(), sizes.images(1).bfloat16()
    captured = {}
    for width in WIDTHS:
        slimmable.set_width(model, width)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                infer(model, images)
        torch.cuda.current_stream().wait_stream(aside)
        captured[width] = torch.cuda.CUDAGraph(), infer(model, images)
        with torch.cuda.graph(captured[width][0]):
            captured[width][1].copy_(infer(model, images))
    images.copy_(torch.randn_like(images))
    for width, (graph, output) in captured.items():
        graph.replay()
        slimmable.set_width(model, width)
        differs = difference([output.float()], [infer(model, images).float()], 0.05)
        found = sizes.compared(graph.replay, partial(infer, model, images))
        yield {"what": f"CUDA graph / eager, width {width:g}, 1 image", "difference": differs, **found}


def reduced_overhead(sizes: Sizes) -> Iterator[Row]:
    """Inference compiled with mode="reduce-overhead", for one image."""
    model, images = sizes.converted().eval().bfloat16(), sizes.images(1).bfloat16()
    fast = torch.compile(model, mode="reduce-overhead")
    for width in (1.0, 0.5):
        slimmable.set_width(model, width)
        for _ in range(3):  # compiles, warms up, captures
            infer(fast, images)
        differs = difference([infer(fast, images).float()], [infer(model, images).float()], 0.05)
        found = sizes.compared(partial(infer, fast, images), partial(infer, model, images))
        yield {"what": f"reduce-overhead / eager, width {width:g}, 1 image", "difference": differs, **found}


def steps_of_methods(sizes: Sizes) -> Iterator[Row]:
    """`Method.step` in bfloat16, and how often the CPU waits for numbers of the GPU in it."""
    for kind in (methods.SimCLR, methods.MoCoV2, methods.MoCoV3, methods.BYOL, methods.VICReg, methods.Supervised):
        name = sizes.model if kind is methods.SimCLR else "resnet10t"
        method = method_of(kind, name, sizes.device)
        recipe = slimmable.SlimRecipe(method.online, distill=method.distillation())
        count = sizes.batch // method.views
        views = [sizes.images(count) for _ in range(method.views)]
        batch = methods.Batch(views, torch.arange(count, device=sizes.device))
        call = partial(method.step, recipe, batch, 1.0, autocast=torch.bfloat16)
        call()
        found = _waits(call, sizes.gpu)
        if kind is methods.SimCLR:
            found["ms"] = round(statistics.median(sizes.timed({"step": call})["step"].wall), 4)
        yield {"what": f"step of {kind.__name__}, {name}", **found}


def method_of(kind: Any, name: str, device: str) -> methods.Method:
    """Return a method for a network of timm on the device."""
    torch.manual_seed(0)
    backbone, hidden, dim = timm.create_model(name, num_classes=0), 256, 128
    sized = (CLASSES,) if kind is methods.Supervised else (hidden, dim)
    encoder = methods.Encoder(backbone, kind.projector(backbone.num_features, *sized))
    given = [slimmable.slimify(encoder, WIDTHS, example_inputs=torch.zeros(2, 3, 64, 64))]
    if kind in (methods.BYOL, methods.MoCoV3):
        given.append(slimmable.slimify(kind.predictor(hidden, dim), WIDTHS, example_inputs=torch.zeros(2, dim)))
    return kind(*given, **({"proj_dim": dim, "queue_size": 4096} if kind is methods.MoCoV2 else {})).to(device)


class _Reads(TorchFunctionMode):
    """Counts the calls that make a Python number, an array or a copy on the CPU of a tensor."""

    names = frozenset({"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.names
        return func(*args, **(kwargs or {}))


def _waits(call: Call, gpu: bool) -> Row:
    """Return how many tensors a call reads, and how often it waits for the GPU, as CUDA itself tells."""
    with _Reads() as reads:
        call()
    if not gpu:
        return {"reads": reads.count}
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in told if "called a synchronizing" in str(each.message)]
    where = sorted({f"{Path(each.filename).name}:{each.lineno}" for each in waits})
    return {"reads": reads.count, "waits": len(waits), "where": " ".join(where)}


def short_training(sizes: Sizes) -> Iterator[Row]:
    """SimCLR on coloured patterns of 8 x 8 fields, told apart through noise; the loss must fall at every width."""
    count, image = (128 if sizes.gpu else 32), 32
    method = method_of(methods.SimCLR, "resnet10t", sizes.device)
    recipe = slimmable.SlimRecipe(method.online, distill=method.distillation())
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3, fused=True)
    patterns = F.interpolate(torch.randn(4 * count, 3, 8, 8, device=sizes.device), size=image)
    losses = []
    for number in range(sizes.steps):
        chosen = patterns[torch.randperm(len(patterns), device=sizes.device)[:count]]
        views = [chosen + 0.5 * torch.randn_like(chosen) for _ in range(2)]
        optimizer.zero_grad()
        progress = number / sizes.steps
        losses.append(method.step(recipe, methods.Batch(views), progress, autocast=torch.bfloat16))
        training.average_gradients(method)
        optimizer.step()
    part = sizes.steps // 5
    for width in WIDTHS:
        first, last = (statistics.mean(loss[width] for loss in some) for some in (losses[:part], losses[-part:]))
        yield {"what": f"SimCLR, width {width:g}", "first_loss": round(first, 3), "last_loss": round(last, 3)}
        if not last < first:
            raise RuntimeError(f"the loss at width {width:g} went from {first:.3f} to {last:.3f}")


# With the seconds that each may take at most; what compiles most comes last and takes what is left.
PARTS: dict[str, tuple[Callable[[Sizes], Iterator[Row]], int]] = {
    "tests": (run_tests, 90),
    "step": (step, 75),
    "forward": (forward, 60),
    "processes": (processes, 40),
    "optimizers": (optimizers, 40),
    "graphs": (graphs, 40),
    "methods": (steps_of_methods, 60),
    "training": (short_training, 40),
    "reduce-overhead": (reduced_overhead, 90),
    "compiled": (compiled, 360),
}
NEED_GPU = ("graphs", "reduce-overhead")


def main() -> int:
    """Run one part and print its rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    given = parser.parse_args()
    if given.device == "cpu" and given.part in NEED_GPU:
        print(json.dumps({"what": "", "note": "needs a GPU"}))
        return 0
    try:
        for row in PARTS[given.part][0](Sizes.tiny(given.device) if given.tiny else Sizes(given.device)):
            print(json.dumps(row), flush=True)
    except Exception as error:
        traceback.print_exc()
        line = next(iter(str(error).strip().splitlines()), "")
        print(json.dumps({"error": f"{type(error).__name__}: {line}"[:300]}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
