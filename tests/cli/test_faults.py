"""What goes wrong in a training: losses that are no numbers, processes that are killed, and several that must agree."""

import csv
import errno
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from slimmable import _atomic
from slimmable.__main__ import main
from slimmable.cli import data
from slimmable.cli.faults import explained_fault, on_signals
from slimmable.cli.pretrain import Training
from slimmable.cli.processes import locked
from slimmable.cli.run import load_checkpoint
from slimmable.errors import CheckpointError, UsageError
from tests.cli.test_pretrain import assert_same_results


def broken_before(step, monkeypatch, what):
    """Let `what` happen to the training before it takes this step, counted from 0."""
    take_step = Training.take_step

    def taking(self):
        if self.step == step:
            what(self)
        return take_step(self)

    monkeypatch.setattr(Training, "take_step", taking)


def nan_in_a_narrow_norm(training):
    for name, parameter in training.method.encoder.named_parameters():
        if ".narrow." in name:
            parameter.data.fill_(torch.nan)


def test_a_loss_that_is_no_number_stops_and_says_where(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        broken_before(6, patch, nan_in_a_narrow_norm)
        assert main(["pretrain", *tiny, "--output", str(folder)]) == 2
    message = capsys.readouterr().err
    assert "step 7: the loss is nan at width 0.5; the last good checkpoint is" in message
    assert f"{folder / 'checkpoint.safetensors'}" in message
    assert load_checkpoint(folder / "checkpoint.safetensors")[1] == 4


def test_before_the_first_checkpoint_there_is_none_to_name(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        broken_before(1, patch, lambda training: next(training.method.parameters()).data.fill_(torch.inf))
        assert main(["pretrain", *tiny, "--output", str(tmp_path / "run")]) == 2
    assert "step 2: the loss is nan at width 1; there is no checkpoint yet" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_not_saved(tiny, tmp_path, monkeypatch, capsys):
    """The last loss of an epoch was fine, but not the step after it."""
    folder = tmp_path / "run"

    def break_the_optimizer(training):
        def step():
            next(training.method.parameters()).data.fill_(torch.nan)

        monkeypatch.setattr(training.optimizer, "step", step)

    with monkeypatch.context() as patch:
        broken_before(7, patch, break_the_optimizer)
        assert main(["pretrain", *tiny, "--output", str(folder)]) == 2
    assert "is no longer finite; the last good checkpoint is" in capsys.readouterr().err
    tensors = load_file(folder / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


def start(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_after(process, seconds):
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()


@pytest.mark.slow  # forty processes
def test_killed_at_any_moment_a_run_ends_in_the_same_numbers(tiny, run, tmp_path):
    begin = time.monotonic()
    assert start("-m", "slimmable", "pretrain", *tiny, "--output", str(tmp_path / "whole")).wait() == 0
    whole = time.monotonic() - begin
    moments = random.Random(0)
    for number in range(20):
        folder = tmp_path / str(number)
        options = ("-m", "slimmable", "pretrain", *tiny, "--output", str(folder))
        kill_after(start(*options), moments.uniform(0, whole))
        resume = ("--resume",) if (folder / "config.json").exists() else ()
        process = start(*options, *resume)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert_same_results(folder, run)


def test_two_processes_end_where_one_does(tiny, tmp_path, monkeypatch):
    """Started by torchrun; plain SGD, since rounding decides what AdamW's first steps do with a zero gradient."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ("pretrain", *tiny, "--opt", "sgd", "--lr", "0.01", "--log-every", "1")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "slimmable")
    process = start(*launch, *options, "--output", str(tmp_path / "two"))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert output.count("the results are in") == 1
    assert main([*options, "--output", str(tmp_path / "one")]) == 0
    two, one = (rows(tmp_path / name / "losses.csv") for name in ("two", "one"))
    assert len(two) == len(one) == 8
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        assert [float(v or 0) for v in ours.values()] == pytest.approx(
            [float(v or 0) for v in theirs.values()], rel=1e-3
        )
    ours, theirs = (load_file(tmp_path / name / "width-0.5.safetensors") for name in ("two", "one"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_batch_that_processes_cannot_share_is_refused(tiny, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "slimmable")
    process = start(*launch, "pretrain", *tiny, "--batch-size", "15", "--output", str(tmp_path / "run"))
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "--batch-size 15 cannot be shared by 2 processes" in output
    assert not (tmp_path / "run").exists()


HOLDER = """
import sys
from pathlib import Path
from slimmable.cli.processes import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds a folder, and the folder."""
    folder = tmp_path / "held"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], **pipes)
    assert process.stdout.readline().strip() == b"held"
    yield process, folder
    process.kill()
    process.communicate()


def test_a_folder_has_one_holder_and_says_who(holder, capsys):
    process, folder = holder
    with (
        pytest.raises(UsageError, match=f"in use by process {process.pid} on {socket.gethostname()} since 20"),
        locked(folder),
    ):
        pass
    for command in (
        ["pretrain", "--output", str(folder)],
        ["export", "test_resnet", "--width", "1", "--output", folder],
    ):
        assert main([*map(str, command)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    process.communicate(b"")
    assert not folder.exists()  # made for the lock, and empty


def test_a_killed_holder_holds_nothing(holder):
    process, folder = holder
    process.kill()
    process.wait()
    (folder / f"{_atomic.PARTIAL}x").mkdir()
    (folder / f"{_atomic.PARTIAL}x" / "checkpoint.safetensors").write_text("half")
    assert (folder / ".lock").exists()
    with locked(folder, new=True):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert not list(folder.iterdir())


def test_an_empty_folder_stays_and_a_full_one_is_not_new(tmp_path):
    with locked(tmp_path, new=True):
        (tmp_path / "note.txt").write_text("")
    with pytest.raises(UsageError, match="add --resume"), locked(tmp_path, new=True):
        pass
    with (
        pytest.raises(CheckpointError, match=r"cannot write into .*note\.txt .*exists"),
        locked(tmp_path / "note.txt", new=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_without_locks_a_run_says_so(tmp_path, monkeypatch, capsys):
    def take(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", take)
    with locked(tmp_path):
        assert "is on a system without locks" in capsys.readouterr().out


def test_a_lock_does_not_outlive_its_process_in_those_that_read_images(tmp_path):
    """A forked process has the open file, but not the lock."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork")
    with locked(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    try:
        with locked(tmp_path):
            pass
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_each_signal_leaves_a_checkpoint_and_its_exit_code(name, code, tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    broken_before(3, monkeypatch, lambda training: os.kill(os.getpid(), getattr(signal, name)))
    assert main(["pretrain", *tiny, "--output", str(folder)]) == code
    assert f"interrupted after step 4 of 8; continue with: slimmable pretrain --output {folder} --resume" in (
        capsys.readouterr().out
    )
    assert load_checkpoint(folder / "checkpoint.safetensors")[1] == 4
    assert not list(folder.glob(".*"))


def test_a_second_interrupt_does_not_wait_for_a_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    def twice(training):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    broken_before(5, monkeypatch, twice)
    assert main(["pretrain", *tiny, "--output", str(tmp_path / "run")]) == 130
    assert "interrupted after step 5" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1] == 4


def test_hanging_up_does_not_stop_what_nohup_started():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals(lambda number: pytest.fail("stopped")):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_evaluation_is_terminated_without_a_trace(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr("slimmable.cli.evaluation.rows_of_run", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"]) == 143
    assert capsys.readouterr().err == "slimmable evaluate: interrupted\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in run.iterdir()}


IMPORTING = """
import os, signal, sys
class Interrupting:
    def find_spec(name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
sys.argv[1:] = ["plan", "resnet18"]
from slimmable.__main__ import program
program()
"""


def test_an_interrupt_while_importing_is_one_line():
    found = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "slimmable plan: interrupted\n")


def test_a_killed_worker_is_one_message_that_says_how_to_go_on(tiny, run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def kill_a_worker(training):
        multiprocessing.active_children()[0].kill()
        time.sleep(0.5)

    with monkeypatch.context() as patch:
        broken_before(5, patch, kill_a_worker)
        assert main(["pretrain", *tiny, "--workers", "2", "--output", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a process that reads images ended (" in error
    assert error.endswith(f"; continue with: slimmable pretrain --output {folder} --resume\n")
    assert not list(folder.glob(".*"))
    assert main(["pretrain", "--output", str(folder), "--resume", "--device", "cpu", "--workers", "0"]) == 0
    assert_same_results(folder, run)


@pytest.mark.parametrize("name", ["config.json", "checkpoint.safetensors", "width-0.5.safetensors", "accuracy.png"])
def test_a_full_disk_leaves_what_was_there(name, tiny, run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def sync(path):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_atomic, "_sync", sync)
        assert main(["pretrain", *tiny, "--output", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"cannot write {folder / name}" in error
    assert "No space left on device" in error
    assert not list(folder.glob(".*"))
    if name == "config.json":
        assert not folder.exists()
        return
    assert error.endswith(f"; continue with: slimmable pretrain --output {folder} --resume\n")
    assert main(["pretrain", "--output", str(folder), "--resume", "--device", "cpu", "--workers", "0"]) == 0
    assert_same_results(folder, run)


def test_a_line_that_a_full_disk_cut_short_is_written_again(tiny, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    with (folder / "losses.csv").open("a") as file:
        file.write("8,0.0")
    assert main(["pretrain", "--output", str(folder), "--resume", "--device", "cpu", "--workers", "0"]) == 0
    assert_same_results(folder, run)


def test_a_folder_that_vanishes_is_one_message(tiny, tmp_path, monkeypatch, capsys):
    broken_before(2, monkeypatch, lambda training: shutil.rmtree(tmp_path / "run"))
    assert main(["pretrain", *tiny, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith(f"; nothing is left in {tmp_path / 'run'}; start the run again\n")


def cause(make):
    try:
        return make()
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2**60),
        lambda: torch.zeros(2**62, 2**62),
        lambda: MemoryError(),
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        lambda: RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\n"
                             "RuntimeError: unable to mmap 9 bytes: Cannot allocate memory (12)"),
    ],
)  # fmt: skip
def test_memory_that_is_short_is_one_line(make):
    text = explained_fault(cause(make))
    assert text.startswith("out of memory (")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a process that reads images ended"),
        (RuntimeError("[enforce fail] gloo/pair.cc:534] Connection closed by peer"), "another process of this run"),
        (torch.distributed.DistNetworkError("it took too long"), "another process of this run ended"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "Read-only file system: 'x'"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "nobody reads the output"),
        (CheckpointError("cannot write x"), "cannot write x"),
    ],
)
def test_what_the_machine_does_is_one_line(error, message):
    assert message in explained_fault(error)


@pytest.mark.parametrize("error", [RuntimeError("power cut"), ValueError("x"), KeyError("x"), AssertionError()])
def test_a_mistake_in_a_program_keeps_its_traceback(error, monkeypatch):
    assert explained_fault(error) is None


def test_out_of_memory_while_drawing_images_leaves_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "_draw", lambda *args: torch.zeros(2**60))
    assert main(["pretrain", *tiny, "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("slimmable pretrain: out of memory (")
    assert not (tmp_path / "run").exists()
