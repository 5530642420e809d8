"""Where the figures of a training go."""

import csv

import pytest

from slimmable.__main__ import main
from slimmable.cli.report import csv_log
from slimmable.errors import CheckpointError


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
    assert float(gradients[0]["grad_norm/w1.0"]) > 0


def test_a_run_that_goes_on_drops_the_lines_after_its_checkpoint(tmp_path):
    first = csv_log(tmp_path / "losses.csv", ["train_loss/w1"], 0)
    for step in (1, 2, 3):
        first(step, {"train_loss/w1": step / 4})
    second = csv_log(tmp_path / "losses.csv", ["train_loss/w1"], 2)
    second(3, {"train_loss/w1": 9.0})
    assert [(row["step"], row["train_loss/w1"]) for row in read(tmp_path / "losses.csv")] == [
        ("1", "0.25"),
        ("2", "0.5"),
        ("3", "9"),
    ]


def test_a_line_is_on_the_disk_when_it_is_logged(tmp_path):
    """So that a process that is killed leaves no half of one, which would read as another step."""
    log = csv_log(tmp_path / "losses.csv", ["train_loss/w1"], 0)
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
def test_a_log_that_was_changed_is_refused_and_kept(tmp_path, text):
    (tmp_path / "losses.csv").write_text(text)
    with pytest.raises(CheckpointError, match=r"losses.csv (has columns other than|cannot be read).*move it away"):
        csv_log(tmp_path / "losses.csv", ["train_loss/w1"], 5)
    assert (tmp_path / "losses.csv").read_text() == text


def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    def full(writer, row):
        raise OSError(28, "No space left on device")

    log = csv_log(tmp_path / "losses.csv", ["train_loss/w1"], 0)
    monkeypatch.setattr(csv.DictWriter, "writerow", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*losses.csv .*No space left"):
        log(1, {"train_loss/w1": 0.5})
