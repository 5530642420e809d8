"""Two processes with half of a batch each: gradients and running statistics are those of one with the whole batch."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import slimmable
from benchmarks.training_step.saved import peak_saved_bytes
from slimmable._distributed import world_size
from slimmable.errors import DataError
from slimmable.losses import nt_xent, nt_xent_logits
from slimmable.training import average_gradients, gather, synchronised_batchnorm
from tests.two_processes import run_in_two

WIDTHS = (1.0, 0.5, 0.25)
PROGRESS = (0.1, 0.9)  # of the two steps; the first lies in the slow start


# -- a step of SimCLR, in one process or two
@functools.cache
def converted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(timm.create_model("test_resnet", num_classes=0), nn.Linear(96, 48), nn.BatchNorm1d(48))
    model.extend([nn.ReLU(), nn.Linear(48, 16)])
    return slimmable.slimify(model.double(), WIDTHS, example_inputs=torch.zeros(2, 3, 32, 32, dtype=torch.float64))


def views(dtype: torch.dtype) -> Tensor:
    """The two views of the whole batch of 6, for each of two steps: shape (2, 2, 6, 3, 32, 32)."""
    return torch.randn(2, 2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def part(tensor: Tensor, dim: int = 0) -> Tensor:
    """What this process has of a tensor: one of two halves, or all of it."""
    return tensor if world_size() == 1 else tensor.chunk(2, dim)[dist.get_rank()]


def backward_passes(model: nn.Module, recipe: slimmable.SlimRecipe, images: Tensor, progress: float) -> None:
    for _ in recipe.widths(progress):
        z0, z1 = (gather(model(view)) for view in images)
        recipe.loss(nt_xent(z0, z1), teach=nt_xent_logits(z0, z1)).backward()


def train(dtype: torch.dtype, rate: float, wrapped: bool = False) -> list[dict[str, Tensor | None]]:
    """Take two steps; return the gradients and the buffers after each."""
    model = copy.deepcopy(converted()).to(dtype).train()
    parallel = DistributedDataParallel(model) if wrapped else model
    recipe = slimmable.SlimRecipe(parallel, distill=slimmable.OnlineDistillation(), slow_start=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    found = []
    for images, progress in zip(part(views(dtype), dim=2), PROGRESS, strict=True):
        optimizer.zero_grad()
        with parallel.no_sync() if wrapped else contextlib.nullcontext(), synchronised_batchnorm():
            backward_passes(parallel, recipe, images, progress)
        average_gradients(parallel)
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        found.append(gradients | {name: buffer.clone() for name, buffer in model.named_buffers()})
        optimizer.step()
    return found


def peak_of_step(progress: float) -> int:
    """Bytes that autograd holds at most in a step on three images in two views."""
    model = copy.deepcopy(converted()).train()
    recipe = slimmable.SlimRecipe(model, distill=slimmable.OnlineDistillation(), slow_start=0.5)
    images = views(torch.float64)[0, :, :3]
    with synchronised_batchnorm():
        return peak_saved_bytes(lambda: backward_passes(model, recipe, images, progress), model)


def peak_of_summed_step() -> int:
    """The same for all widths in one graph."""
    model = copy.deepcopy(converted()).train()
    images = views(torch.float64)[0, :, :3]

    def step() -> None:
        outputs = [slimmable.run_widths(model, view) for view in images]
        sum(nt_xent(*(gather(output[width]) for output in outputs)) for width in WIDTHS).backward()

    with synchronised_batchnorm():
        return peak_saved_bytes(step, model)


def checkpointed_gradients(**options: Any) -> list[Tensor]:
    model = copy.deepcopy(converted()).train()
    images = part(views(torch.float64)[0, 0]).clone().requires_grad_()
    with synchronised_batchnorm():
        output = checkpoint(model, images, **options) if options else model(images)
        output.square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def overflowing_step(wrapped: bool) -> tuple[bool, float, bool]:
    """Take a step whose scaled gradients are too large in the second process alone.

    Return whether its own are finite, the scale afterwards, and whether the parameters are as before.
    """
    model = copy.deepcopy(converted()).float().train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.05), torch.amp.GradScaler("cpu", 2.0**100)
    own = []

    def backward(loss: Tensor) -> None:
        scaler.scale(loss).backward()
        own.extend(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def loss() -> Tensor:
        return parallel(part(views(torch.float32)[0, 0])).square().mean() * (2.0**60 if dist.get_rank() else 2.0**-60)

    parallel = DistributedDataParallel(model) if wrapped else model
    recipe = slimmable.SlimRecipe(parallel, backward=backward)
    if wrapped:
        recipe.backward(loss)
    else:
        for _ in recipe.widths(1.0):
            backward(recipe.loss(loss()))
        average_gradients(model)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    same = all(torch.equal(p, other) for p, other in zip(model.parameters(), before, strict=True))
    return all(own), scaler.get_scale(), same


# -- batch norms, with the sizes of the two processes' batches
NORMS: dict[str, dict[str, Any]] = {
    "1d": {"shapes": [(3, 5), (4, 5)]},
    "1d, long": {"shapes": [(3, 5, 7), (2, 5, 7)]},
    "2d": {"shapes": [(3, 5, 7, 2), (2, 5, 7, 2)]},
    "2d, channels last": {"shapes": [(3, 5, 7, 2), (2, 5, 7, 2)], "channels_last": True},
    "3d": {"shapes": [(1, 5, 2, 3, 2), (2, 5, 2, 3, 2)]},
    "single": {"shapes": [(3, 5, 7), (2, 5, 7)], "dtype": torch.float32},
    "single, far from zero": {"shapes": [(30, 5), (40, 5)], "dtype": torch.float32, "offset": 1e4},
    "bfloat16": {"shapes": [(3, 5, 7), (2, 5, 7)], "dtype": torch.bfloat16},
    "float16": {"shapes": [(3, 5, 7), (2, 5, 7)], "dtype": torch.float16},
    "half input, single norm": {"shapes": [(3, 5, 7), (2, 5, 7)], "dtype": torch.bfloat16, "norm_dtype": torch.float32},
    "empty in one process": {"shapes": [(0, 5), (3, 5)]},
    "one image in each": {"shapes": [(1, 5), (1, 5)], "offset": 0},
    "cumulative average": {"shapes": [(3, 5), (4, 5)], "momentum": None},
    "without gain and bias": {"shapes": [(3, 5), (4, 5)], "affine": False},
    "without statistics": {"shapes": [(3, 5), (4, 5)], "track_running_stats": False},
    "frozen input": {"shapes": [(3, 5), (4, 5)], "frozen": True},
}
CLASSES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def norm_results(
    shapes: list[tuple[int, ...]],
    rank: int | None,
    *,
    dtype: torch.dtype = torch.float64,
    norm_dtype: torch.dtype | None = None,
    offset: float = 10,
    channels_last: bool = False,
    frozen: bool = False,
    **options: Any,
) -> dict[str, Tensor | None]:
    """Two calls of a batch norm on the part of `rank`; for None on all, in float64 from the same rounded values."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(s, generator=generator, dtype=torch.float64) + offset * (1 + i) for i, s in enumerate(shapes)]
    ask = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    norm = CLASSES[len(shapes[0])](5, **options).to(norm_dtype or dtype)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
    x, ask = (torch.cat(each).to(dtype) if rank is None else each[rank].to(dtype) for each in (parts, ask))
    if rank is None:
        norm, x, ask = norm.double(), x.double(), ask.double()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_(not frozen)
    norm(x)
    y = norm(x)
    if y.requires_grad:
        (y * ask).sum().backward()
    gradients = {f"grad {name}": parameter.grad for name, parameter in norm.named_parameters()}
    return {"output": y.detach(), "grad input": x.grad, **gradients, **dict(norm.named_buffers())}


