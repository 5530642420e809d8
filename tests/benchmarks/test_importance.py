"""The benchmark of the importance order trains, and sees an order that keeps what counts."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.importance import run, search


@pytest.fixture(scope="module")
def data():
    return run.digits(seed=0)


def test_training_and_held_out_digits_are_different_ones(data):
    assert (len(data.train), len(data.test)) == (1348, 449)
    assert data.train.shape[1:] == data.test.shape[1:] == (1, 16, 16)
    assert -1 <= data.train.min() < data.train.max() <= 1
    assert not torch.equal(run.digits(seed=1).test, data.test)
    both = torch.cat([data.train, data.test]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


def test_a_small_network_learns_the_digits(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    before = run.accuracy(model, data.test, data.test_labels)
    run.train(model, data, epochs=6)
    assert before < 40
    assert run.accuracy(model, data.test, data.test_labels) > 75


def test_training_decays_by_the_same_however_long_it_is(data):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    def no_gradient(images, labels):
        model.weight.grad = torch.zeros(1)

    for epochs in (2, 8):
        model = Idle()
        run.train(model, data, epochs, no_gradient)
        assert float(model.weight.detach().log()) == pytest.approx(-run.DECAY, rel=0.15)


def test_units_that_count_are_kept_by_the_order_alone(data):
    hidden, classes = nn.Linear(256, 64), nn.Linear(64, 10)
    with torch.no_grad():
        for rows in (hidden.weight[:32], hidden.bias[:32], classes.weight[:, :32]):
            rows.mul_(1e-3)  # the first half does nothing
    model = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), classes)
    with torch.no_grad():
        classes.bias.sub_(model(data.test).mean(0))  # so that it names all classes
        labels = model(data.test).argmax(1)  # what the model says is right
    rows = list(run.narrow_accuracies(model, SimpleNamespace(test=data.test, test_labels=labels)))
    found = {(row["order"], row["width"]): float(row["accuracy"]) for row in rows}
    assert {row["statistics"] for row in rows} == {"none"}
    assert found["first channels", 1.0] == found["magnitude", 1.0] == 100
    assert found["magnitude", 0.5] > 95
    assert found["first channels", 0.5] < 60


def test_results_name_every_figure(tmp_path, monkeypatch, data):
    class Small(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))

    monkeypatch.setattr(run, "create", lambda name: Small())
    monkeypatch.setattr("sys.argv", ["run", "--quick", "--out", str(tmp_path)])
    run.main()
    rows = run.read(tmp_path / "test_resnet.csv")
    assert len(rows) == 2 * 2 * 3
    assert set(json.loads((tmp_path / "test_resnet.json").read_text())) >= {"command", "versions", "machine"}
    full = {row["accuracy"] for row in rows if row["width"] == "1.0"}
    assert len(full) == 1
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert sum(line.startswith("| test_resnet |") for line in lines) == 2 * 3


def test_the_uniform_width_is_the_widest_within_the_budget():
    net = nn.Sequential(nn.Linear(256, 40), nn.ReLU(), nn.Linear(40, 10))
    model = search.slimmable.slimify(net, search.WIDTHS, example_inputs=torch.zeros(1, 256), universal=True)
    width = search.uniform(model, 0.5)
    assert (round(40 * width), round(40 * (width + 0.001))) == (20, 21)


def test_the_search_is_compared_within_its_budget(data, monkeypatch):
    monkeypatch.setattr(search, "BUDGETS", (0.5,))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
    model = search.slimmable.slimify(net, search.WIDTHS, example_inputs=data.test[:1], universal=True)
    rows = search.compared(model, data, data, step=0.25)
    macs = {row["network"]: row["macs"] for row in rows}
    full = 49 * 8 * 9 + 392 * 10
    assert macs["width 1.0"] == full
    assert macs["searched within 0.5"] == macs["uniform within 0.5"] == macs["width 0.5"] == full / 2
    assert len({row["accuracy"] for row in rows[-2:] + rows[2:3]}) == 1  # one group: all are the same network
