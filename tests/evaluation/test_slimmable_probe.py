"""The probe with one classifier for all widths, few labels, and evaluation by several classifiers."""

import dataclasses
import math
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn

import slimmable
from benchmarks.finetuning import accuracy_of
from slimmable.errors import DataError, UsageError, WidthError
from slimmable.evaluation import (
    Accuracies,
    evaluate_features,
    evaluate_widths,
    knn_accuracy,
    probe_loss,
    ridge_classifier,
    train_probe,
)
from tests.evaluation.features import features_of

GOLDEN = Path(__file__).parents[1] / "golden"


def test_probe_loss_by_width_is_the_published_one():
    golden = load_file(GOLDEN / "slimclr_step.safetensors")
    labels = golden["probe/labels"]
    scores = {width: golden[f"probe/logits/{width:g}"].clone().requires_grad_() for width in (1.0, 0.75, 0.5, 0.25)}
    widest = F.cross_entropy(scores[1.0], labels)
    each = [probe_loss({1.0: scores[1.0], width: part}, labels) - widest for width, part in scores.items()]
    torch.testing.assert_close(torch.stack([widest, *each[1:]]), golden["probe/mixed/losses"], rtol=1e-12, atol=1e-12)
    mean = probe_loss(scores, labels) / len(scores)
    mean.backward()
    torch.testing.assert_close(mean, golden["probe/mixed_mean/total"], rtol=1e-12, atol=0)
    gradients = torch.stack([part.grad for part in scores.values()])
    torch.testing.assert_close(gradients, golden["probe/mixed_mean/grad_logits"], rtol=1e-10, atol=1e-12)


