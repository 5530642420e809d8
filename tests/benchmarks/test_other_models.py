"""The sweep over models outside timm: what a record says, what is a fault, and that it goes on where it stopped."""

import sys

import pytest
import torch
from torch import nn

from benchmarks.other_models import measure, records, run, table
from benchmarks.other_models.entry import Entry


class Two(nn.Module):
    """Returns features and scores, and casts to single precision in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x):
        x = self.first(x).relu()
        x = x + self.second(x).to(torch.float32).relu().type_as(x)
        return {"features": x, "scores": self.last(x.float())}


def entry(outputs, **more):
    return Entry("own", "two", "two", Two, lambda: torch.randn(2, 8), outputs, **more)


def record(outputs, **more):
    return {"name": "own/two", "family": "two", "error": "", **measure.measure(entry(outputs, **more))}


def test_a_record_names_outputs_and_holds_every_difference():
    found = record({"features": "slim", "*": "full"})
    assert list(table.faults(found)) == []
    assert [(output["name"], output["half"]) for output in found["outputs"]] == [
        ("features", (2, 32)),
        ("scores", (2, 4)),
    ]
    assert found["class"] == "Two"
    assert all(
        float(found[name]) <= 1e-12 for name in ("full", "extract", "permute", "magnitude")
    )  # no single precision
    assert torch.get_default_dtype() == torch.float32


def test_a_model_without_numbers_has_sizes_and_costs():
    found = record({"features": "slim", "*": "full"}, numbers=False)
    assert "full" not in found
    assert found["at_half"] == record({"*": "full"})["at_half"]


def test_an_output_that_is_not_as_the_list_says_is_a_fault():
    assert list(table.faults(record("full"))) == ["features should be full, but goes from (2, 64) to (2, 32)"]
    assert list(table.faults(record("slim"))) == ["scores should be slim, but goes from (2, 4) to (2, 4)"]
    with pytest.raises(ValueError, match="does not say what output 'scores' should be"):
        record({"features": "slim"})


def test_every_other_fault_is_named_in_the_table():
    good = record({"features": "slim", "*": "full"})
    bad = {
        **good, "name": "own/b", "permute": "nan", "at_half": 0.5, "pinned": "roll: has no rule (4)", "cause": "heads",
    }  # fmt: skip
    failed = {"name": "own/c", "family": "two", "error": "TraceError: a|b"}
    text = table.page([good, bad, failed], {"torch": "2"})
    assert "2 of 3 models convert" in text
    assert "hold for 1 of the 2" in text
    assert "All of this holds for 1," in text
    assert "| own/b | permute nan; 0.500 of the multiply-adds at 0.5: heads; full stay roll: has no rule (4) |" in text
    assert "| own/c | TraceError: a\\|b |" in text
    assert "| two | two | Two | slim: features, full: scores |" in text


def test_a_sweep_goes_on_where_it_stopped_and_repeats_what_failed(tmp_path, monkeypatch):
    tried = []

    def guarded(function, key, *_):
        tried.append(key)
        return {"error": "no"} if key == "own/a" and tried.count(key) == 1 else {}

    monkeypatch.setattr(records, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "guarded", guarded)
    monkeypatch.setattr(run, "listed", lambda: ({f"own/{name}": entry("full") for name in "ab"}, {"own": "1"}))
    for arguments in ([], [], [], ["--only", "own/b", "--again"]):
        monkeypatch.setattr(sys, "argv", ["run", *arguments])
        run.main()
    assert tried == ["own/a", "own/b", "own/a", "own/b"]
    assert [(key, found["error"]) for key, found in records.read().items()] == [("own/a", ""), ("own/b", "")]
    assert '"own": "1"' in (tmp_path / "versions.json").read_text()
