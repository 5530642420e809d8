"""Networks whose operations have rules in `slimmable.rules`: graph networks, detection heads, quantization."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimmable
from tests.convert import oracles

WIDTHS = (1.0, 0.5)


def holds(model: nn.Module, *inputs: Tensor) -> slimmable.analysis.plan.Plan:
    model = model.double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=inputs)
    plan = slimmable.plan(slim, WIDTHS)
    oracles.full_width_is_the_original(model, slim, *inputs)
    oracles.every_width_is_its_extraction(slim, *inputs, limit=1e-12)
    oracles.permuting_units_changes_nothing(model, plan, *inputs, limit=1e-10)
    return plan


def share(plan: slimmable.analysis.plan.Plan) -> float:
    return plan.columns[-1].macs / plan.columns[0].macs


NODES, SOURCES, TARGETS = torch.randn(6, 8), torch.arange(6), (torch.arange(6) + 1) % 6


class Graph(nn.Module):
    """Two layers that add up the features of neighbours in one of torch's ways."""

    def __init__(self, how: str):
        super().__init__()
        self.first, self.second, self.last, self.how = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4), how

    def spread(self, h: Tensor, source: Tensor, target: Tensor) -> Tensor:
        nothing = torch.zeros_like(h)
        if self.how == "index_add":
            return nothing.index_add(0, target, h[source])
        if self.how == "index_put":
            return nothing.index_put((target,), h[source], accumulate=True)
        if self.how == "scatter_add":
            return nothing.scatter_add(0, target[:, None].expand(-1, h.shape[1]), h[source])
        if self.how == "scatter_reduce":
            return nothing.scatter_reduce(0, target[:, None].expand_as(h[source]), h[source], "mean")
        edges, ones = torch.stack([target, source]), torch.ones(len(source), dtype=h.dtype)
        sparse = torch.sparse_coo_tensor(edges, ones, (len(h), len(h)))
        if self.how == "sparse addmm":
            return torch.sparse.addmm(h, sparse, h)
        return torch.sparse.mm(sparse, h) if self.how == "sparse mm" else sparse @ h

    def forward(self, h: Tensor, source: Tensor, target: Tensor) -> Tensor:
        h = self.spread(self.first(h).relu(), source, target)
        return self.last(self.spread(self.second(h).relu(), source, target))


@pytest.mark.parametrize(
    "how",
    ["index_add", "index_put", "scatter_add", "scatter_reduce", "sparse mm", "sparse addmm", "sparse @ dense"],
)
def test_adding_up_messages_does_not_mix_features(how):
    plan = holds(Graph(how), NODES, SOURCES, TARGETS)
    assert plan.channels.units == (32, 32)
    assert share(plan) < 0.36


@pytest.mark.parametrize("kind", ["GCNConv", "GATConv", "SAGEConv", "GINConv"])
def test_layers_of_torch_geometric(kind):
    nets = pytest.importorskip("torch_geometric.nn")

    def layer(i: int, o: int) -> nn.Module:
        if kind == "GINConv":
            return nets.GINConv(nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o)))
        return nets.GATConv(i, o, heads=1) if kind == "GATConv" else getattr(nets, kind)(i, o)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = layer(8, 32), layer(32, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.fc(self.b(self.a(x, edges).relu(), edges).relu())

    torch.manual_seed(0)
    plan = holds(Net(), NODES, torch.stack([SOURCES, TARGETS]))
    assert share(plan) < 0.4
    assert not any("has no rule" in pin.reason for pin in plan.pins)


def conv(i: int, o: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1)


@pytest.mark.parametrize("sets", [1, 2])  # of offsets, each for its own part of the channels
def test_deformable_convolutions(sets):
    ops = pytest.importorskip("torchvision.ops")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.offset, self.mask = conv(3, 16), conv(16, 18 * sets), conv(16, 9 * sets)
            self.b, self.fc = ops.DeformConv2d(16, 24, 3, padding=1), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            return self.fc(self.b(x, self.offset(x), self.mask(x).sigmoid()).relu().mean((2, 3)))

    plan = holds(Net(), torch.randn(2, 3, 8, 8))
    assert plan.channels.units == (16 // sets, 24)
    assert plan.tensors["b", "weight"][-1][:2] == [12, 8 if sets == 1 else (*range(4), *range(8, 12))]
    assert {pin.axis[0] for pin in plan.pins} == {"offset", "mask", "fc"}


@pytest.mark.parametrize("kind", ["roi_align", "roi_pool"])
def test_regions_of_interest(kind):
    ops = pytest.importorskip("torchvision.ops")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = conv(3, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
            return self.fc(getattr(ops, kind)(self.a(x).relu(), boxes, 2).mean((2, 3)))

    boxes = torch.tensor([[0, 0.0, 0.0, 4.0, 4.0], [1, 1.0, 2.0, 6.0, 7.0]])
    assert holds(Net(), torch.randn(2, 3, 8, 8), boxes).channels.units == (16,)


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.a, self.b, self.fc = conv(3, 16), conv(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(self.quant(x)))).relu().mean((2, 3))
        return self.dequant(self.fc(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])  # per channel, per tensor
def test_a_network_prepared_for_quantization_aware_training(backend):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = Quantizable().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig(backend)
    torch.ao.quantization.prepare_qat(model, inplace=True)
    fresh = copy.deepcopy(model).eval()
    model(x)  # the observers see something
    model.eval().apply(torch.ao.quantization.disable_observer)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=x)
    plan = slimmable.plan(slim, WIDTHS)
    assert plan.channels.units == (16, 32)
    oracles.full_width_is_the_original(model, slim, x)
    oracles.every_width_is_its_extraction(slim, x, limit=1e-6)
    oracles.permuting_units_changes_nothing(model, plan, x, limit=1e-5)
    if backend == "fbgemm":
        assert plan.tensors["a.weight_fake_quant", "scale"][-1] == [8]
        with pytest.warns(UserWarning, match="nothing in this Quantizable gets narrower"):
            slimmable.slimify(fresh, WIDTHS, example_inputs=x)
        pins = {pin.axis: pin.reason for pin in slimmable.plan(fresh, WIDTHS, example_inputs=x).pins}
        assert "in a.weight_fake_quant: its observer has seen nothing yet" in pins["a", "weight", 0]


def test_a_weight_that_is_pinned_before_its_layer_is_in_the_plan():
    class Sorted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch.linalg.qr(self.weight)[0])

    model = nn.Sequential(Sorted(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4))
    pins = {pin.axis: pin.reason for pin in slimmable.plan(model, WIDTHS, example_inputs=torch.randn(2, 8)).pins}
    assert pins["0", "weight", 0] == "linalg_qr in 0: has no rule"

    class Flipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight[torch.arange(self.weight.shape[0] - 1, -1, -1)])

    model = nn.Sequential(Flipped(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4))
    pins = {pin.axis: pin.reason for pin in slimmable.plan(model, WIDTHS, example_inputs=torch.randn(2, 8)).pins}
    assert pins["0", "weight", 0] == "index in 0: is indexed"
