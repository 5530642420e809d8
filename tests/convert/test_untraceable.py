"""Networks whose path depends on the numbers: what they are told, and how their backbone converts all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import slimmable
from tests.convert import oracles

WIDTHS = (1.0, 0.5, 0.25)


def block(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Backbone(nn.Module):
    """Two levels of features, joined from the deep one to the shallow one."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = block(3, 16, 2), block(16, 32, 2)
        self.lateral, self.top = nn.Conv2d(16, 24, 1), nn.Conv2d(32, 24, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        shallow = self.stem(x)
        top = self.top(self.deep(shallow))
        larger = nn.functional.interpolate(top, scale_factor=2.0, mode="nearest")
        return {"p3": (self.lateral(shallow) + larger).relu(), "p4": top.relu()}


class Proposals(nn.Module):
    """As many boxes as there are places whose score is large: their number depends on the image."""

    def __init__(self):
        super().__init__()
        self.score = nn.Conv2d(24, 1, 1)

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        scores = [self.score(level) for level in features.values()]
        large = [score > score.mean() for score in scores]
        return [each.nonzero()[: min(7, int(each.sum()))] for each in large]


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.proposals = Backbone(), Proposals()
        self.refine, self.classes = nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        features = self.backbone(torch.stack(images))
        found = []
        for places, level in zip(self.proposals(features), features.values(), strict=True):
            picked = level[places[:, 0], :, places[:, 2], places[:, 3]]
            found.append(self.classes(self.refine(picked).relu()))
        return found


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.fixture
def detector() -> nn.Module:
    torch.manual_seed(0)
    return oracles.randomise(Detector().double().eval())


def test_the_error_says_where_and_what_to_do(detector, images):
    with pytest.raises(slimmable.errors.TraceError) as caught:
        slimmable.slimify(detector, WIDTHS, example_inputs=(images,))
    message = str(caught.value)
    assert caught.value.module == "proposals"
    assert "module 'proposals' (Proposals) at operation '__int__'" in message
    assert "skip='proposals'" in message
    assert "convert the part of the model" in message


def test_a_backbone_converts_alone_and_switches_from_the_outer_model(detector, images):
    before = oracles.run_on(images)(detector)
    slim = slimmable.slimify(detector.backbone, WIDTHS, example_inputs=torch.stack(images), skip="")
    detector.backbone = slim
    full = slimmable.run_widths(slim, torch.stack(images))
    assert oracles.largest_difference(oracles.run_on(images)(detector), before) == 0
    for width in WIDTHS:
        with slimmable.at_width(detector, width), torch.no_grad():
            assert slimmable.width_of(detector.backbone) == width
            features = detector.backbone(torch.stack(images))
            assert slim.deep[0].weight.shape == (32 * width, 16 * width, 3, 3)
            assert slim.top.weight.shape == (24, 32 * width, 1, 1)
            assert features["p3"].shape[1] == 24
            assert oracles.difference(features["p3"], full[width]["p3"]) == 0
            assert all(scores.shape[1] == 4 for scores in detector(images))


def test_skipping_what_cannot_be_traced_converts_the_rest(detector, images):
    """The skipped module runs once with numbers; what it reads stays full, all else gets thinner."""
    slim = slimmable.slimify(detector, WIDTHS, example_inputs=(images,), skip="proposals")
    run = oracles.run_on(images)
    expected, outputs = run(detector), oracles.outputs_of(slim, run)
    assert oracles.largest_difference(outputs[1.0], expected) == 0
    assert oracles.extracted_difference(slim, run, outputs) <= 1e-12
    plan = slimmable.plan(detector, WIDTHS, example_inputs=(images,), skip="proposals")
    assert oracles.permuted_difference(detector, plan, run, expected) <= 1e-10
    kept = {path: per_width[1][0] for (path, name), per_width in plan.tensors.items() if name == "weight"}
    assert kept["backbone.stem.0"] == 8
    assert kept["backbone.deep.0"] == 16
    assert kept["refine"] == 8
    assert kept["proposals.score"] is None
    assert kept["backbone.top"] is None
    reasons = {pin.axis[0]: pin.reason for pin in plan.pins}
    assert reasons["backbone.top"] == "skip in proposals: read by a module that runs only with numbers"


def test_what_a_width_costs_is_counted_with_numbers_where_shapes_do_not_do(detector, images):
    slim = slimmable.slimify(detector, WIDTHS, example_inputs=(images,), skip="proposals")
    counted = slimmable.profile(slim, example_inputs=(images,), repeats=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        slimmable.extract(slim, 0.5)(images)
    assert counted.rows[1].macs == counter.get_total_flops() // 2
    assert counted.rows[1].macs < counted.rows[0].macs


def test_a_trace_with_numbers_leaves_the_model_and_the_random_state_alone(detector, images):
    state = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    random = torch.get_rng_state()
    detector.train()
    slimmable.slimify(detector, WIDTHS, example_inputs=(images,), skip="proposals")
    assert all(torch.equal(tensor, state[name]) for name, tensor in detector.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_skipped_module_that_cannot_run_with_numbers_either_says_both(images):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                raise RuntimeError("this head has no weights yet")
            return x

    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 2).double(), Broken())
    nn.init.ones_(model[1].double().weight), nn.init.ones_(model[3].weight)
    with pytest.raises(slimmable.errors.TraceError, match=r"(?s)module '4' \(Broken\).*this head has no weights yet"):
        slimmable.slimify(model, WIDTHS, example_inputs=torch.ones(1, 3, 16, 16).double(), skip="4")


def test_branches_in_the_model_itself_cannot_be_skipped(images):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) if x.sum() > 0 else x

    with pytest.raises(slimmable.errors.TraceError, match=r"module '\(the model itself\)'") as caught:
        slimmable.slimify(Branches(), WIDTHS, example_inputs=torch.ones(1, 4), skip="first")
    assert "skip=" not in str(caught.value)


class CountsChosen(nn.Module):
    """Reads which units were the largest, as plain numbers."""

    def forward(self, which: Tensor) -> Tensor:
        return torch.tensor([[float(len(set(which.tolist())))]], dtype=torch.float64)


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 3)
        self.count = CountsChosen()

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).relu()).relu()
        return self.head(h) * self.count(h.argmax(1))


def test_units_whose_numbers_a_skipped_module_reads_stay():
    torch.manual_seed(0)
    model, x = Chooses().double().eval(), torch.randn(5, 4, dtype=torch.float64)
    plan = slimmable.plan(model, WIDTHS, example_inputs=x, skip="count")
    reasons = {pin.axis[0]: pin.reason for pin in plan.pins}
    assert reasons["second"] == "skip in count: a unit's number is used"
    assert "first" not in reasons
    slim = slimmable.slimify(model, WIDTHS, example_inputs=x, skip="count")
    assert torch.equal(slim(x), model(x))
