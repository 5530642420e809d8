"""What `slimify`, `plan`, `extract` and `profile` promise to their callers."""

from __future__ import annotations

import copy
import csv
import pickle
import warnings
from contextlib import nullcontext

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import slimmable
from tests.convert import oracles

WIDTHS = (1.0, 0.75, 0.5, 0.25)


def tiny_resnet(**kwargs) -> nn.Module:
    block = timm.models.resnet.BasicBlock
    torch.manual_seed(0)
    return timm.models.resnet.ResNet(block, [1, 1, 1, 1], channels=(16, 32, 32, 64), **kwargs)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def slim(images) -> nn.Module:
    return slimmable.slimify(tiny_resnet(num_classes=10), WIDTHS, example_inputs=images)


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal_states(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- the model that comes back
def test_the_original_is_untouched(images):
    model = tiny_resnet()
    before, kinds = states(model), [type(module) for module in model.modules()]
    slim = slimmable.slimify(model, WIDTHS, example_inputs=images)
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.zero_()
    assert equal_states(states(model), before)
    assert [type(module) for module in model.modules()] == kinds


def test_inplace_converts_the_model_itself(images):
    model = tiny_resnet()
    parameters = list(model.parameters())
    assert slimmable.slimify(model, WIDTHS, example_inputs=images, inplace=True) is model
    mine = {id(p) for p in model.parameters()}
    assert all(id(parameter) in mine for parameter in parameters)
    assert slimmable.widths_of(model) == WIDTHS


def test_names_and_order_of_the_full_widths_parameters_stay(images):
    model = tiny_resnet()
    slim = slimmable.slimify(model, WIDTHS, example_inputs=images)
    names = [name for name, _ in slim.named_parameters() if ".narrow." not in name]
    assert names == [name for name, _ in model.named_parameters()]
    assert set(model.state_dict()) <= set(slim.state_dict())
    slim.load_state_dict(model.state_dict())  # a plain checkpoint loads, strictly


def test_converting_twice_is_converting_once(slim, images):
    again = slimmable.slimify(slim, WIDTHS, example_inputs=images)
    assert again is not slim
    assert equal_states(states(again), states(slim))
    assert slimmable.slimify(slim, WIDTHS, example_inputs=images, inplace=True) is slim
    for width in WIDTHS:
        with slimmable.at_width(slim, width), slimmable.at_width(again, width), torch.no_grad():
            assert torch.equal(slim.eval()(images), again.eval()(images))


def test_other_widths_can_be_asked_for_later(slim, images):
    other = slimmable.slimify(slim, (1.0, 0.5), example_inputs=images)
    assert slimmable.widths_of(other) == (1.0, 0.5)
    assert slimmable.widths_of(slim) == WIDTHS
    with torch.no_grad():
        assert torch.equal(other.eval()(images), slim.eval()(images))


def test_surgery_is_refused_until_the_model_is_converted_again(slim, images):
    slim.fc = nn.Linear(64, 7)
    with pytest.raises(slimmable.errors.ConversionError, match=r"fc \(Linear\).*slimify"):
        slimmable.set_width(slim, 0.5)
    slim.train()
    statistics = slim.layer1[0].bn1.narrow[0].running_mean.add_(3).clone()
    healed = slimmable.slimify(slim, WIDTHS, example_inputs=images)
    with slimmable.at_width(healed, 0.5):
        assert healed(images).shape == (2, 7)
    assert torch.equal(healed.layer1[0].bn1.narrow[0].running_mean, statistics)  # what it has learned stays


@pytest.mark.parametrize("universal", [False, True])
def test_converting_again_at_a_narrow_width_gives_the_full_one(images, universal):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    net(images)
    slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=images, universal=universal)
    if universal:
        slimmable.calibrate_bn(slim, [images], widths=[0.75])
    slimmable.set_width(slim, 0.75 if universal else 0.5)
    slim[4] = nn.Linear(slim[4].in_features, 7)
    healed = slimmable.slimify(slim, (1.0, 0.5), example_inputs=images, universal=universal)
    assert slimmable.width_of(healed) == 1.0
    assert healed(images).shape == (2, 7)


def test_order_permutes_what_narrow_norms_have_learned_too(images):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(8, 4))
    oracles.randomise(net)
    slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=images)
    again = slimmable.slimify(slim, (1.0, 0.5), example_inputs=images, importance="magnitude")
    assert not torch.equal(again[1].full.weight, slim[1].full.weight)
    assert torch.equal(again[1].narrow[0].weight, again[1].full.weight[:4])


