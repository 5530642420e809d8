"""Evaluation of loaders: the same as of tensors, and linear evaluation against plain PyTorch in float64."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import slimmable
from slimmable.errors import CheckpointError, DataError, DivergedError, UsageError
from slimmable.evaluation import (
    evaluate_features,
    evaluate_widths,
    linear_evaluation,
    train_probe,
)
from tests.evaluation.features import features_of

WIDTHS = (1.0, 0.5, 0.25)
ALL = ("knn", "linear", "slimmable", "ridge")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return slimmable.slimify(net, WIDTHS, example_inputs=torch.zeros(2, 1, 8, 8))


def images_of(count, seed=0, dtype=torch.float32, classes=7):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    pictures = torch.rand(classes, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return pictures[labels] + 0.4 * torch.rand(count, 1, 8, 8, generator=generator, dtype=dtype), labels


# -- evaluate_widths
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 70), st.booleans())
def test_a_loader_gives_what_its_images_give(backbone, train, test, batch, whole):
    (x, labels), (y, answers) = images_of(train), images_of(test, 1)
    if whole:
        x, y = (x * 180).byte(), (y * 180).byte()
    loaders = [DataLoader(TensorDataset(*each), batch_size=batch) for each in ((x, labels), (y, answers))]
    expected = evaluate_widths(backbone, x, labels, y, answers, probes=("knn", "ridge"))
    found = evaluate_widths(backbone, loaders[0], test=loaders[1], probes=("knn", "ridge"))
    for width in WIDTHS:
        for name, share in dataclasses.asdict(expected[width]).items():
            assert dataclasses.asdict(found[width])[name] == pytest.approx(share, abs=1.01 / test, nan_ok=True)


def test_loaders_and_lists_are_those_of_features(backbone):
    (x, labels), (y, answers) = images_of(64), images_of(30, 1)
    features = [{width: features_of(backbone, images, width) for width in WIDTHS} for images in (x, y)]
    how = {"probes": ALL, "k": 9, "metric": "euclidean", "temperature": 1e6}
    expected = evaluate_features(features[0], labels, features[1], answers, **how)
    batches = list(zip(x.split(64), labels.split(64), strict=True))
    backbone.train()
    found = evaluate_widths(backbone, batches, test=((x, labels) for x, labels in [(y, answers)]), **how)
    assert found == expected
    assert evaluate_widths(backbone, x, labels, [[y, answers]], **how) == expected
    assert all(module.training for module in backbone.modules())
    assert slimmable.width_of(backbone) == 1.0
    backbone.eval()


def test_only_one_batch_of_images_is_in_memory(backbone):
    alive = []

    class Batches:
        def __iter__(self):
            for seed in range(5):
                x, labels = images_of(8, seed)
                alive.append(torch.utils.weak.WeakTensorKeyDictionary({x: 0}))
                assert sum(len(each) for each in alive) <= 2
                yield x, labels

    assert evaluate_widths(backbone, Batches(), test=Batches(), probes=("knn",), k=1)[0.25].knn > 0.5
    assert len(alive) == 10


X, Y = images_of(6)
NOT_BATCHES = [
    (None, "got None"),
    (3, "got 3"),
    ([], "train is empty"),
    (X, r"batches \(images, labels\), got a tensor of shape \(1, 8, 8\)|labels must be a tensor, got NoneType"),
    ([X], r"batches \(images, labels\), got a tensor of shape \(6, 1, 8, 8\)"),
    ([{"pixel_values": X, "labels": Y}], r"batches \(images, labels\), got {'pixel_values'"),
    ([(X, Y, Y)], r"batches \(images, labels\), got \("),
    ([(X, Y.tolist())], "a batch: labels must be a tensor, got list"),
    ([(X, Y[:3])], r"a batch has shape \(6, 1, 8, 8\) and labels of shape \(3,\)"),
    ([(X, Y.float())], "labels are torch.float32"),
    ([(X[:0], Y[:0])], "a batch has shape"),
]


@pytest.mark.parametrize(("batches", "says"), NOT_BATCHES)
def test_what_is_no_loader_is_refused(backbone, batches, says):
    with pytest.raises(DataError, match=f"evaluate_widths: train.*{says}|train is empty"):
        evaluate_widths(backbone, batches, test=[(X, Y)])
    if batches is not None:
        with pytest.raises((DataError, UsageError), match=f"linear_evaluation: train.*{says}|train is empty"):
            linear_evaluation(backbone, batches, [(X, Y)], num_classes=7, epochs=1)


# -- linear evaluation
class Crops(Dataset):
    """Another part of each image in each epoch, drawn from torch's random numbers, as augmentations are."""

    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        left = int(torch.randint(0, 3, ()))
        return self.x[index, :, :, left : left + 6], self.labels[index]


