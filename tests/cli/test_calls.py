"""`slimmable.pretrain` does what the command does, and leaves the program that calls it as it was."""

import inspect
import os
import pydoc
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import slimmable
from slimmable.cli.commands import COMMANDS, make_parser
from slimmable.cli.config import PRESETS
from slimmable.cli.pretrain import Training
from slimmable.cli.processes import locked
from slimmable.cli.run import load_checkpoint
from slimmable.errors import CheckpointError, DataError, DivergedError, MissingPackageError, UsageError
from tests.cli.test_pretrain import contents

ROOT = Path(__file__).parents[2]
TINY = {
    **{"num_images": 64, "batch_size": 16, "epochs": 2, "widths": (1, 0.5)},
    **{"method": "mocov2", "device": "cpu", "workers": 0, "quiet": True},
}
"""The options of the fixture `tiny`."""
HANDLERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def state():
    """Compare what a program can set of torch and Python before and after."""

    def now():
        return (
            *(torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_num_threads()),
            *(torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled()),
            *(signal.getsignal(number) for number in HANDLERS),
        )

    return now


def test_a_run_is_that_of_the_command(run, tmp_path, state):
    """Bit for bit, whatever the caller has set, and the caller has the same afterwards."""
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad():
            before = state()
            made = slimmable.pretrain(**TINY, output=tmp_path / "run")
            assert state() == before
            model = made.load()
            assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
    assert contents(tmp_path / "run") == contents(run)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in run.iterdir()}
    assert made.folder == tmp_path / "run"
    assert str(made) == (run / "metrics.md").read_text()
    assert [row.width for row in made.rows] == [1.0, 0.5]
    assert made.rows[0].shares.keys() == {"knn", "linear"}
    images = torch.rand(3, 1, 24, 24)
    saved = slimmable.load(run / "model.safetensors")
    assert not model.training
    assert slimmable.width_of(model) == 1.0
    for width in slimmable.widths_of(model):
        with slimmable.at_width(model, width), slimmable.at_width(saved, width), torch.no_grad():
            assert torch.equal(model(images), saved(images))