# -- what the norms of a width have learned, when widths come and go
def taught(model: nn.Module, images: Tensor) -> nn.Module:
    """Give the norms of every width gains, biases, statistics and counters of their own."""
    oracles.randomise(model)
    for number, width in enumerate(slimmable.widths_of(model.train()), 1):
        with slimmable.at_width(model, width), torch.no_grad():
            for _ in range(number):
                model(images * number)
    return model.eval()


def silently_converted(model: nn.Module, *args, **kwargs) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return slimmable.slimify(model, *args, **kwargs)


def narrow_norms(model: nn.Module, width: float) -> dict[str, dict[str, Tensor]]:
    """The states of the norms of one width, by path."""
    found = {p: m for p, m in model.named_modules() if isinstance(m, slimmable.layers.SwitchableNorm)}
    return {path: states(norm.own_at(norm._slim.widths.index(width))) for path, norm in found.items()}


@pytest.mark.parametrize("universal", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [{}, {"round_to": 8, "skip": "layer2*"}])
@pytest.mark.parametrize("widths", [(1.0, 0.9, 0.75, 0.5, 0.25), (1.0, 0.5), (1.0, 0.6, 0.5, 0.2), (1.0, 0.25)])
def test_widths_that_stay_keep_what_they_have_learned_and_new_ones_start_from_the_nearest_wider(
    widths, options, inplace, universal, images
):
    options = {**options, "universal": universal, "example_inputs": images}
    slim = taught(slimmable.slimify(tiny_resnet(num_classes=10), WIDTHS, **options), images)
    before = copy.deepcopy(slim)
    other = silently_converted(slim, widths, **options, inplace=inplace)
    assert (other is slim) == inplace
    assert not any(module.training for module in other.modules())
    for width in widths:
        neighbour = min(known for known in WIDTHS if known >= width)
        mine, theirs = narrow_norms(other, width), narrow_norms(before, neighbour)
        assert mine.keys() == theirs.keys()
        for path in mine:
            for name, tensor in mine[path].items():
                assert torch.equal(tensor, theirs[path][name][: len(tensor)] if tensor.ndim else theirs[path][name])
        if width == neighbour:
            with slimmable.at_width(other, width), slimmable.at_width(before, width), torch.no_grad():
                assert torch.equal(other(images), before(images))
                assert list(map(id, slim.parameters())) == list(map(id, other.parameters())) or not inplace
    assert equal_states(states(silently_converted(other, widths, **options)), states(other))


def test_statistics_that_were_computed_for_a_width_stay_when_others_come_and_it_may_become_one_of_them(images):
    net = tiny_resnet(num_classes=10)
    slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=images, universal=True)
    slimmable.calibrate_bn(slim, [images * 3], widths=[0.7, 0.6])
    for widths in ((1.0, 0.75, 0.5), (1.0, 0.6, 0.5), (1.0, 0.25)):
        other = silently_converted(slim, widths, example_inputs=images, universal=True)
        assert slimmable.widths_of(other) == tuple(sorted({*widths, 0.7, 0.6}, reverse=True))
        for width in (0.7, 0.6):
            assert narrow_norms(other, width)
            assert str(narrow_norms(other, width)) == str(narrow_norms(slim, width))
    with pytest.warns(UserWarning, match=r"at 0\.6 .*bn1.*at 0\.7|at 0\.7 .*bn1.*at 0\.6"):
        other = slimmable.slimify(slim, (1.0, 0.75, 0.5), example_inputs=images)
    assert slimmable.widths_of(other) == (1.0, 0.75, 0.5)
    by_layer = {"layer1*": 0.5}
    slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=images)
    slimmable.calibrate_bn(slim, [images * 3], widths=[by_layer])
    other = silently_converted(slim, (1.0, 0.75, 0.5), example_inputs=images)
    with slimmable.at_width(other, by_layer), slimmable.at_width(slim, by_layer), torch.no_grad():
        assert torch.equal(other.eval()(images), slim.eval()(images))


def small_network() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return oracles.randomise(net.append(nn.Linear(8, 4))).double()


