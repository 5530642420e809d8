"""Every reader of files answers or refuses damaged inputs, and the command that tries many tells faults and goes on."""

import json
import os
import random
import time

import pytest

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz.mutations import JUNK, changed, damaged, text
from slimmable.errors import DataError

EACH = int(os.environ.get("SLIMMABLE_FUZZ", "25"))  # inputs for each reader
READERS = fuzz.all_readers()

pytestmark = pytest.mark.skipif(not hasattr(fuzz.signal, "SIGALRM"), reason="no alarm that ends what hangs")


@pytest.mark.parametrize("name", READERS)
def test_no_input_is_a_fault(name):
    found = [fuzz.attempt(name, READERS[name], 0, number) for number in range(EACH)]
    assert [(number, each) for number, each in enumerate(found) if each.kind == "fault"] == []
    assert any(each.kind == "refused" for each in found)


def refuse():
    raise DataError("no such data")


CALLS = {
    "answered": lambda folder: 1,
    "refused": lambda folder: refuse(),
    "an error without a name": lambda folder: {}["key"],
    "an exit": lambda folder: exit(3),
    "a wrong answer": lambda folder: (_ for _ in ()).throw(AssertionError("wrong")),
    "code that ran": lambda folder: (folder / "ran").touch(),
    "a file outside": lambda folder: (folder.parent / "other").touch(),
    "too long": lambda folder: time.sleep(30),
    "too large": lambda folder: bytearray(os.urandom(1000)) * 200_000,  # more than malloc keeps
}


@pytest.mark.parametrize("what", CALLS)
def test_faults_are_told_from_answers(what, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "BYTES", 2**24)
    if what == "too large" and not fuzz.peak_bytes():
        pytest.skip("the system does not tell how much memory was used")
    found = fuzz.attempt("x", lambda draw, folder: ((lambda: CALLS[what](folder)), what), 0, 0)
    assert found.kind == (what if what in ("answered", "refused") else "fault")
    assert found.description == what
    assert (found.said.startswith("took ")) == (what == "too large")


def test_a_search_goes_on_by_number_and_counts(tmp_path):
    seen = []

    def reader(draw, folder):
        seen.append(draw.random())
        return (lambda: None if len(seen) != 3 else {}["key"]), "an input"

    data = {"seed": 3, "readers": {}, "faults": []}
    for last in (2, 4):
        fuzz.search(data, {"x": reader}, lambda last=last: len(seen) >= last)
    counts = data["readers"]["x"]
    assert (counts["tried"], counts["answered"], counts["refused"], counts["fault"]) == (4, 3, 0, 1)
    assert data["faults"][0]["input"] == "x:2"
    assert seen == [random.Random(f"x 3 {number}").random() for number in range(4)]
    result = {**data, "machine": {"cpu": "one", "cores": 1}, "versions": {}, "date": "today"}
    (tmp_path / "seed-3.json").write_text(json.dumps(result))
    assert "| 3 | x | 4 | 3 | 0 | 1 |" in fuzz.table(tmp_path)


def test_changes_are_changes():
    draw, value = random.Random(0), {"a": [1, 2.5, {"b": "x"}], "c": None}
    texts = [text(changed(draw, value)[0]) for _ in range(300)]
    assert value == {"a": [1, 2.5, {"b": "x"}], "c": None}
    assert len(set(texts)) > 50
    assert any("[" * 100_000 in each for each in texts)
    assert text(JUNK)
    assert len({damaged(draw, b"0123456789" * 20) for _ in range(100)}) > 50
