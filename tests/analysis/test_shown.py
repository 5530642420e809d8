"""How plans and profiles are shown, and given as plain data."""

import json

import pytest
import torch
from torch import nn

import slimmable
from slimmable._tables import html_table

WIDTHS = (1.0, 0.5)


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))


@pytest.fixture
def plan(model):
    return slimmable.plan(model, WIDTHS, example_inputs=torch.zeros(1, 3, 8, 8))


def test_a_notebook_cell_shows_what_print_shows(plan):
    assert repr(plan) == str(plan)
    assert repr(plan).splitlines()[1].split()[:4] == ["0", "8", "8,", "4"]


def test_the_print_grows_with_groups_pins_and_outputs_alone():
    blocks = [layer for _ in range(60) for layer in (nn.Linear(64, 64), nn.ReLU())]
    plan = slimmable.plan(nn.Sequential(*blocks, nn.Linear(64, 2)), WIDTHS, example_inputs=torch.zeros(1, 64))
    lines = repr(plan).splitlines()
    assert len(lines) == 2 + len(plan.groups) + len(plan.pins) + 2 == 2 + 60 + 2 + 2
    assert max(map(len, lines)) < 120


def test_a_plan_is_plain_data(plan):
    data = plan.to_dict()
    assert json.loads(json.dumps(data)) == data
    [group] = data["groups"]
    assert (group["units"], group["kept"], group["makers"], group["ordered"]) == (8, [8, 4], ["0"], False)
    assert {"module": "3", "tensor": "weight", "axis": 1} in group["axes"]
    assert {"module": "0", "tensor": "weight", "axis": 0} in group["axes"]
    assert data["widths"] == [1.0, 0.5]
    assert data["macs"] == [8 * 27 * 36 + 5 * 8 * 36, 4 * 27 * 36 + 5 * 4 * 36]
    assert data["parameters"] == [8 * 28 + 16 + 5 * 289, 4 * 28 + 8 + 5 * 145]
    pins = {(pin["module"], pin["tensor"], pin["axis"], pin["size"]) for pin in data["pins"]}
    assert pins == {("3", "weight", 0, 5), ("3", "bias", 0, 5)}
    assert all("class scores" in pin["reason"] for pin in data["pins"])
    reason = "class scores, an image or an embedding"
    assert data["outputs"] == [{"name": "output", "shapes": [[1, 5], [1, 5]], "reason": reason}]


def test_every_conversion_of_timm_is_plain_data():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        data = slimmable.plan(timm.create_model("test_vit"), WIDTHS).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["macs"][1] < data["macs"][0] / 2


def test_cells_of_a_table_are_escaped():
    expected = "<table><tr><th>width</th><th>MACs</th></tr><tr><td>0.5</td><td>&lt;10</td></tr></table>"
    box = '<div style="max-height: 30em; overflow: auto">'
    assert html_table([["width", "MACs"], [0.5, "<10"]]) == f"{box}{expected}</div>"


def test_a_plan_is_a_table_in_a_notebook(plan):
    html = plan._repr_html_()
    assert html.startswith("<div")
    assert html.count("<table>") == html.count("overflow: auto") == 3
    assert "<th>kept at 1.0, 0.5</th>" in html
    assert "<td>8, 4</td>" in html
    assert "<td>3.bias[0]</td>" in html
    assert html.count("<tr>") == html.count("</tr>") == 1 + 1 + 1 + 2 + 1 + 1


def test_a_profile_is_plain_data_and_a_table(model):
    slim = slimmable.slimify(model, WIDTHS, example_inputs=torch.zeros(1, 3, 8, 8))
    profile = slimmable.profile(slim, (3, 8, 8), repeats=0)
    data = profile.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [row["width"] for row in data["rows"]] == [1.0, 0.5]
    assert [row["macs"] for row in data["rows"]] == slimmable.plan(slim, WIDTHS).to_dict()["macs"]
    assert set(data["rows"][0]) == {"width", "parameters", "macs", "activations", "latency_ms"}
    html = profile._repr_html_()
    assert "<th>MACs</th>" in html
    assert "<td>9,216</td>" in html
    assert html.count("<tr>") == 3


def texts(axes):
    return {(round(text.get_position()[0]), -text.get_position()[1]): text.get_text() for text in axes.texts}


def test_the_picture_of_a_plan_shows_which_axes_belong_together(model, plan):
    pytest.importorskip("matplotlib")
    (axes,) = plan.plot().axes
    layers = [label.get_text() for label in axes.get_yticklabels()]
    shown = texts(axes)
    named = {(layers[row], ("axis 1", "axis 0")[column]): text for (column, row), text in shown.items()}
    for number, group in enumerate(plan.groups):
        for path, name, axis in group.members:
            if name == "weight":
                assert named.pop((path, ("axis 0", "axis 1")[axis])) == str(number)
    full = [(pin.axis[0], ("axis 0", "axis 1")[pin.axis[2]]) for pin in plan.pins if pin.axis[1] == "weight"]
    assert named == dict.fromkeys(full, "full")
    assert full


def test_the_picture_of_a_profile_has_a_line_for_each_cost(model):
    pytest.importorskip("matplotlib")
    slim = slimmable.slimify(model, WIDTHS, example_inputs=torch.zeros(1, 3, 8, 8))
    table = slimmable.profile(slim, (3, 8, 8), repeats=0)
    (axes,) = table.plot().axes
    lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert list(lines) == ["parameters", "macs", "activations"]  # no latency was measured
    assert lines["macs"] == {1.0: 1.0, 0.5: table.rows[1].macs / table.rows[0].macs}