@pytest.mark.parametrize("universal", [False, True])
def test_norms_are_permuted_with_their_channels(images, universal):
    slim = slimmable.slimify(small_network(), (1.0, 0.5, 0.25), example_inputs=images.double(), universal=universal)
    taught(slim, images.double())
    with torch.no_grad():
        slim[5].weight[:] = torch.tensor([1, 2, 4, 3, 0.1, 0.2, 0.4, 0.3]).expand(4, 8)
    options = {"example_inputs": images.double(), "importance": "magnitude", "universal": universal}
    with pytest.warns(UserWarning, match="at 0.25 1. Train"):
        again = slimmable.slimify(slim, (1.0, 0.75, 0.5, 0.25), **options)
    assert torch.equal(again[1].full.weight, slim[1].full.weight[[2, 3, 1, 0, 6, 7, 5, 4]])
    for width in (1.0, 0.5):
        with slimmable.at_width(again, width), slimmable.at_width(slim, width), torch.no_grad():
            assert oracles.difference(again(images.double()), slim(images.double())) < 1e-12
    assert torch.equal(again[1].module_at(1).running_mean, slim[1].full.running_mean[[2, 3, 1, 0, 6, 7]])  # a new width
    mine, theirs = again[1].own_at(3), slim[1].own_at(1)
    assert torch.equal(mine.running_mean, theirs.running_mean[[2, 3]])  # both are new at 0.25, and known at 0.5
    assert int(mine.num_batches_tracked) == 3  # of which it knows when
    if not universal:
        assert torch.equal(mine.weight, theirs.weight[[2, 3]])


def test_a_width_whose_channels_change_is_named_and_keeps_what_it_can(images):
    slim = taught(slimmable.slimify(small_network(), (1.0, 0.4), example_inputs=images.double()), images.double())
    with pytest.warns(UserWarning, match="lose what a width has learned.*at 0.4 1. Train on, or call slimm.*calibrate"):
        other = slimmable.slimify(slim, (1.0, 0.4), example_inputs=images.double(), round_to=4)
    mine, had, full = other[1].module_at(1), slim[1].module_at(1), slim[1].full
    assert (mine.num_features, had.num_features) == (4, 3)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(mine, name)[:3], getattr(had, name))
        assert torch.equal(getattr(mine, name)[3:], getattr(full, name)[3:4])
    assert torch.equal(slim[1].module_at(1).weight, had.weight)
    with pytest.warns(UserWarning, match="at 0.4 1. Train"):
        shared = slimmable.slimify(slim, (1.0, 0.4), example_inputs=images.double(), universal=True)
    assert torch.equal(shared[1].module_at(1).running_mean, had.running_mean)
    apart = silently_converted(shared, (1.0, 0.4), example_inputs=images.double())
    assert torch.equal(apart[1].module_at(1).running_mean, had.running_mean)
    assert torch.equal(apart[1].module_at(1).weight, full.weight[:3])


def test_what_is_on_a_switchable_norm_stays_with_it(images):
    slim = slimmable.slimify(small_network(), (1.0, 0.5), example_inputs=images.double())
    seen = []
    slim[1].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    other = slimmable.slimify(slim, (1.0, 0.25), example_inputs=images.double(), inplace=True)
    slimmable.run_widths(other, images.double())
    assert seen == [8, 2]


@pytest.mark.parametrize("fails_in", ["apply_plan", "_inherit"])
def test_a_failed_conversion_puts_permuted_channels_and_what_was_learned_back(fails_in, images, monkeypatch):
    slim = taught(slimmable.slimify(tiny_resnet(num_classes=10), (1.0, 0.5), example_inputs=images), images)
    before = states(slim)
    with slimmable.at_width(slim, 0.5), torch.no_grad():
        expected = slim(images)

    def fails(*args):
        raise KeyError("no memory")

    monkeypatch.setattr(f"slimmable._convert.{fails_in}", fails)
    with pytest.raises(KeyError, match="no memory"):
        slimmable.slimify(slim, (1.0, 0.25), example_inputs=images, importance="magnitude", inplace=True)
    assert equal_states(states(slim), before)
    with slimmable.at_width(slim, 0.5), torch.no_grad():
        assert torch.equal(slim(images), expected)


def test_a_part_taken_out_keeps_working(slim, images):
    body = nn.Sequential(*list(slim.children())[:-1])
    slimmable.set_width(body, 0.5)
    assert body(images).shape == (2, 32)
    assert slimmable.width_of(slim.layer1) == 0.5


