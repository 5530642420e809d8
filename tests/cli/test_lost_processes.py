"""Several processes of which one ends: the others say so within seconds, and end too."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys
import torch, torch.distributed as dist
from slimmable.cli.faults import explained_fault
from slimmable.cli.processes import process_group
from slimmable.errors import DataError

def end(way):
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "bad image":
        raise DataError("7.png is no image") from OSError()
    return way == "leaves"

way, rank = sys.argv[1], int(os.environ["RANK"])
try:
    with process_group(torch.device("cpu")):
        for step in range(10):
            if step == 3 and rank == 1 and end(way):
                break
            dist.all_reduce(torch.ones(1))
    print(f"{rank} is done")
except Exception as error:
    print(explained_fault(error), flush=True)
    os._exit(2)
"""


def run(way: str) -> list[tuple[int, str]]:
    """Exit code and output of three processes, the second of which ends in this way."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {"WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, way],
            env={**os.environ, **settings, "RANK": str(rank)},
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.parametrize("way", ["killed", "leaves", "bad image"])
def test_the_others_end_and_say_so(way):
    first, _, last = run(way)
    for code, output in (first, last):
        assert code == 2, output
        assert "another process of this run ended, or cannot be reached" in output
        assert "Traceback" not in output


def test_without_a_fault_all_get_to_the_end():
    assert [output for _, output in run("none")] == [f"{rank} is done\n" for rank in range(3)]


def test_after_a_killed_process_of_torchrun_the_others_say_how_to_go_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "slimmable", "pretrain")
    folder = tmp_path / "run"
    options = (*tiny, "--epochs", "1000", "--output", str(folder))
    process = subprocess.Popen(
        [sys.executable, *launch, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (folder / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.2)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(workers[-1]), 9)
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    lost = re.findall(r"slimmable pretrain: another process of this run ended, .*; continue with: .* --resume", output)
    assert len(lost) == 1, output
    assert "exitcode  : -9" in output, output  # torchrun names it
    assert not re.search(r"\[rank\d\]: Traceback", output), output
    assert not list(folder.glob(".partial-*"))
