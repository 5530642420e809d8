"""The first inputs of `python -m benchmarks.fuzz` for the readers of the commands."""

from pathlib import Path

import pytest

fuzz = pytest.importorskip("benchmarks.fuzz.__main__", reason="needs a clone")
runs = pytest.importorskip("benchmarks.fuzz.runs", reason="needs a clone")

COUNTS = {"config.json": 60, "checkpoint": 8, "tables": 60, "weights": 15, "images": 25, "arguments": 60}


def test_every_reader_is_tried():
    assert COUNTS.keys() == runs.READERS.keys() <= fuzz.all_readers().keys()


@pytest.mark.parametrize("name", COUNTS)
def test_damaged_inputs_are_answered_or_refused(name):
    found = [fuzz.attempt(name, runs.READERS[name], 7, number) for number in range(COUNTS[name])]
    assert [(each.description, each.said) for each in found if each.kind == "fault"] == []
    assert any(each.kind == "refused" for each in found)


def test_a_raw_error_is_a_fault():
    def reader(draw, folder):
        return lambda: int("many"), "a number"

    assert fuzz.attempt("number", reader, 0, 0).kind == "fault"
    assert Path(fuzz.__file__).parent.name == "fuzz"