def test_copies_and_pickles_are_independent(slim, images):
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        slimmable.set_width(twin, 0.25)
        assert slimmable.width_of(slim) == 1.0
        with slimmable.at_width(slim, 0.25), torch.no_grad():
            assert torch.equal(twin.eval()(images), slim.eval()(images))


def test_a_model_that_has_run_with_gradient_converts(images):
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.cache = nn.Linear(4, 8), {}

        def forward(self, x):
            self.cache["last"] = self.net(x)
            return self.cache["last"].relu()

    model = Caching()
    model(torch.zeros(2, 4))
    slimmable.slimify(model, (1.0, 0.5), example_inputs=torch.zeros(2, 4))


# -- outputs
def test_features_get_thinner_and_class_scores_do_not(images):
    features = slimmable.slimify(tiny_resnet(num_classes=0), WIDTHS, example_inputs=images)
    scores = slimmable.slimify(tiny_resnet(num_classes=10), WIDTHS, example_inputs=images)
    assert [y.shape[1] for y in slimmable.run_widths(features, images).values()] == [64, 48, 32, 16]
    assert [y.shape[1] for y in slimmable.run_widths(scores, images).values()] == [10] * 4


class PreTraining(nn.Module):
    """As a user writes it: backbone, projector, predictor."""

    def __init__(self, norm_after: bool):
        super().__init__()
        self.backbone = tiny_resnet(num_classes=0)
        last = [nn.BatchNorm1d(32, affine=False)] if norm_after else []
        self.projector = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), *last)
        self.predictor = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 32))

    def forward(self, x):
        z = self.projector(self.backbone(x))
        return self.predictor(z), z.detach()


@pytest.mark.parametrize("norm_after", [False, True])
def test_a_pre_training_module_keeps_its_embedding_dimension(images, norm_after):
    slim = slimmable.slimify(PreTraining(norm_after), WIDTHS, example_inputs=images)
    for width, (p, z) in slimmable.run_widths(slim, images).items():
        assert p.shape == z.shape == (2, 32)
        with slimmable.at_width(slim, width):
            assert slim.projector[0].weight.shape == (64 * width, 64 * width)
            assert slim.predictor[0].weight.shape == (16 * width, 32)


class Normalised(nn.Module):
    """As MoCo's code: the embedding is scaled to unit length within the forward."""

    def __init__(self, last):
        super().__init__()
        self.backbone, self.projector = tiny_resnet(num_classes=0), nn.Sequential(nn.Linear(64, 32), *last)

    def forward(self, x):
        return nn.functional.normalize(self.projector(self.backbone(x)), dim=1)


@pytest.mark.parametrize("last", [[], [nn.BatchNorm1d(32)], [nn.ReLU(), nn.Linear(32, 32)]])
def test_an_embedding_of_unit_length_keeps_its_dimension(images, last):
    slim = slimmable.slimify(Normalised(last), WIDTHS, example_inputs=images)
    assert [tuple(z.shape) for z in slimmable.run_widths(slim, images).values()] == [(2, 32)] * len(WIDTHS)
    with slimmable.at_width(slim, 0.5):
        assert slim.backbone.conv1.weight.shape[0] == 32


def test_the_size_attributes_stay_full_and_those_of_extractions_are_true(slim):
    slimmable.set_width(slim, 0.5)
    assert slim.num_features == slim.fc.in_features == 64
    assert slim.conv1.out_channels == 64
    small = slimmable.extract(slim, 0.5)
    assert (small.conv1.out_channels, small.layer4[0].conv2.in_channels, small.fc.in_features) == (32, 32, 32)
    assert small.bn1.num_features == 32
    assert small.num_features == 32


def test_a_backbone_without_classifier_says_its_narrow_features_when_extracted(images):
    slim = slimmable.slimify(tiny_resnet(num_classes=0), WIDTHS, example_inputs=images)
    assert [slimmable.extract(slim, width).num_features for width in WIDTHS] == [64, 48, 32, 16]


# -- extraction
def test_an_extraction_owns_its_memory(slim, images):
    small = slimmable.extract(slim, 0.5)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in slim.state_dict().values()}
    assert pointers.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in small.state_dict().values())
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in small.state_dict().values())
    assert all(parameter.is_contiguous() and parameter.requires_grad for parameter in small.parameters())
    assert slimmable.width_of(slim) == 1.0


