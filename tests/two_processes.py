"""Running a task in two processes that know each other, over gloo."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_in_two(task: Callable[[int], Any], folder: Path) -> list[Any]:
    """Return what `task(rank)` gives in each process; starting them is slow, so let one task do all."""
    torch.multiprocessing.spawn(_work, (task, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _work(rank: int, task: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    torch.save(task(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