def bare_functions(rank: int) -> dict[str, Tensor]:
    """`torch.batch_norm` reached directly, and a norm in eval mode."""
    x = torch.arange(8.0).view(4, 2)[2 * rank : 2 * rank + 2]
    return {
        "native": torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        "eval": F.batch_norm(x, torch.ones(2), torch.full((2,), 4.0)),
        "native eval": torch.batch_norm(x, None, None, torch.ones(2), torch.full((2,), 4.0), False, 0.1, 1e-5, False),
    }


# -- gathers
def gathered(dtype: torch.dtype, rank: int) -> tuple[Tensor, Tensor]:
    """Gather a tensor that is not contiguous; the loss of process r is (r + 1) times the sum of cubes."""
    x = (torch.arange(6).view(3, 2) + 6 * rank).to(dtype).T.requires_grad_()
    joined = gather(x)
    ((rank + 1) * joined**3).sum().backward()
    return joined.detach(), x.grad


GATHERED = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MISTAKES: dict[str, Any] = {
    "rows": (
        lambda rank: gather(torch.zeros(2 + rank, 3)),
        r"process 0: \(2, 3\) of torch.float32; process 1: \(3, 3\)",
    ),
    "axes": (
        lambda rank: gather(torch.zeros([2] * (1 + rank))),
        r"process 0: \(2,\) of torch.float32; process 1: \(2, 2",
    ),
    "type": (lambda rank: gather(torch.zeros(2, dtype=GATHERED[rank])), "float64; process 1: .* of torch.float32"),
    "graph": (lambda rank: gather(torch.zeros(2, requires_grad=rank == 1)), "process 1: .*float32, with gradient"),
    "scalar": (lambda rank: gather(torch.zeros(())), "a scalar has no dim 0"),
    "channels": (lambda rank: in_norm(torch.zeros(4, 2 + rank)), "process 0: 2 channels of .* process 1: 3 channels"),
    "norm's graph": (lambda rank: in_norm(torch.zeros(4, 2, requires_grad=rank == 1)), "bytes, with gradient"),
    "one value": (lambda rank: in_norm(torch.zeros(rank, 2)), "1 values per channel, expected more than 1"),
    "no channels": (lambda rank: in_norm(torch.zeros(3)), r"shape \(3,\), expected \(batch, channels"),
}