def test_a_frozen_layer_stays_frozen_when_extracted(slim):
    slim.conv1.requires_grad_(False)
    assert not slimmable.extract(slim, 0.5).conv1.weight.requires_grad


def test_the_full_extraction_has_the_keys_of_the_original(images):
    model = tiny_resnet()
    slim = slimmable.slimify(model, WIDTHS, example_inputs=images)
    assert equal_states(states(slimmable.extract(slim, 1.0)), states(model))


# -- arguments
def test_skipped_modules_stay_full(images):
    model = tiny_resnet(num_classes=10)
    for skip in ("layer2*", ["layer2"], lambda name, module: name.startswith("layer2")):
        slim = slimmable.slimify(model, WIDTHS, example_inputs=images, skip=skip)
        with slimmable.at_width(slim, 0.25):
            assert slim.layer2[0].conv1.weight.shape == (32, 16, 3, 3)
            assert slim.layer3[0].conv1.weight.shape[0] == 8
            assert slim(images).shape == (2, 10)


def test_round_to_keeps_multiples(images):
    slim = slimmable.slimify(tiny_resnet(), (1.0, 0.6), example_inputs=images, round_to=8)
    with slimmable.at_width(slim, 0.6):
        kept = {m.weight.shape[0] for m in slim.modules() if isinstance(m, nn.Conv2d)}
    assert kept == {8, 16, 40}  # of 16, 32 and 64: 9.6, 19.2 and 38.4, to the nearest multiple of 8


def test_importance_by_magnitude_keeps_the_function_and_puts_large_channels_first(images):
    model = oracles.randomise(tiny_resnet().double().eval())
    images = images.double()
    slim = slimmable.slimify(model, WIDTHS, example_inputs=images, importance="magnitude")
    with torch.no_grad():
        assert oracles.difference(slim(images), model(images)) < 1e-12
    plan = slimmable.plan(slimmable.extract(slim, 1.0), WIDTHS, example_inputs=images)
    from slimmable.analysis.importance import order_units

    for order in order_units(slimmable.extract(slim, 1.0), plan, "magnitude"):
        assert (order == range(len(order))).all()


def test_a_new_plan_of_a_converted_model_is_that_of_the_plain_one_and_leaves_it_as_it_was(images):
    model = tiny_resnet()
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=images, universal=True)
    slimmable.set_width(slim, 0.7)  # a width that it was not made with
    before = [(type(module), {n: id(t) for n, t in module._parameters.items()}) for module in slim.modules()]
    with torch.no_grad():
        expected = slim(images)
    again = slimmable.plan(slim, WIDTHS, example_inputs=images)
    assert str(again) == str(slimmable.plan(model, WIDTHS, example_inputs=images))
    assert before == [(type(module), {n: id(t) for n, t in module._parameters.items()}) for module in slim.modules()]
    assert slimmable.width_of(slim) == slimmable.width_of(slim.layer1)
    with torch.no_grad():
        assert torch.equal(slim(images), expected)


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_hides_no_channels(made_inside, images):
    net = small_network().float().insert(5, nn.Linear(8, 32)).insert(6, nn.Linear(32, 8))
    expected = str(slimmable.plan(net, WIDTHS, example_inputs=images))
    gates = str(slimmable.gating.gate_plan(net, example_inputs=images))
    with torch.inference_mode():
        model = copy.deepcopy(net) if made_inside else net
        slim = slimmable.slimify(model, WIDTHS, example_inputs=images)
        assert str(slimmable.plan(slim)) == expected
        assert str(slimmable.gating.gate_plan(model, example_inputs=images)) == gates
        with slimmable.at_width(slim, 0.5):
            assert slim[0].weight.shape[0] == 4
            assert torch.equal(slim(images), slimmable.extract(slim, 0.5)(images))


def test_keyword_and_tuple_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x, *, y):
            return {"scores": self.c(self.a(x) + self.b(y))}

    x, y = torch.zeros(2, 4), torch.zeros(2, 6)
    slim = slimmable.slimify(Two(), (1.0, 0.5), example_inputs={"x": x, "y": y})
    with slimmable.at_width(slim, 0.5):
        assert slim.a.weight.shape == (8, 4)
        assert slim(x, y=y)["scores"].shape == (2, 3)


def test_a_model_on_the_meta_device_converts():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    slim = slimmable.slimify(model)
    with slimmable.at_width(slim, 0.5):
        assert slim(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 1000)
        assert slim.conv1.weight.shape[0] == 32


