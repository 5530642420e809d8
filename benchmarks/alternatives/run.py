"""What would torch's own means do in place of slimmable's trace and width view?

    python -m benchmarks.alternatives.run            # about five minutes
    python -m benchmarks.alternatives.run --quick    # a smoke run of seconds

`graphs`: can `torch.fx` and `torch.export` record the smallest models of timm's modules, and does the graph of the full
network compute the half-width one when it is given that network's weights? `symbols`: with the sizes of all parameters
symbolic, how many of the axes that `slimify` makes thinner does `torch.export` leave symbolic? `reads`: what do
`torch.nn.utils.parametrize` and `torch.func.functional_call` cost per forward at half width? `ddp`: how much does
DistributedDataParallel send for a step with one backward pass per width?
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import slimmable
from benchmarks.measuring import compare, interleaved, markdown, origin, read_results, write_result

HERE = Path(__file__).parent
ZOO = HERE.parents[1] / "tests" / "convert" / "zoo.json"
WIDTHS = (1.0, 0.5)


def agree(first: Tensor, second: Tensor) -> bool:
    """Tell whether two outputs are the same but for rounding."""
    return first.shape == second.shape and bool((first - second).abs().max() <= 1e-4 * second.abs().max())


def failure(call: Callable[[], object]) -> str:
    """Return what an attempt fails with, in one line, or an empty string."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0].split('. ')[0][:90]}"
    return ""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def graph_row(name: str) -> dict[str, Any]:
    """Say whether each way records a model, and whether what it recorded is right with the half-width weights."""
    torch.manual_seed(0)
    full = timm.create_model(name).eval()
    images = torch.randn(2, *full.pretrained_cfg["input_size"])
    slim = slimmable.slimify(full, WIDTHS).eval()
    half = slimmable.extract(slim, 0.5).eval()
    expected = half(images)

    def by_slimify(row: dict[str, Any]) -> None:
        row["recorded"] = True
        with slimmable.at_width(slim, 0.5):
            row["right"] = agree(slim(images), expected)

    def by_fx(row: dict[str, Any]) -> None:
        graph = fx.symbolic_trace(full).graph
        row["recorded"] = True
        row["right"] = agree(fx.GraphModule(half, graph)(images), expected)

    def by_export(row: dict[str, Any]) -> None:
        program = torch.export.export(full, (images,))
        row["recorded"] = True
        narrow = tensors_of(half) | program.constants
        targets = [spec.target for spec in program.graph_signature.input_specs]
        inputs = [images if target is None else narrow[target] for target in targets]
        row["right"] = agree(fx.Interpreter(program.graph_module).run(*inputs)[0], expected)

    found: dict[str, Any] = {"model": name}
    for way, attempt in (("slimify", by_slimify), ("fx", by_fx), ("export", by_export)):
        found[way] = row = {"recorded": False, "right": False}
        row["error"] = failure(lambda attempt=attempt, row=row: attempt(row))
    return found


class Functional(nn.Module):
    """A network whose parameters are inputs, so that `torch.export` may take their sizes for symbols."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = [network]  # not a submodule

    def forward(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        """Run the network with the given parameters."""
        return functional_call(self.network[0], parameters, (images,))


def is_symbolic(size: int | torch.SymInt) -> bool:
    """Tell whether a size is open after the analysis, and not settled to one number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def symbols_row(name: str) -> dict[str, Any]:
    """Count the axes that `slimify` makes thinner, and how many of them `torch.export` leaves symbolic."""
    model = timm.create_model(name).eval()
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    tensors, narrow = tensors_of(model), tensors_of(slimmable.extract(slimmable.slimify(model, WIDTHS), 0.5))
    thinner = {(key, i) for key, t in tensors.items() for i, n in enumerate(t.shape) if n != narrow[key].shape[i]}
    auto = {key: {i: torch.export.Dim.AUTO for i in range(t.ndim) if (key, i) in thinner} for key, t in tensors.items()}
    kept: set[tuple[str, int]] = set()

    def by_export() -> None:
        program = torch.export.export(Functional(model), (tensors, images), dynamic_shapes=(auto, None))
        inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
        for key, node in zip(tensors, inputs, strict=False):  # the dictionary comes first, in its order
            kept.update((key, i) for i, size in enumerate(node.meta["val"].shape) if is_symbolic(size))

    return {"model": name, "error": failure(by_export), "axes": len(thinner), "symbolic": len(thinner & kept)}


class Corner(nn.Module):
    """A parametrization: the first units of each axis."""

    def __init__(self, cut: tuple[slice, ...]) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, full: Tensor) -> Tensor:
        """Return the corner of the full tensor."""
        return full[self.cut]


