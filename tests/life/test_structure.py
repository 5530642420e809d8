"""Models that are taken apart, changed and asked for their sizes, before and after the conversion."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

import slimmable
from tests.convert import oracles
from tests.life.networks import FAMILIES, WIDTHS, converted, images, plain, shapes

SMALL = images(size=64)


def resnet18(**options) -> nn.Module:
    """The backbone of most self-supervised scripts."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(**options)


@pytest.fixture(scope="module")
def template() -> nn.Module:
    return slimmable.slimify(resnet18(num_classes=10), WIDTHS, example_inputs=SMALL)


@pytest.fixture
def resnet(template) -> nn.Module:
    return slimmable.slimify(template, WIDTHS)  # converted already: a copy


class Method(nn.Module):
    """A backbone without its classifier and a head, as scripts put them together."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x):
        return self.head(self.backbone(x).flatten(start_dim=1))


# -- the root thrown away
def test_a_body_without_its_root_switches_and_equals_the_whole_model(resnet):
    features = slimmable.slimify(resnet18(num_classes=10), WIDTHS, example_inputs=SMALL)
    features.fc = nn.Identity()
    body = nn.Sequential(*list(resnet.eval().children())[:-1])
    expected = slimmable.run_widths(features.eval(), SMALL)
    for width, y in slimmable.run_widths(body, SMALL).items():
        assert torch.equal(y.flatten(1), expected[width])
    with slimmable.at_width(body, 0.5):
        assert slimmable.width_of(resnet.layer1) == 0.5
        assert slimmable.width_of(resnet.fc) == 1.0  # not a part of the body


def test_a_method_around_a_body_is_converted_as_a_whole_before_or_after(resnet):
    before = Method(nn.Sequential(*list(resnet18(num_classes=10).children())[:-1]))
    after = Method(nn.Sequential(*list(resnet.children())[:-1]))
    for method in (before, after):
        slim = slimmable.slimify(method, WIDTHS, example_inputs=SMALL)
        assert shapes(slim, SMALL) == [(2, 16)] * 3
        with slimmable.at_width(slim, 0.25):
            assert slim.head[0].weight.shape == (16, 128)
            assert slim.backbone[0].weight.shape == (16, 3, 7, 7)


# -- parts replaced after the conversion
def replace_the_classifier_by_an_mlp(model: nn.Module) -> None:  # moco-v3
    features = model.fc.weight.shape[1]
    del model.fc
    model.fc = nn.Sequential(
        nn.Linear(features, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10, bias=False)
    )


def put_in_a_stem_for_small_images(model: nn.Module) -> None:  # CIFAR
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()


def put_in_another_norm(model: nn.Module) -> None:
    model.layer2[0].bn1 = nn.GroupNorm(32, 128)


def put_in_an_activation_with_weights(model: nn.Module) -> None:
    model.layer3[1].relu = nn.PReLU(256)


SURGERY = {
    replace_the_classifier_by_an_mlp: r"fc\.0 \(Linear\), fc\.1 \(BatchNorm1d\), fc\.3 \(Linear\)",
    put_in_a_stem_for_small_images: r"conv1 \(Conv2d\)",
    put_in_another_norm: r"layer2\.0\.bn1 \(GroupNorm\)",
    put_in_an_activation_with_weights: r"layer3\.1\.relu \(PReLU\)",
}


@pytest.mark.parametrize("surgery", SURGERY)
def test_new_layers_are_named_and_converted_by_converting_again(surgery, resnet):
    surgery(resnet)
    recipe = r"gained layers after its conversion.*slimmable\.slimify"
    for use in (slimmable.widths_of, slimmable.width_of, lambda m: slimmable.run_widths(m, SMALL)):
        with pytest.raises(slimmable.errors.ConversionError, match=SURGERY[surgery]):
            use(resnet)
    with pytest.raises(slimmable.errors.ConversionError, match=recipe):
        slimmable.set_width(resnet, 0.5)
    mine = dict(resnet.named_parameters())
    assert slimmable.slimify(resnet, WIDTHS, example_inputs=SMALL, inplace=True) is resnet
    now = dict(resnet.named_parameters())
    assert all(now[name] is parameter for name, parameter in mine.items())  # what the optimizer holds stays
    assert shapes(resnet, SMALL) == [(2, 10)] * 3
    oracles.every_width_is_its_extraction(resnet.eval(), SMALL, limit=1e-5)


@pytest.mark.parametrize("surgery", SURGERY)
def test_surgery_before_the_conversion_needs_nothing(surgery):
    model = resnet18(num_classes=10)
    surgery(model)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=SMALL)
    assert shapes(slim, SMALL) == [(2, 10)] * 3


def test_a_layer_without_weights_in_place_of_one_needs_nothing(resnet):
    resnet.fc = nn.Identity()
    assert shapes(resnet, SMALL) == [(2, 512), (2, 256), (2, 128)]


def test_a_new_parameter_of_the_same_shape_is_sliced_like_the_old_one(resnet):
    resnet.conv1.weight = nn.Parameter(torch.arange(64.0).view(64, 1, 1, 1).repeat(1, 3, 7, 7))
    slimmable.set_width(resnet, 0.5)
    assert resnet.conv1.weight[:, 0, 0, 0].tolist() == list(range(32))


def test_a_new_parameter_of_another_shape_is_refused_and_healed_by_another_conversion(resnet):
    resnet.fc.weight = nn.Parameter(torch.zeros(20, 512))
    resnet.fc.bias = nn.Parameter(torch.zeros(20))
    assert resnet(SMALL).shape == (2, 20)
    slimmable.set_width(resnet, 0.5)
    with pytest.raises(slimmable.errors.ConversionError, match=r"fc\.weight .* has shape \(20, 512\)"):
        resnet(SMALL)
    assert shapes(slimmable.slimify(resnet, WIDTHS, example_inputs=SMALL), SMALL) == [(2, 20)] * 3


@pytest.mark.parametrize("name", FAMILIES)
def test_timms_other_classifiers(name):
    slim, x = converted(name), images()
    features = slim.num_features if name != "test_efficientnet" else slim.head_hidden_size
    slim.reset_classifier(0)
    assert isinstance(slim.get_classifier(), nn.Identity)
    assert shapes(slim, x) == [(2, features), (2, features // 2), (2, features // 4)]
    slim.reset_classifier(7)
    with pytest.raises(slimmable.errors.ConversionError, match=r"(fc|head|classifier) \(Linear\)"):
        slimmable.set_width(slim, 0.5)
    assert slim.get_classifier().in_features == features  # sized by what stays full
    slim = slimmable.slimify(slim, WIDTHS)
    assert shapes(slim, x) == [(2, 7)] * 3


# -- sizes, and features on the way
@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_that_heads_are_made_by_stay_full_at_every_width(name):
    original, slim = plain(name), converted(name)
    for width in WIDTHS:
        slimmable.set_width(slim, width)
        for size in ("num_features", "head_hidden_size", "embed_dim"):
            assert getattr(slim, size, None) == getattr(original, size, None)
        assert slim.get_classifier().in_features == original.get_classifier().in_features
        assert slim.feature_info == original.feature_info


@pytest.mark.parametrize("name", [*FAMILIES, "test_convnext"])
def test_features_only_gets_thinner_and_says_so_when_extracted(name):
    slim, x = converted(name, features_only=True, num_classes=None), images()
    full = plain(name, features_only=True, num_classes=None).feature_info.channels()
    for width in WIDTHS:
        with slimmable.at_width(slim, width), torch.no_grad():
            channels = [y.shape[1] for y in slim(x)]
        assert channels == [int(width * count) for count in full]
        assert slim.feature_info.channels() == full
        small = slimmable.extract(slim, width)
        assert small.feature_info.channels() == channels
        assert small.feature_info.reduction() == slim.feature_info.reduction()


@pytest.mark.parametrize("name", FAMILIES)
def test_intermediate_features_get_thinner(name):
    slim, x = converted(name).eval(), images()
    with torch.no_grad():
        _, full = slim.forward_intermediates(x)
        for width in WIDTHS:
            with slimmable.at_width(slim, width):
                final, maps = slim.forward_intermediates(x)
                assert torch.equal(slim.forward_head(final), slim(x))
            assert [y.shape[1] for y in maps] == [int(width * y.shape[1]) for y in full]


def test_hooks_see_what_the_active_width_computes(resnet):
    seen = []
    resnet.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    resnet.bn1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    resnet.layer4.register_forward_hook(lambda module, inputs, output: output * 0)
    resnet.layer1.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape[1]))
    for width in WIDTHS:
        with slimmable.at_width(resnet, width):
            y = resnet(SMALL)
            y.sum().backward()
        assert torch.equal(y, resnet.fc.bias.expand_as(y))  # the hook's result is what goes on
    assert seen == [3, 64, 64, 3, 32, 32, 3, 16, 16]


def test_a_timm_backbone_that_a_script_builds_its_heads_on():
    """solo-learn: the classifier goes, the head is sized by `num_features`."""
    backbone = timm.create_model("test_resnet")
    backbone.fc = nn.Identity()
    head = nn.Linear(backbone.num_features, 16)
    slim = slimmable.slimify(nn.Sequential(backbone, head), WIDTHS, example_inputs=images())
    assert shapes(slim, images()) == [(2, 16)] * 3