# -- what is refused, with nothing changed
@pytest.mark.parametrize(
    "widths",
    [(), "1.0", None, (1.0, "half"), (1.0, float("nan")), (1.0, 0.0), (1.0, -0.5), (1.5, 1.0), (1.0, 0.5, 0.5), (0.5,)],
)
def test_widths_that_cannot_be_used(images, widths):
    model = tiny_resnet()
    before = [type(module) for module in model.modules()]
    with pytest.raises(slimmable.errors.WidthError):
        slimmable.slimify(model, widths, example_inputs=images, inplace=True)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip": "layre*"}, "layre.*matches no module"),
        ({"round_to": 0}, "slimify: round_to must be a 64-bit integer of at least 1, got 0"),
        ({"round_to": 1.5}, "round_to must be .* got 1.5"),
        ({"importance": "size"}, "importance 'size' is unknown; use None, \"magnitude\" or a function"),
        ({"example_inputs": None}, "example_inputs"),
        ({"example_inputs": torch.zeros(2, 5, 64, 64)}, r"cannot be traced: .*'conv1' \(Conv2d\)"),
        ({"example_inputs": torch.zeros(2, 3)}, r"cannot be traced: .*'conv1' \(Conv2d\)"),
    ],
)
def test_arguments_that_cannot_be_used(images, arguments, message):
    model = tiny_resnet()
    before, kinds = states(model), [type(module) for module in model.modules()]
    with pytest.raises((slimmable.errors.ConversionError, slimmable.errors.UsageError), match=message):
        slimmable.slimify(model, WIDTHS, inplace=True, **{"example_inputs": images, **arguments})
    assert equal_states(states(model), before)
    assert [type(module) for module in model.modules()] == kinds


def test_a_model_whose_path_depends_on_the_data_is_refused_with_the_module_named():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(4, 8), Branches(), nn.Linear(8, 2))
    with pytest.raises(slimmable.errors.TraceError, match=r"module '1' \(Branches\)"):
        slimmable.slimify(model, (1.0, 0.5), example_inputs=torch.zeros(2, 4))


def test_models_that_were_never_converted(images):
    model = tiny_resnet()
    for call in (
        lambda: slimmable.set_width(model, 1.0),
        lambda: slimmable.extract(model, 1.0),
        lambda: slimmable.run_widths(model, images),
        lambda: slimmable.widths_of(model),
    ):
        with pytest.raises(slimmable.errors.ConversionError, match="slimify"):
            call()


def test_unknown_widths_name_the_nearest(slim, images):
    for call in (lambda: slimmable.set_width(slim, 0.3), lambda: slimmable.extract(slim, 0.3)):
        with pytest.raises(slimmable.errors.WidthError, match=r"Nearest is 0\.25"):
            call()
    assert slimmable.width_of(slim) == 1.0


# -- plan and profile
def test_the_plan_changes_nothing_and_says_why_axes_stay(images):
    model = tiny_resnet(num_classes=10)
    before, kinds = states(model), [type(module) for module in model.modules()]
    text = str(slimmable.plan(model, WIDTHS, example_inputs=images, skip="layer2"))
    assert equal_states(states(model), before)
    assert [type(module) for module in model.modules()] == kinds
    assert "conv1.weight[0]" in text
    assert "64, 48, 32, 16" in text
    assert "layer2.0.conv1.weight[0] (32): skip in layer2" in text
    assert "fc.weight[0] (10): output" in text


def test_the_plan_says_where_all_units_go_together():
    """Each shuffle ties units to others, as in ShuffleNet v2, until none can go alone."""

    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
            self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            for branch in self.branches:
                left, right = x.chunk(2, 1)
                x = torch.cat([left, branch(right)], 1)
                x = x.view(x.shape[0], 2, x.shape[1] // 2).transpose(1, 2).flatten(1)
            return self.last(x)

    plan = slimmable.plan(Shuffled(), example_inputs=torch.zeros(2, 3))
    assert "  first.weight[0] (8): all of its units go together\n" in str(plan)
    assert plan.output_shapes[0] == plan.output_shapes[-1]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "test_efficientnet"])
