"""Where the figures of a training go."""

import csv
import sys
import types
from contextlib import ExitStack

import pytest

from slimmable.__main__ import main
from slimmable.cli.pretrain import read_gradients
from slimmable.cli.report import make_logs
from slimmable.errors import CheckpointError, MissingPackageError


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_log_of_a_run_has_every_width(run):
    rows = read(run / "losses.csv")
    assert list(rows[0]) == ["step", "learning_rate", "train_loss/w1", "train_loss/w0.5"]
    assert [row["step"] for row in rows] == ["8"]  # every tenth step, and the last


def test_slow_start_leaves_narrow_widths_empty(tiny, tmp_path):
    assert main(["pretrain", *tiny, "--log-every", "1", "--diagnostics", "--output", str(tmp_path / "run")]) == 0
    rows = read(tmp_path / "run" / "losses.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 9)]
    assert [row["train_loss/w0.5"] == "" for row in rows] == [True] * 4 + [False] * 4
    assert all(float(row["train_loss/w1"]) > 0 for row in rows)
    gradients = read(tmp_path / "run" / "gradients.csv")
    assert [row["step"] for row in gradients] == ["0"]
    assert [row["step"] for row in read_gradients(tmp_path / "run" / "gradients.csv", done=8)] == [0]
    assert [row["step"] for row in read_gradients(tmp_path / "run" / "gradients.csv", done=1)] == [0]
    assert read_gradients(tmp_path / "run" / "gradients.csv", done=0) == []


@pytest.fixture
def ends():
    with ExitStack() as stack:
        yield stack


def test_a_run_that_goes_on_drops_the_lines_after_its_checkpoint(ends, tmp_path):
    (first,) = make_logs(ends, tmp_path, ["train_loss/w1"], 0, (), {})
    for step in (1, 2, 3):
        first(step, {"train_loss/w1": step / 4})
    (second,) = make_logs(ends, tmp_path, ["train_loss/w1"], 2, (), {})
    second(3, {"train_loss/w1": 9.0})
    assert [(row["step"], row["train_loss/w1"]) for row in read(tmp_path / "losses.csv")] == [
        ("1", "0.25"),
        ("2", "0.5"),
        ("3", "9"),
    ]


def test_a_line_is_on_the_disk_when_it_is_logged(ends, tmp_path):
    """So that a process that is killed leaves no half of one, which would read as another step."""
    (log,) = make_logs(ends, tmp_path, ["train_loss/w1"], 0, (), {})
    for step in (1, 2):
        log(step, {"train_loss/w1": 0.5})
        assert (tmp_path / "losses.csv").read_text().endswith(f"\n{step},0.5\n")


@pytest.mark.parametrize(
    "text",
    [
        "foo\n1\n",
        "step,train_loss/w1\nx,1\n",
        "step,other\n1,1\n",
        "step,train_loss/w1\n1\n",
        "step\n1,2\n",
        "\0\n\0\n",
    ],
)
def test_a_log_that_was_changed_is_refused_and_kept(ends, tmp_path, text):
    (tmp_path / "losses.csv").write_text(text)
    with pytest.raises(CheckpointError, match=r"losses.csv (has columns other than|cannot be read).*move it away"):
        make_logs(ends, tmp_path, ["train_loss/w1"], 5, (), {})
    assert (tmp_path / "losses.csv").read_text() == text


def test_gradients_that_were_changed_are_refused(tmp_path):
    (tmp_path / "gradients.csv").write_text("step,rest_ratio/w0.5\n0,high\n")
    with pytest.raises(CheckpointError, match=r"gradients\.csv cannot be read"):
        read_gradients(tmp_path / "gradients.csv", done=1)


def test_a_full_disk_is_one_message(ends, tmp_path, monkeypatch):
    def full(writer, row):
        raise OSError(28, "No space left on device")

    (log,) = make_logs(ends, tmp_path, ["train_loss/w1"], 0, (), {})
    monkeypatch.setattr(csv.DictWriter, "writerow", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*losses.csv .*No space left"):
        log(1, {"train_loss/w1": 0.5})


def test_tensorboard(ends, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, board = make_logs(ends, tmp_path, [], 0, ["tensorboard"], {})
    for step in (1, 2):
        board(step, {"train_loss/w0.5": 0.5 * step})
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train_loss/w0.5")
    assert [(point.step, point.value) for point in found] == [(1, 0.5), (2, 1.0)]


def test_weights_and_biases_gets_settings_and_figures(ends, tmp_path, monkeypatch):
    sent = []

    class Run:
        def log(self, values, step):
            sent.append((step, values))

        def finish(self):
            pass

    def init(**settings):
        sent.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    _, logger = make_logs(ends, tmp_path, [], 0, ["wandb"], {"epochs": 2})
    logger(1, {"train_loss/w1": 0.5})
    assert sent[0]["config"] == {"epochs": 2}
    assert sent[1] == (1, {"train_loss/w1": 0.5})


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named_before_anything_is_made(
    ends, name, tmp_path, tiny, monkeypatch, capsys
):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["pretrain", *tiny, "--logger", name, "--output", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert f"needs {name}" in message
    assert message.endswith(f"pip install {name}\n")  # no extra of this package brings it
    assert not (tmp_path / "run").exists()
    with pytest.raises(MissingPackageError, match=name):
        make_logs(ends, tmp_path, [], 0, [name], {})
