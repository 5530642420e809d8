"""What becomes of a model that is changed after its conversion, and of its memory format; its full-width weights."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import slimmable
from slimmable.errors import ConversionError, UsageError
from slimmable.layers import SlimGroupNorm, SwitchableBatchNorm2d
from slimmable.view.view import _viewed_class
from tests.convert import oracles
from tests.life.networks import converted, images, plain

WIDTHS = (1.0, 0.5)
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(*norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    norm = norm or (nn.BatchNorm2d(16),)
    last = (nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *norm, nn.ReLU(), *last).eval()


def slim_network(*norm: nn.Module, **options) -> nn.Module:
    return slimmable.slimify(network(*norm), WIDTHS, example_inputs=X, **options)


# -- norms without tensors
AFFINE = st.fixed_dictionaries({"affine": st.booleans(), "track_running_stats": st.booleans()})
NORMS = st.one_of(
    st.builds(lambda options: nn.BatchNorm2d(16, **options), AFFINE),
    st.builds(lambda options: nn.InstanceNorm2d(16, **options), AFFINE),
    st.builds(
        lambda groups, affine: nn.GroupNorm(groups, 16, affine=affine), st.sampled_from([1, 2, 16]), st.booleans()
    ),
    st.builds(lambda affine: nn.LayerNorm((8, 8), elementwise_affine=affine), st.booleans()),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(NORMS, min_size=1, max_size=2), st.booleans(), st.booleans())
def test_norms_with_and_without_tensors_run_at_every_width(norms, universal, training):
    slim = slim_network(*norms, universal=universal).train(training)
    again = slimmable.slimify(slim, WIDTHS, example_inputs=X, universal=universal, inplace=True)
    for width in (*WIDTHS, *([0.75] if universal else [])):
        with slimmable.at_width(again, width), torch.no_grad():
            small = slimmable.extract(again, width)
            torch.testing.assert_close(again(X), small(X))
            assert width == 0.75 or small[0].weight.shape[0] == 16 * width  # two groups cannot become one and a half


@pytest.mark.parametrize("affine", [False, True])
def test_layer_norms_without_tensors_follow(affine):
    net = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16, elementwise_affine=affine), nn.ReLU(), nn.Linear(16, 2))
    slim = slimmable.slimify(net, WIDTHS, example_inputs=torch.zeros(2, 4))
    oracles.every_width_is_its_extraction(slim, torch.randn(2, 4), limit=1e-6)
    assert slimmable.extract(slim, 0.5)[1].normalized_shape == (8,)


# -- layers that are changed after the conversion
class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


DERIVED = {
    "unstructured pruning": lambda m: prune.l1_unstructured(m[3], "weight", 0.3),
    "structured pruning": lambda m: prune.ln_structured(m[3], "weight", 0.3, n=2, dim=0),
    "pruning twice": lambda m: [prune.random_unstructured(m[3], "weight", 0.3) for _ in range(2)],
    "pruned bias": lambda m: prune.l1_unstructured(m[3], "bias", 0.3),
    "weight norm": lambda m: weight_norm(m[3]),
    "spectral norm": lambda m: spectral_norm(m[3]),
    "weight norm, parametrized": lambda m: parametrizations.weight_norm(m[3]),
    "spectral norm, parametrized": lambda m: parametrizations.spectral_norm(m[3]),
    "parametrization": lambda m: parametrize.register_parametrization(m[3], "weight", Doubled()),
}
PERMANENT = {
    "pruning": lambda m: (prune.l1_unstructured(m[3], "weight", 0.3), prune.remove(m[3], "weight")),
    "parametrization": lambda m: (
        parametrize.register_parametrization(m[3], "weight", Doubled()),
        parametrize.remove_parametrizations(m[3], "weight"),
    ),
    "pruned norms": lambda m: [prune.l1_unstructured(norm, "weight", 0.5) for norm in (m[1].full, m[1].narrow[0])],
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", DERIVED)
def test_a_weight_that_is_computed_now_is_refused_until_the_model_is_converted_again(change):
    slim = slim_network()
    DERIVED[change](slim)
    with pytest.raises(ConversionError, match=r"3\.(weight|bias|parametrizations).*call slimmable\.slimify"):
        slimmable.extract(slim, 0.5)
    slim.eval()
    expected = slim(X)
    for inplace in (False, True):
        again = slimmable.slimify(slim, WIDTHS, example_inputs=X, inplace=inplace)
        torch.testing.assert_close(again(X), expected)
        oracles.every_width_is_its_extraction(again, X, limit=1e-6)


@pytest.mark.parametrize("change", PERMANENT)
def test_a_change_that_was_made_permanent_is_extracted(change):
    slim = slim_network()
    PERMANENT[change](slim)
    slim.eval()
    for width in WIDTHS:
        with slimmable.at_width(slim, width):
            torch.testing.assert_close(slimmable.extract(slim, width)(X), slim(X))


def test_pruning_all_norms_of_a_width_at_once_is_refused():
    slim = slim_network()
    expected = slim(X)
    with pytest.raises(ConversionError, match=r"weight_orig cannot be added .* norm\.full and norm\.narrow"):
        prune.l1_unstructured(slim[1], "weight", 0.5)
    assert torch.equal(slim(X), expected)


def test_a_layer_built_by_hand_refuses_what_it_cannot_slice():
    layer = slimmable.SlimConv2d(16, 16, 3, widths=WIDTHS)
    parametrize.register_parametrization(layer, "weight", Doubled())
    with pytest.raises(ConversionError, match=r"gained layers .*: parametrizations\.weight \(ParametrizationList\)"):
        slimmable.set_width(layer, 0.5)


# -- memory format
@pytest.mark.parametrize("universal", [False, True])
def test_an_extraction_keeps_the_memory_format(universal):
    slim = slim_network(universal=universal).to(memory_format=torch.channels_last)
    slim[7].weight.data = slim[7].weight.data.t().contiguous().t()
    for width in (*WIDTHS, *([0.7] if universal else [])):
        small = slimmable.extract(slim, width)
        for name, own in small.named_parameters():
            full = slim.get_parameter(name)
            assert own.untyped_storage().nbytes() == own.nbytes
            assert sorted(range(own.ndim), key=own.stride) == sorted(range(own.ndim), key=full.stride)
        assert all(small[i].weight.is_contiguous(memory_format=torch.channels_last) for i in (0, 3))


def test_picked_channels_keep_the_memory_format():
    """Behind a concatenation, the kept channels are not contiguous."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 3)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3))

    slim = slimmable.slimify(Two().to(memory_format=torch.channels_last), WIDTHS, example_inputs=X)
    small = slimmable.extract(slim, 0.5)
    assert small.c.weight.shape == (4, 8, 3, 3)
    assert small.c.weight.is_contiguous(memory_format=torch.channels_last)
    oracles.every_width_is_its_extraction(slim, X, limit=1e-6)


