"""Of how many of timm's families do Torch-Pruning and Model Optimizer make a network of half width, beside slimmable?

    python -m benchmarks.families                       # what is not in the results yet, an hour
    python -m benchmarks.families --modules resnet --libraries slimmable

The smallest model of each of timm's model modules (`tests/convert/zoo.json`), and four usual ones, as `README`s of the
three say: all layers at half width, outputs kept. Counted are networks that run forward and backward, give outputs
of the same shape, and need at most half of the multiply-adds; not what they have learnt. Needs the packages
`torch-pruning` and `nvidia-modelopt`. Times are processor times of one thread, memory is the peak of the process over
what it held with the model. One that takes more than five minutes is stopped.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import slimmable
from benchmarks.measuring import append_rows, markdown, origin, peak_bytes, read_rows, reset_peak
from benchmarks.timm_zoo.guard import guarded

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
FIELDS = ("library", "module", "model", "seconds", "megabytes", "share", "error")
USUAL = ("resnet50", "vit_base_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224")


def ours(model: nn.Module, images: Tensor) -> nn.Module:
    """Return half of the network by slimmable."""
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=images, outputs="full", inplace=True)
    return slimmable.extract(slim, 0.5)


def torch_pruning(model: nn.Module, images: Tensor) -> nn.Module:
    """Return half of the network by Torch-Pruning."""
    import torch_pruning as tp  # type: ignore[import-not-found]

    classes = [each for each in model.modules() if isinstance(each, nn.Linear) and each.out_features == 1000]
    heads = {
        each.qkv: each.num_heads for each in model.modules() if hasattr(each, "qkv") and hasattr(each, "num_heads")
    }
    settings = {"pruning_ratio": 0.5, "ignored_layers": classes, "num_heads": heads, "prune_head_dims": True}
    tp.pruner.MagnitudePruner(model, images, importance=tp.importance.MagnitudeImportance(p=2), **settings).step()
    return model


def model_optimizer(model: nn.Module, images: Tensor) -> nn.Module:
    """Return half of the network by Model Optimizer."""
    import modelopt.torch.nas as mtn  # type: ignore[import-not-found]

    rules = {
        "nn.Conv2d": {"*": {"channels_ratio": (0.5, 1.0), "channel_divisor": 1, "kernel_size": ()}},
        "nn.Linear": {"*": {"features_ratio": (0.5, 1.0), "feature_divisor": 1}},
    }
    model = mtn.convert(model, mode=[("autonas", rules)])
    mtn.sample(model, min)
    half = mtn.get_subnet_config(model)
    mtn.sample(model, max)
    depths = {name: depth for name, depth in mtn.get_subnet_config(model).items() if name.endswith("depth")}
    mtn.select(model, half | depths)
    return mtn.export(model)  # type: ignore[no-any-return]


LIBRARIES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "slimmable": ours,
    "Torch-Pruning": torch_pruning,
    "Model Optimizer": model_optimizer,
}


PACKAGES = {"Torch-Pruning": "torch_pruning", "Model Optimizer": "modelopt.torch.nas"}


def flops(model: nn.Module, images: Tensor) -> int:
    model.requires_grad_(False)  # or the counter looks for a gradient where a layer returns a parameter
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    model.requires_grad_(True)
    return counter.get_total_flops()


def examine(library: str, name: str) -> dict[str, object]:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.rand(2, *model.pretrained_cfg["input_size"])
    scores, before = model(images), flops(model, images)
    held, start = reset_peak(), time.process_time()
    half = LIBRARIES[library](model, images)
    row: dict[str, object] = {"seconds": f"{time.process_time() - start:.2f}"}
    row["megabytes"] = f"{(peak_bytes() - held) / 2**20:.0f}"
    found = half.eval()(images)
    row["share"] = f"{flops(half, images) / before:.3f}"
    if found.shape != scores.shape:
        row["error"] = f"gives {tuple(found.shape)}, not {tuple(scores.shape)}"
    found.sum().backward()
    return row


def table(rows: list[dict[str, str]]) -> str:
    """Return the counts, the usual models and what failed, as Markdown."""
    lines, usual = [], []
    for library in LIBRARIES:
        own = [row for row in rows if row["library"] == library]
        zoo = [row for row in own if row["model"] not in USUAL]
        ran = [row for row in zoo if not row["error"]]
        thin = [row for row in ran if float(row["share"]) <= 0.5]
        lines.append((library, len(zoo), len(ran), len(thin)))
        by_model = {row["model"]: row for row in own if row["model"] in USUAL}
        for name, row in by_model.items():
            usual.append((name, library, row["seconds"], row["megabytes"], row["share"], row["error"]))
    first = markdown(("library", "families", "run, scores kept", "and half of the multiply-adds or less"), lines)
    header = ("model", "library", "seconds", "MB", "multiply-adds", "error")
    return f"{first}\n{markdown(header, sorted(usual, key=lambda row: USUAL.index(row[0])))}"


def main() -> None:
    """Do what is not done, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", help="modules of timm (default: all)")
    parser.add_argument("--libraries", nargs="+", choices=tuple(LIBRARIES), default=tuple(LIBRARIES))
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for library in PACKAGES.keys() & set(given.libraries):
        import_module(PACKAGES[library])  # here, and not in each of the processes that are timed
    zoo: dict[str, str] = json.loads((ROOT / "tests" / "convert" / "zoo.json").read_text())
    chosen = {module: zoo[module] for module in given.modules or zoo}
    path = given.out / "halves.csv"
    for module, name in [*((name, name) for name in USUAL if not given.modules), *chosen.items()]:
        for library in given.libraries:
            if (library, module) in {(row["library"], row["module"]) for row in read_rows(path)}:
                continue
            row: dict[str, Any] = dict.fromkeys(FIELDS, "") | {"library": library, "module": module, "model": name}
            row |= guarded(partial(examine, library), name, seconds=300, gib=12)
            row["error"] = row["error"][:150]
            print(" ".join(f"{key}={value}" for key, value in row.items() if value), flush=True)
            append_rows(path, FIELDS, [row])
    made = json.loads(path.with_suffix(".json").read_text())
    (given.out / "table.md").write_text(f"{table(read_rows(path))}\n{origin(made)}\n")


if __name__ == "__main__":
    main()
