"""`repair`: what least squares must give exactly, what it must gain on a trained network, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimmable
from slimmable.errors import ConversionError, DataError, UsageError, WidthError

WIDTH = 0.5
EXACT = 1e-12  # ridge, for outputs that the narrow network can give


def seeded(make, dtype=torch.float64):
    torch.manual_seed(0)
    return make().to(dtype).eval()


def images(*size, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Self-attention over tokens by plain linear layers, with as many heads as the width keeps."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads = heads
        self.embed, self.qkv, self.proj = nn.Linear(6, dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        return self.head((x + self.proj(mixed)).mean(1))


def convolutions(groups=1):
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=groups)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), images(64, 6)),
    "convolutions": (convolutions, images(64, 2, 8, 8)),
    "groups": (lambda: convolutions(2), images(64, 2, 8, 8)),
    "depth-wise": (lambda: convolutions(8), images(64, 2, 8, 8)),
    "attention": (Attention, images(64, 5, 6)),
}


def twice(model):
    """Set each group's second half of units to copies of its first half; what reads them stays as it was."""
    plan = slimmable.plan(model, (1.0, WIDTH), example_inputs=NETWORKS["linear"][1][:2])
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
            if layer.out_features == 8:
                layer.weight[4:], layer.bias[4:] = layer.weight[:4], layer.bias[:4]
    assert plan.channels.units == (8,)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_full_width_is_the_network_itself(name):
    make, x = NETWORKS[name]
    model = seeded(make)
    before = copy.deepcopy(model.state_dict())
    small = slimmable.repair(model, [x], 1.0, importance=None)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_copies_of_units_are_given_back_exactly():
    x = NETWORKS["linear"][1]
    model = twice(seeded(NETWORKS["linear"][0]))
    cut = slimmable.extract(slimmable.slimify(model, (1.0, WIDTH), example_inputs=x), WIDTH)
    small = slimmable.repair(model, [x], WIDTH, importance=None, ridge=EXACT)
    new = images(500, 6) + 1
    assert (cut(new) - model(new)).abs().max() > 0.1
    torch.testing.assert_close(small(new), model(new), rtol=0, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 8])
def test_convolutions_get_back_what_copies_of_channels_gave(groups):
    model, x = seeded(lambda: convolutions(groups)), images(64, 2, 8, 8)
    model[1] = nn.Identity()  # whose statistics would be estimated
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[3].weight, model[3].bias):
            tensor[4:] = tensor[:4]
    cut = slimmable.extract(slimmable.slimify(model, (1.0, WIDTH), example_inputs=x), WIDTH)
    small = slimmable.repair(model, [x], WIDTH, importance=None, ridge=EXACT)
    assert (cut(x) - model(x)).abs().max() > 0.01
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-6)


def test_a_linear_network_is_what_numpy_fits():
    model, x = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))), images(64, 6)
    small = slimmable.repair(model, [x[:40], x[40:]], WIDTH, importance=None, ridge=EXACT)
    inputs = np.column_stack([model[0](x).detach().numpy()[:, :4], np.ones(64)])
    solution = np.linalg.lstsq(inputs, model(x).detach().numpy(), rcond=None)[0]
    np.testing.assert_allclose(small[1].weight.detach().numpy(), solution[:4].T, atol=1e-8)
    np.testing.assert_allclose(small[1].bias.detach().numpy(), solution[4], atol=1e-8)


def test_ridge_holds_to_the_cut_weights():
    model, x = seeded(NETWORKS["linear"][0]), NETWORKS["linear"][1]
    cut = slimmable.extract(slimmable.slimify(model, (1.0, WIDTH), example_inputs=x), WIDTH)
    held = slimmable.repair(model, [x], WIDTH, importance=None, ridge=1e12)
    torch.testing.assert_close(held[2].weight, cut[2].weight)


def by_spread(model, plan):
    """Rank the units by how much the weights that make them vary."""
    scores = [np.zeros(group.units) for group in plan.groups]
    for score, group in zip(scores, plan.groups, strict=True):
        for (path, name, axis), units in group.members.items():
            if name == "weight" and axis == 0 and path in group.makers:
                spread = model.get_submodule(path).weight.detach().flatten(1).std(1)
                np.add.at(score, units[units >= 0], spread[units >= 0])
    return scores


@pytest.mark.parametrize("importance", ["magnitude", by_spread])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_come_nearer_to_the_full_network(name, importance):
    make, x = NETWORKS[name]
    model, new = seeded(make), images(300, *x.shape[1:]).flip(0)
    slim = slimmable.slimify(model, (1.0, WIDTH), example_inputs=x, importance="magnitude")
    slimmable.calibrate_bn(slim, [x], [WIDTH])
    cut, small = slimmable.extract(slim, WIDTH), slimmable.repair(model, [x], WIDTH, importance=importance, ridge=0.01)
    wanted = model(new)
    assert (small(new) - wanted).square().mean() < 0.9 * (cut(new) - wanted).square().mean()
    if importance == "magnitude":
        same = slimmable.extract(slim, WIDTH, repair=[x])
        assert {k: v.shape for k, v in same.state_dict().items()} == {k: v.shape for k, v in cut.state_dict().items()}