# -- the full width's weights
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_full_state_dict_loads_strictly_into_the_plain_model(name, gated):
    slim, original = converted(name), plain(name)
    model = slimmable.gating.gate(slim, example_inputs=images()) if gated else slim
    if not gated:
        slimmable.set_width(model, 0.25)
    found = slimmable.full_state_dict(model)
    assert list(found) == list(original.state_dict())
    assert found._metadata == original.state_dict()._metadata
    other = plain(name, drop_rate=0.1)
    torch.nn.init.zeros_(next(other.parameters()))
    other.load_state_dict(found, strict=True)
    assert all(torch.equal(t, original.state_dict()[n]) for n, t in other.state_dict().items())
    kept = slimmable.full_state_dict(model, prefix="net.", keep_vars=True)
    parameters = dict(model.named_parameters())
    assert all(kept[f"net.{key}"] is parameters[key] for key, _ in original.named_parameters() if not gated)
    assert not found[next(iter(found))].requires_grad


def test_the_full_state_dict_of_parts_wrappers_and_plain_models():
    slim, original = converted("test_resnet"), plain("test_resnet")
    assert list(slimmable.full_state_dict(slim.bn1)) == list(original.bn1.state_dict())
    assert list(slimmable.full_state_dict(slim.layer1)) == list(original.layer1.state_dict())
    wrapper = nn.Sequential(slim, nn.Linear(10, 2))
    assert list(slimmable.full_state_dict(wrapper)) == list(nn.Sequential(original, nn.Linear(10, 2)).state_dict())
    for model in (original, slimmable.extract(slim, 0.5)):
        assert list(slimmable.full_state_dict(model)) == list(model.state_dict())
    hand = nn.Sequential(
        slimmable.SlimConv2d(3, 8, 3, widths=WIDTHS, slim_in=False),
        SwitchableBatchNorm2d(8, widths=WIDTHS),
        SlimGroupNorm(2, 8, widths=WIDTHS),
        nn.Flatten(),
        slimmable.SwitchableProbe(8 * 36, 4, widths=WIDTHS),
    )
    slimmable.set_width(hand, 0.5)
    same = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 36, 4))
    same.load_state_dict(slimmable.full_state_dict(hand))
    assert torch.equal(same[4].weight, hand[4].linears[0].weight)
    with pytest.raises(UsageError, match="full_state_dict"):
        slimmable.full_state_dict({})