def data(images, classes=4, features=8, seed=0, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, features, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(images) % classes
    return centres[labels] + spread * torch.randn(images, features, generator=generator) + 5, labels


def cut(features, counts=(8, 5, 2)):
    return dict(zip((1.0, 0.5, 0.25), (features[:, :count] for count in counts), strict=True))


def plain_training(features, labels, epochs, batch_size, learning_rate):
    """The same in plain PyTorch and float64: one weight matrix, standardised features, the published loss."""
    inputs = [(x - x.mean(0)) / x.std(0, correction=0) for x in (part.double() for part in features.values())]
    weight = torch.zeros(int(labels.max()) + 1, inputs[0].shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        rate = learning_rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
            scores = [x[rows] @ weight[:, : x.shape[1]].T + bias for x in inputs]
            target = scores[0].detach().softmax(1)
            loss = F.cross_entropy(scores[0], labels[rows])
            for narrow in scores[1:]:
                loss = loss + F.cross_entropy(narrow, labels[rows]) / 2 + F.cross_entropy(narrow, target) / 2
            gradients = torch.autograd.grad(loss, [weight, bias])
            for i, (parameter, gradient) in enumerate(zip((weight, bias), gradients, strict=True)):
                velocity[i] = 0.9 * velocity[i] + gradient
                parameter.data -= rate * velocity[i]
    return [x @ weight[:, : x.shape[1]].T + bias for x in inputs]


def test_slimmable_probe_is_plain_training_of_one_classifier():
    x, labels = data(60)
    features = cut(100 * x)
    probe = train_probe(features, labels, epochs=6, batch_size=25, shared=True)
    expected = plain_training(features, labels, 6, 25, 0.1)
    outputs = {}
    for width, part in features.items():
        with slimmable.at_width(probe, width):
            outputs[width] = probe(part)
            assert probe[1].weight.shape == (4, part.shape[1])
    for found, scores in zip(outputs.values(), expected, strict=True):
        torch.testing.assert_close(found.double(), scores, rtol=1e-4, atol=1e-4)
    assert [tuple(p.shape) for p in probe.parameters()] == [(4, 8), (4,)]
    assert not any(module.training for module in probe.modules())
    small = slimmable.extract(probe, 0.25)
    torch.testing.assert_close(small(features[0.25]), outputs[0.25])


def test_one_classifier_for_all_widths_fails_where_the_rest_corrects_the_first_features():
    """The last feature is the noise of the first: whoever has it must trust the first more than whoever has not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    signal = (2.0 * labels - 1)[:, None] + 0.1 * torch.randn(400, 1, generator=generator)
    noise, other = 5 * torch.randn(400, 1, generator=generator), torch.randn(400, 1, generator=generator)
    wide = torch.cat([signal + noise, 0.3 * signal + other, noise], dim=1)
    features = {1.0: wide, 0.5: wide[:, :2]}
    found = evaluate_features(features, labels, features, labels, probes=("linear", "slimmable", "ridge"))
    assert min(found[1.0].linear, found[1.0].ridge) > 0.9
    assert found[1.0].slimmable < 0.8


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_probes_work_with_few_labels(images, features, classes, seed):
    x = torch.randn(images, features, generator=torch.Generator().manual_seed(seed))
    labels = torch.randint(0, classes, (images,), generator=torch.Generator().manual_seed(seed))
    given_features = {1.0: x, 0.5: x[:, : max(1, features // 2)]}
    for train in (train_probe, partial(train_probe, shared=True)):
        probe = train(given_features, labels, num_classes=classes, epochs=2)
        for width, part in given_features.items():
            with slimmable.at_width(probe, width):
                scores = probe(part)
            assert scores.shape == (images, classes)
            assert scores.isfinite().all()


@pytest.mark.parametrize("train", [train_probe, partial(train_probe, shared=True)])
@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.tensor([0, 1, -1]), None, "labels from -1 to 1"),
        (torch.tensor([0, 1, 2]), 2, "labels from 0 to 2 are not class numbers from 0 to 1"),
        (torch.tensor([0.0, 1, 2]), None, "labels are torch.float32"),
        (torch.tensor([0, 1]), None, r"shape \(3, 4\) and labels of shape \(2,\)"),
    ],
)
def test_probes_refuse_labels_that_do_not_fit(train, labels, classes, message):
    with pytest.raises(DataError, match=message):
        train({1.0: torch.ones(3, 4)}, labels, num_classes=classes)


ALL = ("knn", "linear", "slimmable", "ridge")


def test_evaluation_of_features_is_that_of_each_classifier():
    (x, labels), (y, answers) = data(80, spread=3.0), data(50, seed=1, spread=3.0)
    train, test = cut(x), cut(y)
    found = evaluate_features(train, labels, test, answers, probes=ALL, k=5)
    assert list(found) == [1.0, 0.5, 0.25]
    linear, slim = train_probe(train, labels), train_probe(train, labels, shared=True)
    for index, width in enumerate(found):
        with slimmable.at_width(slim, width):
            scores = [linear.module_at(index)(test[width]), slim(test[width])]
        scores.append(ridge_classifier(train[width], labels)(test[width]))
        shares = [(part.argmax(1) == answers).float().mean().item() for part in scores]
        knn = knn_accuracy(train[width], labels, test[width], answers, k=5)
        assert dataclasses.astuple(found[width])[:4] == (knn, *shares)
        assert [found[width].linear_top5, found[width].slimmable_top5] == [1, 1]  # of three classes
    only = evaluate_features(train, labels, test, answers, probes=("ridge",))[0.5]
    assert only.ridge == found[0.5].ridge
    assert math.isnan(only.knn)
    assert [field.name for field in dataclasses.fields(Accuracies)] == [*ALL, "linear_top5", "slimmable_top5"]


@pytest.mark.parametrize(
    ("arguments", "more", "error", "message"),
    [
        (
            (1.0, 1.0),
            {"probes": "knn"},
            UsageError,
            "a list of knn, linear, slimmable, ridge, got 'knn'",
        ),
        ((1.0, 1.0), {"probes": ("svm",)}, UsageError, "svm"),
        ((1.0, 0.5), {}, WidthError, "1.0 is missing"),
        ((0.5, 0.5), {}, WidthError, "1.0 is missing"),
    ],
)
def test_evaluation_of_features_refuses(arguments, more, error, message):
    x, labels = data(8)
    train, test = ({width: x} for width in arguments)
    with pytest.raises(error, match=message):
        evaluate_features(train, labels, test, labels, **more)


def test_evaluation_refuses_sets_of_different_widths():
    x, labels = data(8)
    with pytest.raises(DataError, match=r"train has widths \(1.0, 0.5, 0.25\), test \(1.0,\)"):
        evaluate_features(cut(x), labels, {1.0: x}, labels)


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.a(x.flatten(1)).relu(), self.b(x.flatten(1)).relu()], dim=1)


def test_widths_of_a_backbone_whose_features_are_put_together_from_parts():
    """At half it has features 0, 1, 2 of the first part and 6, 7 of the second: the slimmable probe gets them first."""
    torch.manual_seed(0)
    backbone = slimmable.slimify(TwoParts(), (1.0, 0.5), example_inputs=torch.zeros(2, 1, 2, 2))
    images, labels = torch.rand(60, 1, 2, 2), torch.randint(0, 3, (60,))
    found = evaluate_widths(backbone, images, labels, images, labels, probes=ALL)
    wide, half = (features_of(backbone, images, width) for width in (1.0, 0.5))
    torch.testing.assert_close(wide[:, [0, 1, 2, 6, 7]], half)
    features = {1.0: wide[:, [0, 1, 2, 6, 7, 3, 4, 5, 8, 9]], 0.5: half}
    assert found == evaluate_features(features, labels, features, labels, probes=ALL)


def test_widths_of_a_timm_backbone_and_accuracy_of_an_extracted_classifier():
    torch.manual_seed(0)
    backbone = slimmable.slimify(timm.create_model("resnet10t", num_classes=0), (1.0, 0.25))
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(24) % 2
    found = evaluate_widths(backbone, images, labels, images, labels, probes=("ridge",))
    small = slimmable.extract(backbone, 0.25)
    network = nn.Sequential(small, ridge_classifier(features_of(backbone, images, 0.25), labels)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert accuracy_of(network, images, labels) == found[0.25].ridge
    assert all(module.training for module in network[0].modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(DataError, match="accuracy_of: images"):
        accuracy_of(network, images, labels[:3])
