"""A write that fails half-way leaves the previous file, and nothing else."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from slimmable._atomic import filled_aside, write_aside
from slimmable.cli.pretrain import fill_state, optimizer_tensors
from slimmable.cli.run import (
    load_checkpoint,
    load_exactly,
    save_checkpoint,
)
from slimmable.errors import CheckpointError


def half_written(error):
    def write(path):
        path.write_text("hal")
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "seen"), [(OSError(28, "No space left"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_previous_file_survives(tmp_path, error, seen):
    path = tmp_path / "note.txt"
    write_aside(path, lambda aside: aside.write_text("first"))
    with pytest.raises(seen):
        write_aside(path, half_written(error))
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "note.txt"

    def write(aside):
        write_aside(path, lambda other: other.write_text("second"))
        aside.write_text("first")

    write_aside(path, write)
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_a_file_has_the_mode_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_aside(tmp_path / "note.txt", lambda aside: (aside.write_text("done"), aside.chmod(0o600)))
        with filled_aside(tmp_path / "notes") as inside:
            (inside / "note.txt").write_text("done")
    finally:
        os.umask(before)
    for path in (tmp_path / "note.txt", tmp_path / "notes" / "note.txt"):
        assert path.read_text() == "done"
        assert path.stat().st_mode & 0o777 == 0o640


def test_a_folder_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="pass the path of a file"):
        write_aside(Path("."), lambda aside: aside.write_text("done"))


@pytest.fixture
def no_room():
    """Files may not grow beyond 4 KiB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_keeps_the_checkpoint(tmp_path, request):
    path = tmp_path / "checkpoint.safetensors"
    network = nn.Linear(64, 64)
    save_checkpoint(path, network.state_dict() | {"training.queue": torch.ones(3)}, step=7)
    before = network.weight.detach().clone()
    request.getfixturevalue("no_room")
    nn.init.zeros_(network.weight)
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint.safetensors .*previous one is unharmed"):
        save_checkpoint(path, network.state_dict() | {"training.queue": torch.ones(3)}, step=8)
    found, step = load_checkpoint(path)
    assert step == 7
    assert torch.equal(found["weight"], before)
    assert os.listdir(tmp_path) == ["checkpoint.safetensors"]


def test_checkpoint_of_another_model_lists_what_differs(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, nn.Linear(4, 8).state_dict(), step=1)
    other = nn.Linear(5, 8, bias=False)
    before = other.weight.detach().clone()
    with pytest.raises(CheckpointError) as caught:
        load_exactly(other, load_checkpoint(path)[0], "the checkpoint")
    assert "\n  unknown: bias" in str(caught.value)
    assert "\n  of another shape: weight (8, 4), expected (8, 5)" in str(caught.value)
    assert torch.equal(other.weight, before)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x10\0\0\0\0\0\0\0{}"])
def test_damaged_checkpoint(tmp_path, content):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read|is not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_optimizer_goes_on_exactly(kind):
    def step(network, optimizer):
        optimizer.zero_grad()
        network(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    def fresh():
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return network, kind(network.named_parameters(), lr=0.1, **settings)

    network, optimizer = fresh()
    for _ in range(3):
        step(network, optimizer)
    other, resumed = fresh()
    other.load_state_dict(network.state_dict())
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    fill_state(resumed)
    for name, tensor in optimizer_tensors(resumed).items():
        tensor.copy_(saved[name])
    for _ in range(3):
        step(network, optimizer)
        step(other, resumed)
    assert torch.equal(network.weight, other.weight)


def test_optimizer_goes_on_exactly_in_another_memory_layout():
    def fresh():
        torch.manual_seed(0)
        network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return network, torch.optim.AdamW(network.named_parameters(), fused=True)

    def step(network, optimizer):
        optimizer.zero_grad()
        network(torch.arange(75.0).view(1, 3, 5, 5)).square().sum().backward()
        optimizer.step()

    network, optimizer = fresh()
    step(network, optimizer)
    other, resumed = fresh()
    other.load_state_dict(network.state_dict())
    saved = {name: tensor.contiguous().clone() for name, tensor in optimizer_tensors(optimizer).items()}
    fill_state(resumed)
    for name, tensor in optimizer_tensors(resumed).items():
        tensor.copy_(saved[name])
    step(network, optimizer)
    step(other, resumed)
    assert torch.equal(network.weight, other.weight)
