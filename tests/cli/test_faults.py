"""What goes wrong in a training: losses that are no numbers, processes that are killed, and several that must agree."""

import csv
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from slimmable.__main__ import main
from slimmable.cli.run import load_checkpoint
from slimmable.cli.training import Training
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
    assert load_checkpoint(folder / "checkpoint.safetensors").step == 4


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