def plain_evaluation(backbone, train, test, classes, epochs, rate, milestones):
    """The same in plain PyTorch for the networks of the widths, each extracted: width -> (top-1, top-5)."""
    networks = {width: slimmable.extract(backbone, width).eval() for width in WIDTHS}
    with torch.random.fork_rng():
        sizes = {width: network(next(iter(test))[0]).shape[1] for width, network in networks.items()}
        own = {width: nn.Linear(size, classes, dtype=torch.float64) for width, size in sizes.items()}
    parameters = [p for linear in own.values() for p in linear.parameters()]
    velocities = [torch.zeros_like(p) for p in parameters]
    for p in parameters:
        nn.init.zeros_(p)

    def scores_of(x):
        with torch.no_grad():
            features = {width: network(x) for width, network in networks.items()}
        return {w: F.linear(f, own[w].weight, own[w].bias) for w, f in features.items()}

    for epoch in range(epochs):
        decay = (1 + math.cos(math.pi * epoch / epochs)) / 2
        if milestones:
            decay = 0.1 ** sum(epoch >= each for each in milestones)
        for x, labels in train:
            scores = scores_of(x)
            loss = F.cross_entropy(scores[1.0], labels)
            for narrow in (0.5, 0.25):
                alone = F.cross_entropy(scores[narrow], labels)
                taught = -(scores[1.0].detach().softmax(1) * scores[narrow].log_softmax(1)).sum(1).mean()
                loss = loss + (alone + taught) / 2
            for p, v, g in zip(parameters, velocities, torch.autograd.grad(loss, parameters), strict=True):
                v.mul_(0.9).add_(g)
                p.data.sub_(rate * decay * v)
    found = {}
    for width in WIDTHS:
        hits = []
        for x, labels in test:
            best = scores_of(x)[width].argsort(1, descending=True)[:, :5]
            hits.append(torch.stack([(best[:, :k] == labels[:, None]).any(1) for k in (1, 5)], 1))
        found[width] = torch.cat(hits).double().mean(0).tolist()
    return found, [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("milestones", [None, (2, 4)])
def test_it_is_plain_training_on_random_crops(backbone, milestones, tmp_path):
    model = copy.deepcopy(backbone).double()
    train = DataLoader(Crops(*images_of(50, dtype=torch.float64)), batch_size=16, shuffle=True)
    y, answers = images_of(60, 3, torch.float64)
    test = DataLoader(TensorDataset(y[..., 1:7], answers), batch_size=25)
    torch.manual_seed(1)
    how = {"epochs": 5, "learning_rate": 1.25, "milestones": milestones, "path": tmp_path / "state"}
    # a batch of `test` is looked at before training: the same draws for both
    found = linear_evaluation(model, train, test, num_classes=7, **how)
    torch.manual_seed(1)
    next(iter(test))
    expected, parameters = plain_evaluation(model, train, test, 7, 5, 1.25, milestones)
    with safe_open(tmp_path / "state", framework="pt") as file:
        for index in range(3):
            for plain, name in zip(parameters[2 * index :][:2], ("weight", "bias"), strict=True):
                torch.testing.assert_close(file.get_tensor(f"{index}.{name}"), plain, rtol=1e-9, atol=1e-10)
    for width in WIDTHS:
        one, five = found[width].linear, found[width].linear_top5
        assert [one, five] == pytest.approx(expected[width])
        assert 0.1 < one < five < 1
        assert math.isnan(found[width].knn)


def test_the_backbone_and_the_random_numbers_stay_as_they_were(backbone):
    batches = [images_of(20, seed) for seed in range(3)]
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    random = torch.get_rng_state()
    backbone.train()
    linear_evaluation(backbone, batches, batches[:1], num_classes=7, epochs=3)
    assert backbone.training
    backbone.eval()
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_a_stopped_evaluation_goes_on_to_the_same_result(backbone, epochs, tmp_path):
    asked = []

    def train(epoch):
        asked.append(epoch)
        if stops and epoch == epochs:
            raise KeyboardInterrupt
        return [images_of(20, 3 * epoch + part) for part in range(3)]

    stops, test = False, [images_of(50, 9)]
    how = {"num_classes": 7, "epochs": 4, "learning_rate": 0.4}
    whole = linear_evaluation(backbone, train, test, path=tmp_path / "whole", **how)
    assert asked == [0, 1, 2, 3]
    stops = True
    if epochs < 4:
        with pytest.raises(KeyboardInterrupt):
            linear_evaluation(backbone, train, test, path=str(tmp_path / "part"), **how)
        stops = False
        asked.clear()
        assert linear_evaluation(backbone, train, test, path=tmp_path / "part", **how) == whole
        assert asked == [0, 1, 2, 3][epochs:]
        assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()
    asked.clear()
    assert linear_evaluation(backbone, train, lambda epoch: test, path=tmp_path / "whole", **how) == whole
    assert asked == []
    assert linear_evaluation(backbone, lambda epoch: train(epoch) if epoch < 4 else None, test, **how) == whole


def test_the_state_of_another_evaluation_is_refused(backbone, tmp_path):
    batches, path = [images_of(20)], tmp_path / "state"
    how = {"num_classes": 7, "epochs": 2, "learning_rate": 0.4, "path": path}
    linear_evaluation(backbone, batches, batches, **how)
    for more in ({"num_classes": 8}, {"epochs": 3}, {"learning_rate": 0.5}, {"milestones": (1,)}):
        with pytest.raises(CheckpointError, match="was not written by linear_evaluation of"):
            linear_evaluation(backbone, batches, batches, **{**how, **more})
    other = copy.deepcopy(backbone)
    next(other.parameters()).data.add_(1)
    with pytest.raises(CheckpointError, match=r"was not written by linear_evaluation of .* and weights \w{8}"):
        linear_evaluation(other, batches, batches, **how)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="cannot be read; it is damaged"):
        linear_evaluation(backbone, batches, batches, **how)
    with pytest.raises(CheckpointError, match="cannot write"):
        linear_evaluation(backbone, batches, batches, **{**how, "path": tmp_path / "none" / "state"})