def test_the_profile_agrees_with_torchs_flop_counter_on_the_extracted_network(name, tmp_path):
    slim = slimmable.slimify(timm.create_model(name))
    size = slim.pretrained_cfg["input_size"]
    profile = slimmable.profile(slim, size, repeats=0)
    for row in profile.rows:
        small = slimmable.extract(slim, row.width).eval()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know all others
            small(torch.zeros(1, *size))
        assert row.macs * 2 == counter.get_total_flops()
        assert row.parameters == sum(parameter.numel() for parameter in small.parameters())
    profile.to_csv(tmp_path / "profile.csv")
    with open(tmp_path / "profile.csv", newline="") as file:
        assert [int(row["macs"]) for row in csv.DictReader(file)] == [row.macs for row in profile.rows]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Hardtanh, nn.Hardsigmoid])
def test_activations_that_old_versions_of_torch_do_not_mark_as_pointwise_keep_nothing_full(kind, inplace):
    model = nn.Sequential(nn.Linear(8, 16), kind(inplace=inplace), nn.Linear(16, 4))
    full, half = slimmable.plan(model, (1.0, 0.5), example_inputs=torch.zeros(2, 8)).columns
    assert half.macs * 2 == full.macs


class Attend(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grouped: bool) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", None])
def test_attention_costs_its_two_products_whichever_kernel_runs(backend, masked, grouped):
    device, dtype = "cpu", torch.float32
    if backend in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        if not torch.cuda.is_available():
            pytest.skip("a kernel that only CUDA devices have")
        device, dtype = "cuda", torch.float16
    query = torch.randn(2, 4, 5, 8, device=device, dtype=dtype)
    key, value = torch.randn(2, 2, 2 if grouped else 4, 7, 8, device=device, dtype=dtype)
    mask = torch.zeros(5, 7, device=device, dtype=dtype) if masked else None
    inputs = (query, key, value, mask, grouped)
    with nullcontext() if backend is None else sdpa_kernel(getattr(SDPBackend, backend)):
        try:
            Attend()(*inputs)
        except RuntimeError:  # "No available kernel"
            pytest.skip(f"torch {torch.__version__} has no such kernel for these inputs")
        (row,) = slimmable.profile(Attend(), example_inputs=inputs, repeats=0).rows
    assert row.macs == 2 * 4 * 5 * 7 * (8 + 8)
    assert row.activations == 2 * 4 * 5 * 8


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_attention_inside_of_a_layer_of_torch_costs_the_same(weights, numbers):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            if numbers and x.sum().item() == 0:  # cannot be counted on shapes alone
                x = x + 1
            return self.attention(x, x, x, need_weights=weights)[0]

    (row,) = slimmable.profile(Attention(), example_inputs=torch.zeros(3, 5, 16), repeats=0).rows
    scores, positions = 3 * 2 * 5 * 5, 3 * 5
    assert row.macs == positions * 16 * (3 * 16 + 16) + 2 * scores * 8
    assert row.activations == positions * (3 * 16 + 16) + positions * 16 + (scores if weights else 0)


def test_the_profile_measures_latency_and_leaves_the_model_alone(slim, images):
    slim.train()
    before = states(slim)
    rows = slimmable.profile(slim, (3, 64, 64), repeats=1).rows
    assert all(row.latency_ms > 0 for row in rows)
    assert slim.training
    assert slimmable.width_of(slim) == 1.0
    assert equal_states(states(slim), before)


def test_the_profile_says_which_inputs_the_model_does_not_take():
    slim = slimmable.slimify(timm.create_model("vit_tiny_patch16_224", depth=1), WIDTHS)
    message = r"not run on inputs of shape \(1, 3, 64, 64\): it fails in module 'patch_embed'"
    with pytest.raises(slimmable.errors.UsageError, match=message):
        slimmable.profile(slim, (3, 64, 64))
    assert slimmable.width_of(slim) == 1.0


class Detect(nn.Module):
    """Computes anchors when they are needed, as the heads of YOLO do, whose class has an empty tensor for them."""

    anchors = torch.empty(0)

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, images):
        boxes = self.head(self.body(images).relu())
        self.anchors = torch.arange(boxes.shape[-1], dtype=boxes.dtype)
        return boxes + self.anchors


def test_a_tensor_as_an_attribute_of_a_class_does_not_stop_an_extraction():
    model, images = Detect().eval(), torch.rand(1, 3, 8, 8)
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=images)
    with slimmable.at_width(slim, 0.5):
        assert torch.equal(slimmable.extract(slim, 0.5)(images), slim(images))