def test_a_trained_network_keeps_more_of_its_accuracy_than_by_statistics_alone():
    torch.manual_seed(0)
    centers = torch.randn(10, 1, 8, 8)
    labels = torch.randint(10, (3000,))
    x = centers[labels] + 1.2 * torch.randn(3000, 1, 8, 8)
    layers = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for rows in torch.arange(2000).repeat(5).split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
    model.eval()
    slim = slimmable.slimify(model, (1.0, 0.25), example_inputs=x[:2], importance="magnitude")
    loader = [(x[rows], labels[rows]) for rows in torch.arange(2000).split(100)]
    slimmable.calibrate_bn(slim, loader, [0.25])
    networks = {"full": model, "cut": slimmable.extract(slim, 0.25), "repaired": slimmable.repair(model, loader, 0.25)}
    right = {name: float((net(x[2000:]).argmax(1) == labels[2000:]).float().mean()) for name, net in networks.items()}
    assert right["full"] > 0.85
    assert right["repaired"] > right["cut"] + 0.1


def test_weights_that_layers_share_stay_tied_and_as_they_were_cut():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.again = nn.Linear(8, 8)
            self.again.weight = self.mix.weight

        def forward(self, x):
            return self.head(self.again(self.mix(self.mix(self.first(x).relu()).relu()).relu()))

    model, x = seeded(Twice), images(64, 6)
    small = slimmable.repair(model, [x], WIDTH, importance=None)
    assert small.again.weight is small.mix.weight
    torch.testing.assert_close(small.mix.weight, model.mix.weight[:4, :4], rtol=0, atol=0)
    assert not torch.equal(small.head.weight, model.head.weight[:, :4])


def test_layers_with_a_forward_of_their_own_keep_their_cut_weights():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model, x = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Scaled(8, 3))), images(64, 6)
    small = slimmable.repair(model, [x], WIDTH, importance=None)
    torch.testing.assert_close(small[2].weight, model[2].weight[:, :4], rtol=0, atol=0)


def test_modes_of_a_network_in_training_stay_and_its_statistics_do_not_change():
    model, x = seeded(convolutions).train(), images(64, 2, 8, 8)
    before = copy.deepcopy(model.state_dict())
    small = slimmable.repair(model, [x], {"*": 0.5})
    assert all(module.training for module in (*small.modules(), *model.modules()))
    assert not any(module._forward_hooks for module in (*small.modules(), *model.modules()))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_function_ranks_the_units():
    model, x = seeded(NETWORKS["linear"][0]), images(64, 6)
    last = lambda model, plan: [np.arange(group.units) for group in plan.groups]  # noqa: E731
    slim = slimmable.slimify(model, (1.0, WIDTH), example_inputs=x, importance=last)
    torch.testing.assert_close(slim[0].weight, model[0].weight.flip(0), rtol=0, atol=0)
    torch.testing.assert_close(slimmable.repair(model, [x], WIDTH, importance=last)[0].weight, slim[0].weight[:4])


@pytest.mark.parametrize(
    "scores",
    [[], [np.ones(7)], [np.ones((8, 1))], [np.full(8, np.nan)], [np.ones(8), np.ones(8)], None, [["a"] * 8], 3],
)
def test_scores_that_do_not_fit_are_refused(scores):
    model, x = seeded(NETWORKS["linear"][0]), images(64, 6)

    def wrong(model, plan):
        return scores

    with pytest.raises(ConversionError, match=r"importance <function .*wrong"):
        slimmable.slimify(model, (1.0, WIDTH), example_inputs=x, importance=wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loader": []}, DataError, "loader is empty"),
        ({"loader": images(4, 6)}, UsageError, "loader must hold batches"),
        ({"loader": [torch.full((4, 6), torch.nan, dtype=torch.float64)]}, DataError, "nan or infinity"),
        ({"loader": ["text"]}, DataError, "batches must be tensors"),
        ({"width": 0.0}, WidthError, "0.0"),
        ({"width": 2}, WidthError, "2"),
        ({"importance": "size"}, ConversionError, "'size' is unknown"),
        ({"ridge": -1.0}, UsageError, "ridge must be a finite number of at least 0, got -1.0"),
    ],
)
def test_bad_calls_say_what_is_wrong(change, error, message):
    model = seeded(NETWORKS["linear"][0])
    given = {"loader": [images(64, 6)], "width": WIDTH} | change
    with pytest.raises(error, match=message):
        slimmable.repair(model, **given)


def test_the_order_of_a_converted_model_stands():
    model, x = seeded(NETWORKS["linear"][0]), images(64, 6)
    slim = slimmable.slimify(model, (1.0, WIDTH), example_inputs=x)
    with pytest.raises(ConversionError, match="a converted model has its order"):
        slimmable.repair(slim, [x], WIDTH, importance=None)
