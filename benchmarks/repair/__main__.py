"""What does `slimmable.repair` give: how accurate are narrow networks of a network that was trained at full width only?

    python -m benchmarks.repair            # four small networks, one seed; some minutes
    python -m benchmarks.repair --seeds 3  # goes on from what is in the results

A plain timm model learns scikit-learn's handwritten digits, is cut to a narrow width and tested on held-out digits:
as it was cut, with new BatchNorm statistics, and repaired, all with the same training images without their labels; and
after the narrow networks have learned the labels for an epoch. Beside them stands what Torch-Pruning makes at the same
share of channels, with new statistics, if it is installed (`pip install --no-deps torch-pruning`).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import slimmable
from benchmarks.importance.run import BATCH, Digits, accuracy, digits, train
from benchmarks.measuring import append_rows, environment, markdown, origin, read_rows

HERE = Path(__file__).parent
EPOCHS = {"test_resnet": 15, "test_vit": 20, "test_convnext": 15, "test_efficientnet": 15}
SIZES = {"test_convnext": 32}  # which halves its images too often for 16 pixels
WIDTHS = (0.5, 0.25)
FIELDS = ("model", "seed", "width", "network", "macs", "accuracy", "after_an_epoch", "seconds")


def trained(name: str, seed: int) -> tuple[nn.Module, Digits]:
    """Return a network trained at full width, and its data."""
    data = digits(seed)
    if name in SIZES:
        for part in ("train", "test"):
            setattr(data, part, F.interpolate(getattr(data, part), size=SIZES[name], mode="bilinear"))
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4} if name == "test_vit" else {}
    model = timm.create_model(name, in_chans=1, num_classes=10, **sizes)
    train(model, data, EPOCHS[name])
    return model, data


def taught(net: nn.Module, data: Digits, seed: int) -> None:
    """Train a network for an epoch, with labels, at a low learning rate."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(net.requires_grad_().parameters(), 2e-4)
    net.train()
    for batch in order.split(BATCH)[: len(order) // BATCH]:
        optimizer.zero_grad()
        F.cross_entropy(net(data.train[batch]), data.train_labels[batch]).backward()
        optimizer.step()


def by_activation(data: Digits) -> slimmable.analysis.importance.Importance:
    """Return an importance: the L1 norm of the weights that read a unit, times the mean size of what they read."""

    def importance(model: nn.Module, plan: Any) -> list[Any]:
        sizes: dict[str, Any] = {}

        def note(path: str, layer: nn.Module, args: Any, output: Any) -> None:
            axis = 1 if isinstance(layer, nn.Conv2d) else -1
            sizes[path] = args[0].abs().movedim(axis, -1).flatten(0, -2).mean(0).numpy()

        layers = [(path, layer) for path, layer in model.named_modules() if type(layer) in (nn.Conv2d, nn.Linear)]
        hooks = [layer.register_forward_hook(lambda *call, path=path: note(path, *call)) for path, layer in layers]
        with torch.no_grad():
            model.eval()(data.batches()[0])
        for hook in hooks:
            hook.remove()
        scores = [np.zeros(group.units) for group in plan.groups]
        for score, group in zip(scores, plan.groups, strict=True):
            for (path, name, axis), units in group.members.items():
                if name == "weight" and axis == 1 and len(sizes.get(path, ())) == len(units):
                    weight = model.get_submodule(path).weight.detach().abs().transpose(0, 1).flatten(1).sum(1).numpy()
                    np.add.at(score, units[units >= 0], (weight * sizes[path])[units >= 0])
        return scores

    return importance


def by_taylor(data: Digits) -> slimmable.analysis.importance.Importance:
    """Return an importance: the squared first-order change of the loss without a unit's weights (Molchanov 2019)."""

    def importance(model: nn.Module, plan: Any) -> list[Any]:
        model = copy.deepcopy(model).eval()
        F.cross_entropy(model(data.train[:512]), data.train_labels[:512]).backward()
        scores = [np.zeros(group.units) for group in plan.groups]
        for score, group in zip(scores, plan.groups, strict=True):
            for (path, name, axis), units in group.members.items():
                tensor = model.get_submodule(path)._parameters.get(name)
                if tensor is not None and tensor.grad is not None and path in group.makers and axis == 0:
                    change = (
                        (tensor * tensor.grad).detach().flatten(1).sum(1) if tensor.ndim > 1 else tensor * tensor.grad
                    )
                    np.add.at(score, units[units >= 0], change.detach().square().numpy()[units >= 0])
        return scores

    return importance


def torch_pruning(model: nn.Module, data: Digits, width: float) -> nn.Module:
    """Return what Torch-Pruning leaves of a network, by the L1 norm of groups, with new BatchNorm statistics."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    attentions = [module for module in model.modules() if hasattr(module, "qkv")]
    for module in attentions:
        module.fused_attn = False
    pruner = tp.pruner.MagnitudePruner(
        model,
        data.test[:2],
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=1 - width,
        ignored_layers=[model.get_classifier()],
        num_heads={module.qkv: module.num_heads for module in attentions},
        prune_num_heads=True,
        head_pruning_ratio=1 - max(width, *(1 / module.num_heads for module in attentions), 0),  # not all
    )
    pruner.step()
    for module in attentions:
        module.num_heads = pruner.num_heads[module.qkv]
        module.head_dim = module.qkv.out_features // (3 * module.num_heads)
        module.attn_dim = module.num_heads * module.head_dim
    for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
        norm.reset_running_stats()
        norm.train().momentum = None
    with torch.no_grad():
        for batch in data.batches():
            model(batch)
    return model.eval()


def networks(model: nn.Module, data: Digits, width: float) -> Iterator[tuple[str, nn.Module, float]]:
    """Yield the narrow networks, with the seconds that each took to make."""
    start = time.perf_counter()
    slim = slimmable.slimify(model, (1.0, width), example_inputs=data.test[:2], importance="magnitude")
    yield "cut", slimmable.extract(slim, width), time.perf_counter() - start
    slimmable.calibrate_bn(slim, data.batches(), [width])
    yield "statistics", slimmable.extract(slim, width), time.perf_counter() - start
    orders = {"repaired": "magnitude", "by activation": by_activation(data), "by Taylor": by_taylor(data)}
    for name, importance in orders.items():
        start = time.perf_counter()
        yield name, slimmable.repair(model, data.batches(), width, importance=importance), time.perf_counter() - start
    start = time.perf_counter()
    try:
        pruned = torch_pruning(model, data, width)
    except ImportError:
        print("Torch-Pruning is not installed; its rows stay empty")
        return
    yield "Torch-Pruning", pruned, time.perf_counter() - start


def table(rows: list[dict[str, str]]) -> str:
    """Return the mean accuracies over the seeds as Markdown: right after the cut / after an epoch with labels."""
    kinds = list(dict.fromkeys(row["network"] for row in rows if row["network"] != "full"))
    lines = []
    for model, width in dict.fromkeys((row["model"], row["width"]) for row in rows if row["network"] != "full"):
        cells = []
        for kind in ("full", *kinds):
            own = [row for row in rows if row["model"] == model and row["network"] == kind]
            own = [row for row in own if row["width"] in ("1.0", width)]
            means = [
                f"{sum(values) / len(values):.1f}"
                for name in ("accuracy", "after_an_epoch")
                if (values := [float(row[name]) for row in own if row[name]])
            ]
            cells.append(" / ".join(means))
        lines.append((model, len({row["seed"] for row in rows if row["model"] == model}), width, *cells))
    return markdown(("model", "seeds", "width", "full", *kinds), lines)


def main() -> None:
    """Train, cut, repair and test what the results lack; write all figures, and the table of their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=tuple(EPOCHS), choices=tuple(EPOCHS))
    parser.add_argument("--seeds", type=int, default=1, help="networks trained of each model, each with its own split")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    given = parser.parse_args()
    path = given.out / "digits.csv"
    for seed in range(given.seeds):
        for name in given.models:
            if any((row["model"], row["seed"]) == (name, str(seed)) for row in read_rows(path)):
                continue
            model, data = trained(name, seed)
            found = [(1.0, "full", model, 0.0)]
            found += [(width, *made) for width in WIDTHS for made in networks(model, data, width)]
            rows = []
            for width, kind, net, seconds in found:
                right, later = accuracy(net, data.test, data.test_labels), ""
                (cost,) = slimmable.profile(net, tuple(data.test.shape[1:]), repeats=0).rows
                if kind != "full":
                    taught(net, data, seed)
                    later = f"{accuracy(net, data.test, data.test_labels):.2f}"
                row = (name, seed, width, kind, cost.macs, f"{right:.2f}", later, f"{seconds:.1f}")
                rows.append(dict(zip(FIELDS, row, strict=True)))
            append_rows(path, FIELDS, rows)
            print(table(read_rows(path)), flush=True)
    (given.out / "table.md").write_text(table(read_rows(path)) + "\n" + origin(environment()) + "\n")


if __name__ == "__main__":
    main()
