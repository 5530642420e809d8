"""The sweep over timm: what a line says, that one bad model cannot stop it, and what the tables make of the lines."""

import os
import sys
import time

import pytest
import timm
import torch

import slimmable
from benchmarks.timm_zoo import fake, gates, real, records, run, table
from benchmarks.timm_zoo.guard import guarded


def test_a_line_without_weights_agrees_with_the_profile_of_the_model():
    line = fake.measure("test_vit")
    with torch.device("meta"):
        slim = slimmable.slimify(timm.create_model("test_vit").eval())
        example = torch.zeros(2, 3, 160, 160)
    rows = {row.width: row for row in slimmable.profile(slim, example_inputs=example, repeats=0).rows}
    assert line["macs"] == rows[1.0].macs
    assert line["parameters"] == rows[1.0].parameters
    assert line["ratio_50"] == round(rows[0.5].macs / rows[1.0].macs, 4)
    assert line["ratio_25"] == round(rows[0.25].macs / rows[1.0].macs, 4)
    assert set(line) | {"name", "commit", "error"} == set(records.COLUMNS["fake"])


def test_a_line_with_numbers_holds_every_difference():
    line = real.measure("test_vit")
    assert all(float(line[name]) <= limit for name, limit in table.ORACLES.items() if name != "zero")
    assert "zero" not in line  # layer norms
    assert set(line) | {"name", "commit", "error", "zero"} == set(records.COLUMNS["real"])


def test_a_line_on_gates_holds_what_they_can_save():
    line = gates.measure("test_vit")
    assert (float(line["dense"]), float(line["counted"])) == (0, 0)
    assert float(line["masked"]) < 1e-12
    model = timm.create_model("test_vit")
    patches = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    [row] = slimmable.profile(model, (3, 160, 160), repeats=0).rows
    assert line["least"] == round((patches + model.head.weight.numel()) / row.macs, 4)  # blocks can close altogether
    assert set(line) | {"name", "commit", "error"} == set(records.COLUMNS["gates"])
    page = table.gates_page([{key: str(value) for key, value in line.items()} | {"error": "", "name": "test_vit"}])
    assert page.startswith("1 of 1 models get gates. 1 were run with numbers. ")
    assert "but for none." in page


def test_what_costs_more_than_the_limit_is_named_with_its_share():
    full, half = fake.Counter(heads=60, convolutions=40), fake.Counter(heads=30, convolutions=10)
    assert fake.cause(full, half) == "heads (60% of all, 0.50 of them at 0.5)"


BAD = {
    "raises": (lambda name: 1 / 0, "ZeroDivisionError: division by zero"),
    "dies": (lambda name: os._exit(3), "the process ended with 3"),
    "hangs": (lambda name: time.sleep(60), "took more than 2 s"),
    "eats": (lambda name: (bytearray(b"x") * 2**31, time.sleep(60)), "needs more than 1 GiB"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_model_that_goes_wrong_is_an_error_in_its_line(kind):
    function, error = BAD[kind]
    assert guarded(function, "model", seconds=2 if kind == "hangs" else 60, gib=1 if kind == "eats" else 64) == {
        "error": error
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    return tmp_path


def sweep(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    run.main()


def test_a_sweep_goes_on_where_it_stopped_and_repeats_what_failed(folder, monkeypatch):
    tried = []

    def measure(name):
        tried.append(name)
        return {"error": "no"} if name == "test_vit2" and tried.count(name) == 1 else {"macs": 1}

    monkeypatch.setitem(run.STAGES, "fake", measure)
    monkeypatch.setattr(run, "guarded", lambda function, name, *_: function(name))
    sweep(monkeypatch, "--stage", "fake", "--names", "test_vit2")
    sweep(monkeypatch, "--stage", "fake", "--names", "test_vit,test_vit2")
    sweep(monkeypatch, "--stage", "fake", "--names", "test_vit,test_vit2")
    assert sorted(tried) == ["test_vit", "test_vit2", "test_vit2"]
    assert list(records.read("fake")) == ["test_vit", "test_vit2"]
    assert records.read("fake")["test_vit2"]["error"] == ""
    sweep(monkeypatch, "--stage", "fake", "--names", "test_vit", "--again")
    assert tried[-1] == "test_vit"


def test_the_tables_name_every_exception(folder, capsys):
    records.note_versions()
    ran = {"parameters": 1, "macs": 9, "ratio_25": 0.1, "parameters_50": 0.3, "seconds": 2}
    records.append("fake", {"name": "a", "module": "one", "ratio_50": 0.26, **ran})
    records.append("fake", {"name": "b", "module": "one", "ratio_50": 0.41, "cause": "the first layer", **ran})
    records.append("fake", {"name": "c", "module": "two", "error": "TraceError: why"})
    records.append("real", {"name": "a", "module": "one", "extract": "1.0e-16", "permute": "nan", "full": "0.0e+00"})
    table.main()
    text = (folder / "table.md").read_text()
    assert "2 of 3 models convert and run" in text
    assert "1 of them need at most 0.34" in text
    assert "hold for 0 of the 1 models" in text
    assert "| one | 2 | 0.335 | 0.410 | 0.100 | 0.300 | 2.0 | 1 | nan |" in text
    assert "| two | 0 of 1 |" in text
    assert "| b | 0.41 | the first layer |  |" in text
    assert "| a | permute nan |" in text
    assert "| c | TraceError: why |" in text