def in_norm(x: Tensor) -> None:
    with synchronised_batchnorm():
        F.batch_norm(x, None, None, training=True)


def message_of(name: str, rank: int) -> str:
    try:
        MISTAKES[name][0](rank)
    except DataError as error:
        return str(error)
    return "no error"


def work(rank: int) -> dict[str, Any]:
    """What each process does: everything once, since starting a process is slow."""
    plain = F.batch_norm, torch.batch_norm
    found: dict[str, Any] = {"messages": {name: message_of(name, rank) for name in MISTAKES}}
    found["gathered"] = {str(dtype): gathered(dtype, rank) for dtype in GATHERED}
    found["labels"] = gather(torch.tensor([rank, 7]))
    found["keys"] = gather(torch.full((1, 2), 1.0 + rank, requires_grad=False)).requires_grad
    found["double"] = train(torch.float64, rate=0.05, wrapped=True)
    found["single"] = train(torch.float32, rate=0.0)
    with synchronised_batchnorm():
        found["norms"] = {name: norm_results(rank=rank, **case) for name, case in NORMS.items()}
        found["bare"] = bare_functions(rank)
    found["overflowing"] = [overflowing_step(wrapped) for wrapped in (False, True)]
    found["peaks"] = peak_of_step(0.9), peak_of_step(0.1), peak_of_summed_step()
    found["checkpointed"] = [
        checkpointed_gradients(**options) for options in ({}, {"use_reentrant": False}, {"use_reentrant": True})
    ]
    found["put back"] = (F.batch_norm, torch.batch_norm) == plain
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, Any]]:
    return run_in_two(work, tmp_path_factory.mktemp("processes"))


def test_simclr_of_two_processes_is_that_of_one_with_the_whole_batch(processes):
    expected = train(torch.float64, rate=0.05)
    narrow = [key for key in expected[0] if ".narrow." in key and key.endswith("weight")]
    assert narrow
    assert all(expected[0][key] is None and expected[1][key] is not None for key in narrow)
    for found in processes:
        for step, values in zip(found["double"], expected, strict=True):
            assert step.keys() == values.keys()
            for key, value in values.items():
                if value is None:
                    assert step[key] is None, key
                else:
                    torch.testing.assert_close(step[key], value, rtol=1e-9, atol=1e-9, msg=key)


def test_in_single_precision_they_differ_by_rounding(processes):
    """The weights stay, since a ReLU that flips by rounding would change a second step for good."""
    for step, exact in enumerate(train(torch.float64, rate=0.0)):
        expected = all_values(exact)
        for found in processes:
            assert (all_values(found["single"][step]) - expected).norm() < 5e-5 * expected.norm()


def all_values(step: dict[str, Tensor | None]) -> Tensor:
    return torch.cat([value.double().flatten() for value in step.values() if value is not None])


