"""One table of what the reports of several runs say."""

import csv
from dataclasses import replace

from hypothesis import given, settings, strategies as st

from benchmarks.compare import main
from slimmable.cli.config import PretrainConfig
from slimmable.cli.report import Row, write_report

DENSE = Row(1.0, 50, 900, {"knn": 0.75}, "dense")
GATED = Row(1.0, 60, 300, {"knn": 0.5}, "gated 0.3")
STATIC = Row(1.0, 20, 280, {"knn": 0.5}, "static 0.3")
WIDTHS = [Row(width, 10, int(100 * width), {"knn": width}) for width in (1.0, 0.5)]


def make_run(folder, rows, **more):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(PretrainConfig(**more).to_json())
    if rows:
        write_report(folder, rows, 0.5, 100, "title")
    return str(folder)


def refused(capsys, *arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare: ")
    return error


def test_runs_of_each_kind_in_one_table(tmp_path, capsys):
    runs = [make_run(tmp_path / "wide", WIDTHS), make_run(tmp_path / "gates", [DENSE, GATED, STATIC])]
    assert main([*runs, runs[0], "--output", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "compare.md").read_text()
    assert table in capsys.readouterr().out
    assert table.splitlines()[:7] == [
        "| run | network | MACs | kNN |",
        "|---|---|---:|---:|",
        "| wide | width 1 | 100 | 100.0 |",
        "| wide | width 0.5 | 50 | 50.0 |",
        "| gates | dense | 900 | 75.0 |",
        "| gates | gated 0.3 | 300 | 50.0 |",
        "| gates | static 0.3 | 280 | 50.0 |",
    ]
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.csv", "compare.md", "compare.png"}


shares = st.integers(0, 10_000).map(lambda number: number / 10_000)
reports = st.lists(
    st.builds(
        Row,
        shares,
        st.integers(0, 10**9),
        st.integers(0, 10**12),
        st.fixed_dictionaries({"knn": shares, "linear": shares}),
    ),
    min_size=1,
    max_size=3,
)


@given(st.lists(reports, min_size=1, max_size=3))
@settings(max_examples=5, deadline=None)  # each draws a figure or more
def test_the_csv_has_every_row_of_every_run(tmp_path_factory, found):
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / str(number), rows) for number, rows in enumerate(found)]
    assert main([*runs, "--output", str(root / "out")]) == 0
    with (root / "out" / "compare.csv").open(newline="") as file:
        columns = ("run", "width", "parameters", "macs", "knn", "linear")
        lines = [[float(line[column]) for column in columns] for line in csv.DictReader(file)]
    assert lines == [
        [number, row.width, row.parameters, row.macs, row.shares["knn"], row.shares["linear"]]
        for number, rows in enumerate(found)
        for row in rows
    ]


def test_runs_of_one_name_have_their_paths(tmp_path):
    runs = [make_run(tmp_path / name / "run", WIDTHS) for name in ("a", "b")]
    assert main([*runs, "--output", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "compare.md").read_text()
    assert all(f"| {run} | width 0.5 |" in table for run in runs)


def test_folders_that_cannot_be_compared(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    whole = make_run(tmp_path / "whole", WIDTHS)
    unfinished = make_run(tmp_path / "unfinished", [])
    more_probes = [replace(row, shares={**row.shares, "ridge": 0.5}) for row in WIDTHS]
    output = ("--output", str(tmp_path / "out"))
    assert "empty is not the folder of a pre-training run" in refused(capsys, whole, str(tmp_path / "empty"), *output)
    assert f"{unfinished} has no report yet" in refused(capsys, whole, unfinished, *output)
    assert f"slimmable evaluate {unfinished}" in refused(capsys, unfinished, *output)
    message = refused(capsys, whole, make_run(tmp_path / "ridge", more_probes), *output)
    assert "different probes (whole: knn; ridge: knn, ridge)" in message
    for name, more in (("photos", {"data": "photos"}), ("fewer", {"num_images": 64}), ("small", {"image_size": 20})):
        message = refused(capsys, whole, make_run(tmp_path / name, WIDTHS, **more), *output)
        assert f"different images, so their accuracies do not compare ({whole}: 4096 digits at 24 pixels" in message
    assert not (tmp_path / "out").exists()


def test_one_folder_of_images_by_two_paths_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [
        make_run(tmp_path / "a", WIDTHS, data="photos"),
        make_run(tmp_path / "b", WIDTHS, data=str(tmp_path / "photos"), num_images=8),
    ]
    assert main([*runs, "--output", str(tmp_path / "out")]) == 0


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    whole = make_run(tmp_path / "whole", WIDTHS)
    assert "cannot write into the folder" in refused(capsys, whole, "--output", str(tmp_path / "file"))