def reads_rows(name: str, size: int, seconds: float, least: int) -> list[dict[str, Any]]:
    """Compare the forward pass at width 0.5, one image, with that of the extracted network."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, size, size)
    plain = timm.create_model(name).eval()
    slim = slimmable.slimify(plain, WIDTHS, example_inputs=images).eval()
    slimmable.set_width(slim, 0.5)
    half = slimmable.extract(slim, 0.5).eval()
    for path, module in half.named_modules():  # one BatchNorm per width, as in the slimmable model
        if isinstance(module, nn.BatchNorm2d):
            plain.set_submodule(path, module)
    tensors, narrow = tensors_of(plain), tensors_of(half)
    cuts = {key: tuple(map(slice, narrow[key].shape)) for key in tensors if tensors[key].shape != narrow[key].shape}
    parametrized = copy.deepcopy(plain)
    for key, cut in cuts.items():
        path, _, name_of_tensor = key.rpartition(".")
        layer = parametrized.get_submodule(path)
        parametrize.register_parametrization(layer, name_of_tensor, Corner(cut), unsafe=True)  # its shape changes
    calls: dict[str, Callable[[], Tensor]] = {
        "extracted": lambda: half(images),
        "width view": lambda: slim(images),
        "parametrize": lambda: parametrized(images),
        "functional_call": lambda: functional_call(plain, {k: tensors[k][cut] for k, cut in cuts.items()}, (images,)),
    }
    with torch.no_grad():
        right = {way: agree(call(), half(images)) for way, call in calls.items()}
        times = interleaved(calls, seconds, least)
    renamed = len(set(plain.state_dict()) - set(parametrized.state_dict()))
    changed = {"parametrize": f"{renamed} of {len(plain.state_dict())}"}
    return [
        {"model": name, "way": way, "right": right[way], "renamed": changed.get(way, "0")}
        | compare(times[way], times["extracted"])
        for way in calls
    ]


def ddp_rows(name: str) -> list[dict[str, Any]]:
    """Say what a step with one backward pass per width sends, as a multiple of the gradient's size, or how it fails."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    images, rows = torch.randn(2, 3, 64, 64), []

    def hook(state, bucket):  # without annotations: DistributedDataParallel does not take them as strings
        state.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    for option in (None, "static_graph", "find_unused_parameters"):
        model = slimmable.slimify(timm.create_model(name), (1.0, 0.75, 0.5, 0.25), example_inputs=images)
        parallel = DistributedDataParallel(model, **({option: True} if option else {}))
        sent: list[int] = []
        parallel.register_comm_hook(sent, hook)

        def two_steps(parallel: nn.Module = parallel) -> None:
            for width in 2 * slimmable.widths_of(parallel):
                slimmable.set_width(parallel, width)
                parallel(images).square().mean().backward()

        row = {"model": name, "option": option, "error": failure(two_steps)}
        rows.append(row | {"sent": sum(sent) / 2 / sum(p.numel() for p in model.parameters())})
    dist.destroy_process_group()
    return rows


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    results = {result["name"]: result for result in read_results(folder)}
    graphs, symbols = results["graphs"]["rows"], [row for row in results["symbols"]["rows"] if not row["error"]]
    n = len(graphs)
    ways, marks = ("fx", "export", "slimify"), ("recorded", "right")
    recorded = [(f"`{way}`", *(f"{sum(row[way][mark] for row in graphs)} of {n}" for mark in marks)) for way in ways]
    axes, kept = (sum(row[key] for row in symbols) for key in ("axes", "symbolic"))
    whole = sum(row["axes"] == row["symbolic"] for row in symbols)
    costs = [
        (row["way"], f"{row['ratio']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}", row["renamed"])
        for row in results["reads"]["rows"]
        if row["way"] != "extracted"
    ]
    sends = [(row["option"] or "no option", row["error"] or f"{row['sent']:.1f}") for row in results["ddp"]["rows"]]
    parts = [
        markdown(("graph", "models recorded", "right at half width"), recorded),
        f"With symbolic sizes {len(symbols)} of {n} models are exported. Of the {axes:,} axes that `slimify` makes"
        f" thinner in them, {kept:,} stay symbolic; all of them do in {whole}.\n",
        markdown(("half width, one image", "time / extracted", "95 %", "names changed"), costs),
        markdown(("DistributedDataParallel", "gradients sent in a step, times their size"), sends),
        "\n".join(sorted({origin(result) for result in results.values()})) + "\n",
    ]
    return "\n".join(parts)


def main() -> None:
    """Measure, write one result file per question, and the table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=float, default=4e6, help="largest number of parameters of a model")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="two tiny models, few repetitions: a smoke run")
    given = parser.parse_args()
    names, reads, size, seconds, least = list(json.loads(ZOO.read_text()).values()), "resnet18", 224, 10, 9
    if given.quick:
        names, reads, size, seconds, least = ["test_resnet", "test_vit"], "resnet10t", 32, 0, 3
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in timm.create_model(name).parameters()) for name in names}
    names = [name for name in names if sizes[name] <= given.most]
    with torch.no_grad():
        rows = {"graphs": [graph_row(name) for name in names], "symbols": [symbols_row(name) for name in names]}
    rows |= {"reads": reads_rows(reads, size, seconds, least), "ddp": ddp_rows(reads)}
    for kind, found in rows.items():
        write_result(given.out, kind, found, variant="half-width")
    (given.out / "table.md").write_text(table(given.out))


if __name__ == "__main__":
    main()