def test_a_run_tells_what_the_command_tells_unless_it_is_quiet(tiny, tmp_path, capsys):
    slimmable.pretrain(**TINY | {"quiet": False}, output=tmp_path / "told")
    told = capsys.readouterr()
    slimmable.pretrain(**TINY, output=tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    lines = told.out.splitlines()
    assert lines[0].startswith("pre-training small_resnet by mocov2 at widths 1, 0.5")
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert (tmp_path / "told" / "metrics.md").read_text() in told.out
    assert lines[-1].endswith(f"the results are in {tmp_path / 'told'}")


def test_the_signature_and_the_help_have_every_option_of_the_command():
    known = {each.name: each for options in COMMANDS["pretrain"] for each in fields(options)}
    parameters = inspect.signature(slimmable.pretrain).parameters
    assert list(parameters) == list(known)
    text = pydoc.plain(pydoc.render_doc(slimmable.pretrain))
    (commands,) = (action for action in make_parser()._actions if action.dest == "command")
    for action in commands.choices["pretrain"]._actions[1:]:
        assert f"    {action.dest}: " in text
        assert parameters[action.dest].kind == inspect.Parameter.KEYWORD_ONLY
        assert parameters[action.dest].annotation == known[action.dest].type
    assert "epochs: passes over the training images (from 1 to 1,000,000; default: 20)" in text


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"epoch": 3}, UsageError, "there is no option epoch; did you mean epochs?"),
        ({"epochs": "few"}, UsageError, "argument --epochs: invalid int value: 'few'"),
        ({"method": "simple"}, UsageError, "argument --method: invalid choice: 'simple'"),
        ({"method": "simclr", "preset": "byol-imagenet"}, UsageError, "--preset byol-imagenet is for --method byol"),
        ({"data": "nowhere"}, DataError, "--data nowhere: there is no such folder"),
        ({"resume": True, "output": "nowhere"}, CheckpointError, "nowhere is not the folder of a"),
        ({"resume": 1}, UsageError, "argument --resume"),
        ({"quiet": None}, UsageError, "argument --quiet"),
        ({"output": 3}, UsageError, "--output must be a text, got 3"),
        ({"seed": None}, UsageError, "argument --seed: invalid int value: 'None'"),
        ({"lr": 1e30}, UsageError, "--lr must be from 1e-09 to 1,000,000, got 1e+30"),
        ({"help": True}, UsageError, "there is no option help"),
    ],
)
def test_bad_options_are_errors_and_nothing_is_written(options, kind, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as caught:
        slimmable.pretrain(**TINY | {"output": "run"} | options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r'pretrain: this needs matplotlib .*pip install "\.\[cli\]"'):
        slimmable.pretrain(**TINY, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_diverges_is_an_error(tmp_path, monkeypatch):
    def diverge(self):
        raise DivergedError("the loss at width 1 is nan")

    monkeypatch.setattr(Training, "take_step", diverge)
    with pytest.raises(DivergedError, match="pretrain: step 1: the loss at width 1 is nan; there is no checkpoint yet"):
        slimmable.pretrain(**TINY, output=tmp_path / "run")


def test_a_fault_of_the_machine_is_an_error_that_says_how_to_go_on(tmp_path, monkeypatch):
    def exhaust(self):
        raise MemoryError("cannot allocate memory")

    monkeypatch.setattr(Training, "take_step", exhaust)
    with pytest.raises(slimmable.SlimmableError, match=r"out of memory .*slimmable pretrain --output .*run --resume$"):
        slimmable.pretrain(**TINY, output=tmp_path / "run")


@pytest.mark.parametrize("number", HANDLERS)
def test_a_signal_ends_a_run_at_a_checkpoint_and_then_reaches_the_program(
    number, run, tmp_path, monkeypatch, state, capsys
):
    take_step, reached = Training.take_step, []

    def counted(self):
        losses = take_step(self)
        if self.step == 3:
            os.kill(os.getpid(), number)
        return losses

    before = signal.signal(number, lambda got, frame: reached.append(got))
    try:
        was = state()
        with monkeypatch.context() as patch:
            patch.setattr(Training, "take_step", counted)
            with pytest.raises(KeyboardInterrupt):
                slimmable.pretrain(**TINY, output=tmp_path / "run")
        assert state() == was
    finally:
        signal.signal(number, before)
    assert reached == [number]
    assert "interrupted after step 3 of 8; continue with: slimmable pretrain" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1] == 3
    slimmable.pretrain(resume=True, output=tmp_path / "run", device="cpu", workers=0, quiet=True)
    assert contents(tmp_path / "run") == contents(run)


def test_options_that_are_off_are_as_if_left_out(run, tmp_path):
    off = {"universal": False, "gate_budget": None, "preset": None, "resume": False, "knn_every": None}
    slimmable.pretrain(**TINY, **off, output=str(tmp_path / "run"))
    assert contents(tmp_path / "run") == contents(run)


def test_none_overrides_a_preset(tmp_path, monkeypatch):
    """The command line has no word for it."""
    monkeypatch.setitem(PRESETS, "warm", {"method": "simclr", "warmup_epochs": 1.0})
    options = TINY | {"method": "simclr", "preset": "warm", "augmentation": "digits", "image_size": 24}
    slimmable.pretrain(**options, warmup_epochs=None, output=tmp_path / "none")
    slimmable.pretrain(**options, output=tmp_path / "preset")
    found = [(tmp_path / name / "config.json").read_text() for name in ("none", "preset")]
    assert '"warmup_epochs": null' in found[0]
    assert '"warmup_epochs": 1.0' in found[1]


def test_a_folder_is_held_by_one_run_of_a_process(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(UsageError, match="run is in use by this process; wait"):
        slimmable.pretrain(**TINY, output=tmp_path / "run")
    with locked(tmp_path / "run"):
        pass


def test_a_thread_that_is_not_the_main_one_can_call_it(run, tmp_path):
    thread = threading.Thread(target=lambda: slimmable.pretrain(**TINY, output=tmp_path / "run"))
    thread.start()
    thread.join()
    assert contents(tmp_path / "run") == contents(run)


SMALL = {**TINY, "num_images": 16, "batch_size": 8, "epochs": 1, "slow_start": 0}
PROGRAM = f"""
import multiprocessing, os, sys
import torch
import slimmable

if __name__ == "__main__":
    torch.set_num_threads(1)
    multiprocessing.set_start_method("spawn")
    for name in sys.argv[2:]:
        run = slimmable.pretrain(**{SMALL!r} | dict(workers=int(sys.argv[1])), output=name)
        features = run.load()(torch.ones(1, 1, 24, 24))
        words = os.environ.get("RANK"), name, len(run.rows), float(features.sum())
        sys.stdout.write(" ".join(map(str, words)) + "\\n")  # at once, or lines of two processes could mix
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*words):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        made = subprocess.run(
            [sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert made.returncode == 0, made.stderr
        return sorted(made.stdout.splitlines())

    return run


@pytest.mark.slow  # each worker imports torch
def test_a_script_whose_workers_are_spawned(program, tmp_path):
    assert program("program.py", "1", "run")[0].startswith("None run 2 ")
    slimmable.pretrain(**SMALL, output=tmp_path / "here")
    assert contents(tmp_path / "run") == contents(tmp_path / "here")


def test_two_runs_of_one_program_in_two_processes(program, tmp_path):
    """Each process has the results when its call returns; the second run meets by keys of its own."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    lines = program(*launch, "program.py", "0", "one", "two")
    assert [line.rsplit(" ", 1)[0] for line in lines] == ["0 one 2", "0 two 2", "1 one 2", "1 two 2"]
    assert len({line.rsplit(" ", 1)[1] for line in lines}) == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