def test_probes_on_features_have_the_same_two_accuracies(backbone):
    (x, labels), (y, answers) = images_of(60), images_of(40, 1)
    features = [{width: features_of(backbone, images, width) for width in WIDTHS} for images in (x, y)]
    found = evaluate_features(features[0], labels, features[1], answers, probes=("linear", "slimmable"))
    slim = train_probe(features[0], labels, num_classes=7, shared=True)
    for width, probe in zip(WIDTHS, train_probe(features[0], labels).linears, strict=True):
        with slimmable.at_width(slim, width):
            scores = {"linear": probe(features[1][width]), "slimmable": slim(features[1][width])}
        for kind, each in scores.items():
            hits = (each.topk(5).indices == answers[:, None]).cumsum(1)
            assert getattr(found[width], kind) == pytest.approx(hits[:, 0].float().mean().item())
            assert getattr(found[width], f"{kind}_top5") == pytest.approx(hits[:, 4].float().mean().item())
            assert hits[:, 0].float().mean() < hits[:, 4].float().mean()


def test_it_learns_where_a_probe_on_features_learns(backbone):
    train, test = [images_of(50, seed) for seed in range(4)], [images_of(100, 20)]
    x, labels = (torch.cat(part) for part in zip(*train, strict=True))
    probe = train_probe({width: features_of(backbone, x, width) for width in WIDTHS}, labels)
    found = linear_evaluation(backbone, train, test, num_classes=7, epochs=150, learning_rate=60.0)
    for index, width in enumerate(WIDTHS):
        scores = probe.module_at(index)(features_of(backbone, test[0][0], width))
        usual = (scores.argmax(1) == test[0][1]).float().mean().item()
        assert found[width].linear > usual - 0.1


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"train": iter([(X, Y)])}, UsageError, "is a list_iterator, which ends after one epoch"),
        ({"test": iter([(X, Y)])}, UsageError, "is a list_iterator, which ends after one epoch"),
        ({"test": []}, DataError, "linear_evaluation: test is empty"),
        ({"num_classes": 5}, DataError, "labels from 0 to 5 are not class numbers from 0 to 4, as num_classes is 5"),
        ({"milestones": ("a",)}, UsageError, "milestones must be a 64-bit integer of at least 1, got 'a'"),
        ({"learning_rate": -1}, UsageError, "learning_rate must be .* got -1"),
        ({"epochs": 1.5}, UsageError, "epochs must be .* got 1.5"),
        ({"path": 3}, UsageError, "path must be a path, got 3"),
        ({"train": [(1000 * X, Y)] * 3, "learning_rate": 1e37}, DivergedError, "not finite after epoch 1; lower"),
        ({"train": [(X + math.nan, Y)]}, DataError, "train features at width 1.0: 6 of 6 rows hold nan"),
    ],
)
def test_wrong_calls(backbone, change, error, says):
    given = {"train": [(X, Y)] * 3, "test": [(X, Y)], "num_classes": 7, "epochs": 2, **change}
    with pytest.raises(error, match=says):
        linear_evaluation(backbone, **given)


def test_features_that_are_no_matrix_and_networks_without_widths_are_refused(backbone):
    maps = slimmable.slimify(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()), (1.0, 0.5), example_inputs=X)
    with pytest.raises(DataError, match=r"features at width 1.0 has shape \(6, 8, 6, 6\)"):
        linear_evaluation(maps, [(X, Y)], [(X, Y)], num_classes=7)
    with pytest.raises(slimmable.errors.ConversionError, match="never converted"):
        linear_evaluation(nn.Flatten(), [(X, Y)], [(X, Y)], num_classes=7)


def test_what_a_function_of_the_epoch_returns_must_be_batches(backbone):
    with pytest.raises(DataError, match=r"linear_evaluation: train must be .* got 3"):
        linear_evaluation(backbone, lambda epoch: 3, [(X, Y)], num_classes=7)
