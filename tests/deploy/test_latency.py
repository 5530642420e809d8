"""Latency tables predict what they were given times of, and searches keep to a budget of latency."""

import itertools
import json
import re

import pytest
import timm
import torch
from torch import nn

import slimmable
from benchmarks.latency.__main__ import evolved
from slimmable.cli.commands import run
from slimmable.deploy import LatencyTable, latency
from slimmable.errors import CheckpointError, ConversionError, UsageError

WIDTHS = (1.0, 0.25)


def mlp(*sizes):
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers[:-1])
    return slimmable.slimify(net, WIDTHS, example_inputs=torch.zeros(1, sizes[0]), universal=True)


@pytest.fixture
def clock(monkeypatch):
    """A machine on which a layer takes a time given by the shape of its weight, and nothing else takes any."""
    now = [0.0]
    monkeypatch.setattr(latency.time, "process_time", lambda: now[0])

    def passes(seconds):
        def run(layer, args, kwargs, output):
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                now[0] += seconds(*layer.weight.shape[:2])

        return run

    def install(seconds):
        hook = nn.modules.module.register_module_forward_hook(passes(seconds), with_kwargs=True)
        hooks.append(hook)

    hooks = []
    yield install
    for hook in hooks:
        hook.remove()


def cost(outputs, inputs):
    return 2e-6 * outputs * inputs + 3e-6 * outputs + 1e-5 * inputs + 1e-4


def expected(net):
    return 1000 * sum(cost(*layer.weight.shape[:2]) for layer in net.modules() if isinstance(layer, nn.Linear))


def test_it_predicts_what_is_additive(clock):
    clock(cost)
    model = mlp(5, 16, 12, 20, 3)
    plan, table = slimmable.plan(model), LatencyTable.measure(model, torch.zeros(1, 5))
    for counts in ((16, 12, 20), (4, 3, 5), (9, 12, 7), (5, 10, 13)):
        ms = table.predict(plan, counts)
        assert ms == pytest.approx(expected(slimmable.extract(model, counts)), rel=0.02)
    assert table.predict(plan, 0.5) == pytest.approx(expected(slimmable.extract(model, 0.5)), rel=0.02)


def test_layers_are_bilinear_between_what_was_measured(clock):
    clock(cost)
    table = LatencyTable.measure(mlp(5, 16, 12, 3), torch.zeros(1, 5))
    [_, middle, _] = table.layers
    assert (middle["path"], middle["class"], middle["sizes"][0]) == ("2", "Linear", [12, 16])
    for (outputs, inputs), ms in zip(middle["sizes"], middle["ms"], strict=True):
        assert ms == pytest.approx(1000 * cost(outputs, inputs))
        terms = (1, inputs, outputs, inputs * outputs)
        assert sum(a * b for a, b in zip(terms, middle["fit"], strict=True)) == pytest.approx(ms, rel=5e-3)


@pytest.fixture
def quick(monkeypatch):
    """Few networks, measured a few times."""
    monkeypatch.setattr(latency, "_NETWORKS", 2)
    monkeypatch.setattr(latency, "_ROUNDS", 2)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_narrower_network_is_never_slower(name, quick):
    model = slimmable.slimify(timm.create_model(name, num_classes=4), WIDTHS, universal=True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan, table = slimmable.plan(model), LatencyTable.measure(model)
    times = [table.predict(plan, width) for width in (1.0, 0.75, 0.5, 0.25)]
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0
    assert min(table.factors.values()) >= 0 <= min(min(layer["fit"]) for layer in table.layers)
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_run_twice_count_twice(clock):
    clock(cost)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.again(self.again(self.first(x))))

    model = slimmable.slimify(Twice(), WIDTHS, example_inputs=torch.zeros(1, 4))
    table = LatencyTable.measure(model, torch.zeros(1, 4))
    assert [layer["path"] for layer in table.layers] == ["first", "again", "again", "last"]
    full = 1000 * (cost(8, 4) + 2 * cost(8, 8) + cost(2, 8))
    assert table.predict(slimmable.plan(model), 1.0) == pytest.approx(full, rel=1e-2)


def test_a_file_holds_the_whole_table(tmp_path):
    model = mlp(5, 16, 3)
    table = LatencyTable.measure(model, torch.zeros(7, 5))
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    about = json.loads((tmp_path / "table.json").read_text())["about"]
    assert (about["runtime"], about["inputs"]) == ("torch", "[(7, 5)]")
    assert about["torch"] == torch.__version__


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"layers": []}', '{"a": 1}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"holds no latency table .*; make one by `slimmable latency`"):
        LatencyTable.load(tmp_path / "table.json")


@pytest.mark.parametrize("sizes", [(5, 16, 4), (5, 16, 16, 3), (5, 12, 3)])
def test_tables_of_other_models_are_refused(sizes):
    table, other = LatencyTable.measure(mlp(5, 16, 3), torch.zeros(1, 5)), mlp(*sizes)
    with pytest.raises(
        UsageError, match=r"of another model: only one of the two has \d\.\w+ of shape .*; make a table"
    ):
        table.predict(slimmable.plan(other), 1.0)
    with pytest.raises(UsageError, match="of another model"):
        slimmable.search(other, lambda net: 0.0, 0.5, of="latency", table=table)