@pytest.mark.parametrize("name", NORMS)
def test_a_batch_norm_works_on_the_joined_batch(name, processes):
    case = NORMS[name]
    expected = norm_results(rank=None, **case)
    found = [each["norms"][name] for each in processes]
    limit = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(case.get("dtype"), 1e-10)
    limit = 5e-3 if "offset" in case and case["offset"] > 100 else limit
    for key, value in expected.items():
        parts = [each[key] for each in found]
        if value is None:
            assert parts == [None, None], key
        elif key in ("output", "grad input"):
            assert all(each.dtype == case.get("dtype", torch.float64) for each in parts)
            torch.testing.assert_close(torch.cat(parts).double(), value, rtol=limit, atol=limit, msg=key)
        elif key.startswith("grad"):  # of the own part of the loss
            torch.testing.assert_close((parts[0] + parts[1]).double(), value, rtol=limit, atol=3 * limit, msg=key)
        else:
            assert torch.equal(*parts), key
            torch.testing.assert_close(parts[0].double(), value.double(), rtol=limit, atol=limit, msg=key)
    if case.get("channels_last"):
        assert found[0]["output"].is_contiguous(memory_format=torch.channels_last)


def test_functions_that_are_reached_directly(processes):
    joined = torch.cat([found["bare"]["native"] for found in processes])
    x = torch.arange(8.0).view(4, 2)
    torch.testing.assert_close(joined, (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt())
    for key in ("eval", "native eval"):
        joined = torch.cat([found["bare"][key] for found in processes])
        torch.testing.assert_close(joined, (x - 1) / (4 + 1e-5) ** 0.5)


@pytest.mark.parametrize("dtype", GATHERED, ids=str)
def test_a_gather_joins_rows_and_adds_up_gradients(dtype, processes):
    x = torch.cat([torch.arange(6).view(3, 2).T, torch.arange(6, 12).view(3, 2).T]).to(dtype)
    for rank, found in enumerate(processes):
        joined, gradient = found["gathered"][str(dtype)]
        assert torch.equal(joined, x)
        own = x[2 * rank : 2 * rank + 2].double()
        limit = 1e-2 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-7
        torch.testing.assert_close(gradient.double(), (1 + 2) * 3 * own**2, rtol=limit, atol=0)
        assert gradient.dtype == dtype


def test_a_gather_of_what_needs_no_gradient_has_no_graph(processes):
    for found in processes:
        assert found["labels"].tolist() == [0, 7, 1, 7]
        assert found["keys"] is False


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_the_same_error_in_all_processes(name, processes):
    messages = {found["messages"][name] for found in processes}
    assert len(messages) == 1
    with pytest.raises(DataError, match=MISTAKES[name][1]):
        raise DataError(messages.pop())


def test_a_step_of_all_widths_holds_the_activations_of_the_widest(processes):
    for found in processes:
        all_widths, widest, summed = found["peaks"]
        assert widest <= all_widths < 1.01 * widest < summed / 1.5
    assert widest < 1.01 * peak_of_step(0.1)  # no more than torch's batch norm holds


def test_infinite_gradients_of_one_process_are_found_by_the_scalers_of_all(processes):
    for rank, found in enumerate(processes):
        for finite, scale, same in found["overflowing"]:
            assert finite == (rank == 0)
            assert scale == 2.0**99
            assert same


def test_checkpointed_forwards_use_the_joined_batch_too(processes):
    for found in processes:
        plain, *others = found["checkpointed"]
        for other in others:
            for expected, gradient in zip(plain, other, strict=True):
                torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_the_block_puts_the_functions_back(processes):
    assert all(found["put back"] for found in processes)


def test_one_process_changes_nothing():
    plain = F.batch_norm, torch.batch_norm
    x = torch.randn(2, 3)
    with synchronised_batchnorm():
        assert (F.batch_norm, torch.batch_norm) == plain
    assert gather(x) is x


PAGE = Path(__file__).parents[2] / "docs/how-to/several-processes.md"
SAVE = """
import os, sys
if os.environ.get("RANK", "0") == "0":
    torch.save((loss, model.state_dict()), sys.argv[1])
"""


def test_the_program_of_the_documentation_gives_the_same_with_two_processes(tmp_path):
    *_, program, _ = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "program.py"
    path.write_text(f"import torch\ntorch.set_default_dtype(torch.float64)\n{program}{SAVE}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": PAGE.parents[2]}
    started = [
        subprocess.Popen([sys.executable, *launcher, str(path), str(tmp_path / name)], **options)
        for name, launcher in (("one", []), ("two", torchrun))
    ]
    printed = []
    for process in started:
        out, problems = process.communicate(timeout=300)
        assert process.returncode == 0, problems
        printed.append(out)
    assert printed[0] == printed[1]
    (loss, expected), (other, found) = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert printed[0] == f"loss {loss.item():.4f}\n"
    torch.testing.assert_close(other, loss, rtol=1e-9, atol=0)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9, msg=key)
