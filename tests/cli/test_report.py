"""The tables and the progress: what is written is what was measured."""

import csv
import io
import sys

import pytest
from hypothesis import given, strategies as st

from slimmable.cli.report import TITLES, Progress, Row, plot, read_rows, to_csv, to_markdown, write_report
from slimmable.errors import CheckpointError

shares = st.floats(0, 1)
names = st.lists(st.sampled_from(list(TITLES)), min_size=1, unique=True)
rows = names.flatmap(
    lambda chosen: st.lists(
        st.builds(
            Row,
            st.floats(0.01, 1),
            st.integers(0, 10**9),
            st.integers(0, 10**12),
            st.fixed_dictionaries(dict.fromkeys(chosen, shares)),
        ),
        min_size=1,
        max_size=5,
    )
)


@given(rows)
def test_csv_reads_back(given_rows):
    found = list(csv.DictReader(io.StringIO(to_csv(given_rows))))
    assert len(found) == len(given_rows)
    for line, row in zip(found, given_rows, strict=True):
        assert (float(line.pop("width")), int(line.pop("parameters"))) == (row.width, row.parameters)
        assert int(line.pop("macs")) == row.macs
        assert {name: float(text) for name, text in line.items()} == pytest.approx(dict(row.shares), abs=5.1e-5)


@given(rows, shares)
def test_markdown_has_a_line_per_width(given_rows, pixels):
    lines = to_markdown(given_rows, pixels, 100).splitlines()
    assert len(lines) == 2 + len(given_rows) + 2
    assert len({line.count("|") for line in lines[: 2 + len(given_rows)]}) == 1
    assert f"raw pixels: {100 * pixels:.1f}" in lines[-1]


def test_what_a_row_looks_like():
    row = Row(0.5, 1000, 20000, {"knn": 0.75, "linear": 0.1})
    assert to_csv([row]) == "width,parameters,macs,knn,linear\n0.5,1000,20000,0.7500,0.1000\n"
    assert to_markdown([row], pixels_knn=0.5, images=1024).splitlines() == [
        "| width | parameters | MACs | kNN | linear |",
        "|---:|---:|---:|---:|---:|",
        "| 0.5 | 1,000 | 20,000 | 75.0 ± 2.7 | 10.0 ± 1.8 |",
        "",
        "Accuracy on 1,024 held-out images in %, ± 95 % for their number. kNN on raw pixels: 50.0.",
    ]


DENSE = Row(1.0, 50, 900, {"knn": 0.75, "linear": 0.5, "ridge": 0.25}, "dense")
GATED = Row(1.0, 60, 300, {"knn": 0.5, "linear": 0.25, "ridge": 0.125}, "gated 0.3")
STATIC = Row(1.0, 20, 280, {"knn": 0.5, "linear": 0.125}, "static 0.3")


def test_networks_of_a_gated_run_have_a_column(tmp_path):
    """What was not measured of a network is empty."""
    write_report(tmp_path, [DENSE, GATED, STATIC], 0.5, 100, "title")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "network,width,parameters,macs,knn,linear,ridge",
        "dense,1.0,50,900,0.7500,0.5000,0.2500",
        "gated 0.3,1.0,60,300,0.5000,0.2500,0.1250",
        "static 0.3,1.0,20,280,0.5000,0.1250,",
    ]
    assert (tmp_path / "metrics.md").read_text().splitlines()[:5] == [
        "| network | parameters | MACs | kNN | linear | ridge |",
        "|---:|---:|---:|---:|---:|---:|",
        "| dense | 50 | 900 | 75.0 ± 8.5 | 50.0 ± 9.8 | 25.0 ± 8.5 |",
        "| gated 0.3 | 60 | 300 | 50.0 ± 9.8 | 25.0 ± 8.5 | 12.5 ± 6.5 |",
        "| static 0.3 | 20 | 280 | 50.0 ± 9.8 | 12.5 ± 6.5 |  |",
    ]
    assert read_rows(tmp_path) == [DENSE, GATED, STATIC]


@pytest.mark.parametrize(
    "text", ["width,parameters,macs,knn\n1,2\n", "width,parameters,macs,taste\n1,2,3,0.5\n", "a\n1\n"]
)
def test_another_file_is_no_report(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(CheckpointError, match=r"metrics\.csv is not the report of a run"):
        read_rows(tmp_path)


def test_plot_of_one_width_and_of_many(tmp_path):
    many = [Row(width, 10, int(1e6 * width), {"knn": width, "linear": 0.1}) for width in (1.0, 0.75, 0.5, 0.25)]
    for measured in (many, many[:1], [DENSE, GATED, STATIC]):
        plot(measured, 0.5, "title", tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_other_networks_are_drawn_beside_a_run_and_are_not_in_its_table(tmp_path):
    own = [Row(width, 10, int(1e6 * width), {"linear": width}) for width in (1.0, 0.5)]
    others = [Row(0.5, 10, 500_000, {"linear": share}, "alone") for share in (0.25, 0.5)]  # of two seeds
    with_them, without = (tmp_path / name for name in ("with", "without"))
    for folder, more in ((with_them, others), (without, [])):
        folder.mkdir()
        write_report(folder, own, 0.5, 100, "title", *more)
    assert (with_them / "metrics.csv").read_text() == (without / "metrics.csv").read_text()
    assert (with_them / "accuracy.png").read_bytes() != (without / "accuracy.png").read_bytes()


def test_report_replaces_the_previous_one(tmp_path):
    first, second = (Row(1.0, 10, 100, {"knn": accuracy}) for accuracy in (0.25, 0.75))
    write_report(tmp_path, [first], 0.5, 100, "title")
    write_report(tmp_path, [second], 0.5, 100, "title")
    assert (tmp_path / "metrics.csv").read_text() == to_csv([second])
    assert read_rows(tmp_path) == [second]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "metrics.csv", "metrics.md"]


def test_plain_lines_after_every_epoch(capsys):
    progress = Progress(steps=6, done=2, steps_per_epoch=2)
    with progress.bar:
        for _ in range(4):
            progress.advance({1.0: 2.5, 0.5: 2.75})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  (")[0] for line in lines] == [f"epoch {n}/3  loss at 1: 2.500  0.5: 2.750" for n in (2, 3)]
    assert "(0 s left)" in lines[-1]


def test_bar_on_a_terminal(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(steps=4, done=1, steps_per_epoch=2)
    with progress.bar:
        for _ in range(3):
            progress.advance({1.0: 2.5})
    assert "4/4" in terminal.getvalue()
    assert "loss at 1: 2.500" in terminal.getvalue()
    assert capsys.readouterr().out == ""