def test_a_plain_model_is_refused():
    with pytest.raises(ConversionError):
        LatencyTable.measure(timm.create_model("test_resnet"))


def test_onnxruntime_runs_the_sub_networks(quick):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = mlp(5, 16, 3), torch.zeros(1, 5)
    table = LatencyTable.measure(model, x, "onnxruntime")
    assert table.about["runtime"] == "onnxruntime"
    assert table.predict(slimmable.plan(model), 0.5) > 0


# -- search
def value(net):
    """A score that prefers some layers: the root of the units of each, with weights."""
    widths = [layer.weight.shape[0] for layer in net if isinstance(layer, nn.Linear)][:-1]
    return sum(weight * width**0.5 for weight, width in zip((3, 1, 2), widths, strict=False))


def test_the_greedy_search_keeps_a_budget_of_latency(clock):
    clock(cost)
    model = mlp(5, 16, 12, 3)
    plan, table = slimmable.plan(model), LatencyTable.measure(model, torch.zeros(1, 5))
    full = table.predict(plan, 1.0)
    for found, budget in zip(
        slimmable.search(model, value, (0.8, 0.6), of="latency", table=table, step=0.1, progress=False),
        (0.8, 0.6),
        strict=True,
    ):
        assert table.predict(plan, found.counts) <= budget * full
    with pytest.raises(UsageError, match=r"share of the full network's latency, from 0\.\d+, which"):
        slimmable.search(model, value, 0.01, of="latency", table=table)


def test_of_one_group_it_finds_the_widest_within_the_budget(clock):
    """Brute force over all sub-networks of a tiny network."""
    clock(cost)
    model = mlp(5, 24, 3)
    plan, table = slimmable.plan(model), LatencyTable.measure(model, torch.zeros(1, 5))
    limit = 0.7 * table.predict(plan, 1.0)
    best = max(count for count in range(6, 25) if table.predict(plan, (count,)) <= limit)
    options = {"of": "latency", "table": table, "progress": False}
    assert slimmable.search(model, value, 0.7, step=0.01, **options)[0].counts == (best,)


@pytest.mark.parametrize("budget", [0.3, 0.6, 1.0])
def test_the_evolutionary_search_of_the_benchmark_keeps_the_budget(budget):
    model, seen = mlp(5, 16, 12, 20, 3), []
    plan, x = slimmable.plan(model), [torch.randn(8, 5)]

    def evaluate(net):
        seen.append(value(net))
        return seen[-1]

    for tries in (1, 2, 10, 60):
        seen.clear()
        counts, score = evolved(model, evaluate, budget, tries, x)
        assert plan.sub_network(counts).macs <= budget * plan.columns[0].macs
        assert len(seen) <= tries
        assert score == max(seen) >= seen[0]
        assert all(low <= count for low, count in zip(plan.columns[-1].counts, counts, strict=True))
    assert slimmable.width_of(model) == 1.0


def test_evolution_comes_near_the_best_of_all():
    model = mlp(5, 8, 8, 3)
    plan = slimmable.plan(model)
    every = [plan.sub_network(counts) for counts in itertools.product(range(2, 9), repeat=2)]
    limit = 0.5 * plan.columns[0].macs

    def score(counts):
        return 3 * counts[0] ** 0.5 + counts[1] ** 0.5

    best = max(score(sub.counts) for sub in every if sub.macs <= limit)
    _, found = evolved(model, value, 0.5, 80, [torch.randn(8, 5)])
    assert 0.9 * best <= found <= best


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"table": 3}, "a table is for of='latency', not of='macs'"),
        ({"of": "latency", "table": 3}, "path must be a path, got 3"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(UsageError, match=says):
        slimmable.search(mlp(4, 8, 2), lambda net: 0.0, 0.5, **options)


def test_a_table_is_a_file_or_measured_on_the_spot(tmp_path, quick):
    model = slimmable.slimify(timm.create_model("test_resnet", num_classes=4), WIDTHS, universal=True)
    LatencyTable.measure(model).save(tmp_path / "table.json")
    for given in ({}, {"table": tmp_path / "table.json"}):
        [found] = slimmable.search(model, lambda net: 0.0, 1.0, of="latency", progress=False, **given)
        assert found.counts == slimmable.plan(model).columns[0].counts
    with pytest.raises(CheckpointError, match="holds no latency table"):
        slimmable.search(model, lambda net: 0.0, 1.0, of="latency", table=tmp_path / "no.json")


def test_the_command_writes_a_table_that_a_search_reads(tmp_path, capsys, quick):
    path = tmp_path / "table.json"
    given = {"model": "test_resnet", "num_classes": 4, "image_size": 32, "widths": (1.0, 0.5), "output": path}
    threads = torch.get_num_threads()
    try:
        assert run("latency", given) == 0
    finally:
        torch.set_num_threads(threads)
    assert re.search(f"wrote {path}", capsys.readouterr().out)
    plain = timm.create_model("test_resnet", num_classes=4)
    model = slimmable.slimify(plain, (1.0, 0.5), example_inputs=torch.zeros(1, 3, 32, 32), universal=True)
    table = LatencyTable.load(path)
    [found] = slimmable.search(model, lambda net: 0.0, 1.0, of="latency", table=table, progress=False)
    assert found.counts == slimmable.plan(model).columns[0].counts