def test_statistics_that_were_computed_for_other_widths_are_not_in_the_full_state_dict():
    slim = slim_network(universal=True)
    slimmable.calibrate_bn(slim, [X], widths=[0.75])
    slimmable.set_width(slim, 0.6)
    assert list(slimmable.full_state_dict(slim)) == list(network().state_dict())


# -- plans and conversions that fail
@pytest.mark.parametrize("options", [{}, {"universal": True}, {"round_to": 4}])
def test_the_plan_of_a_converted_model_is_the_one_that_it_has(options):
    slim = slim_network(**options)
    own = slimmable.plan(slim)
    assert own is slim.__dict__["_slim"].plan
    assert own.widths == WIDTHS
    assert slimmable.plan(slim, (1.0, 0.25), example_inputs=X).widths == (1.0, 0.25)
    assert slimmable.plan(network(), example_inputs=X).widths == (1.0, 0.75, 0.5, 0.25)


def test_the_plan_of_a_model_that_gained_a_layer_is_a_new_one_at_its_own_widths():
    slim = slim_network()
    slim[7] = nn.Linear(16, 3)
    found = slimmable.plan(slim, example_inputs=X)
    assert found.widths == WIDTHS
    assert found is not slim.__dict__["_slim"].plan


class Unlike(type(nn.Module)):
    """A metaclass whose classes cannot be subclassed once they are closed."""

    closed = False

    def __new__(cls, name, bases, body):
        if any(getattr(base, "closed", False) for base in bases):
            raise MemoryError(name)
        return super().__new__(cls, name, bases, body)


@pytest.mark.parametrize("part", ["", "1"])
def test_a_part_whose_conversion_fails_is_left_as_it_was(part, monkeypatch):
    class Closed(nn.Linear, metaclass=Unlike):
        pass

    body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), Closed(8, 8))
    model = slimmable.slimify(nn.Sequential(nn.Linear(4, 8), body), WIDTHS, example_inputs=torch.zeros(2, 4)).eval()
    x = torch.randn(2, 4)
    slimmable.calibrate_bn(model, [x], widths=WIDTHS)
    target = model.get_submodule(part)
    body[0].notes = 3
    before, states = copy.deepcopy(model), dict(model.state_dict())
    expected, kinds = slimmable.run_widths(before, x), [type(module) for module in model.modules()]
    monkeypatch.setattr(Closed, "closed", True)
    _viewed_class.cache_clear()  # so that the last layer fails, after the others have been converted
    with pytest.raises(MemoryError):
        slimmable.slimify(target, (1.0, 0.25), example_inputs=torch.zeros(2, 8 if part else 4), inplace=True)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(states)
    for width, y in slimmable.run_widths(model, x).items():
        assert torch.equal(y, expected[width])
    assert slimmable.plan(model) is model.__dict__["_slim"].plan
