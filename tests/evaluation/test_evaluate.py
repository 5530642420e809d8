"""kNN and the linear probe, against slow definitions, published numbers and classical solvers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn

import slimmable
from slimmable.errors import DataError, UsageError
from slimmable.evaluation import evaluate_widths, knn_accuracy, probe_loss, train_probe

GOLDEN = Path(__file__).parents[1] / "golden"


def slow_knn(train, train_labels, test, test_labels, k, temperature):
    """Wu et al. 2018, section 3.4, one image at a time in float64."""
    right = 0
    for image, label in zip(test.double().numpy(), test_labels.tolist(), strict=True):
        cosines = [
            float(image @ other / np.linalg.norm(image) / np.linalg.norm(other)) for other in train.double().numpy()
        ]
        votes = {}
        for place in sorted(range(len(cosines)), key=lambda place: -cosines[place])[:k]:
            name = int(train_labels[place])
            votes[name] = votes.get(name, 0) + np.exp(cosines[place] / temperature)
        right += max(votes, key=votes.get) == label
    return right / len(test)


@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 6), st.integers(1, 25), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_knn_is_its_definition(train, test, features, k, seed):
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for count in (train, test):
        sets += [
            torch.randn(count, features, generator=generator),
            torch.randint(0, 4, (count,), generator=generator),
        ]
    expected = slow_knn(*sets, k, 0.3)
    found = knn_accuracy(*sets, k=k, temperature=0.3)
    if features == 1:  # cosines are all 1 or -1: which of the equal ones vote is open
        assert 0 <= found <= 1
    else:
        assert found == expected


def test_knn_does_not_depend_on_the_scale_of_features():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 8, generator=generator), torch.randn(30, 8, generator=generator)
    labels = torch.randint(0, 3, (80,), generator=generator)
    scale = torch.rand(50, 1, generator=generator) * 1000 + 0.01
    plain = knn_accuracy(train, labels[:50], test, labels[50:])
    assert knn_accuracy(train * scale, labels[:50], test * 7, labels[50:]) == plain


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(0, 2), torch.zeros(0), torch.zeros(1, 2), torch.zeros(1)), DataError, "train has shape"),
        ((torch.ones(2, 2), torch.zeros(2), torch.ones(1, 2), torch.zeros(3)), DataError, "test has shape"),
        (
            (torch.ones(2, 2), torch.zeros(2), torch.ones(1, 3), torch.zeros(1)),
            DataError,
            r"train has shape \(2, 2\), test",
        ),
    ],
)
def test_knn_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        knn_accuracy(*(a.long() if a.ndim == 1 else a for a in arguments))


@pytest.mark.parametrize("setting", [{"k": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_knn_refuses_settings(setting):
    one, label = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    with pytest.raises(UsageError):
        knn_accuracy(one, label, one, label, **setting)


def test_probe_loss_is_the_published_one():
    golden = load_file(GOLDEN / "slimclr_step.safetensors")
    cases = json.loads((GOLDEN / "slimclr_step.json").read_text())["cases"]
    total = next(case["tot"] for case in cases if case["name"] == "probe/mixed")
    widths = ("1", "0.75", "0.5", "0.25")
    scores = {float(width): golden[f"probe/logits/{width}"].clone().requires_grad_() for width in widths}
    loss = probe_loss(scores, golden["probe/labels"])
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    gradients = torch.stack([scores[float(width)].grad for width in widths])
    torch.testing.assert_close(gradients, golden["probe/mixed/grad_logits"], rtol=1e-10, atol=1e-12)


def blobs(count, features, classes, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, features, generator=generator), labels


def test_probe_takes_features_as_they_are():
    """A shift and a scale of the features change the classifier but none of its scores."""
    features, labels = blobs(300, 8, 3)
    scale = torch.linspace(0.01, 50, 8)
    plain = train_probe({1.0: features, 0.5: features[:, :4]}, labels, epochs=5)
    moved = train_probe({1.0: features * scale + 20, 0.5: (features * scale + 20)[:, :4]}, labels, epochs=5)
    for index, kept in enumerate((8, 4)):
        torch.testing.assert_close(
            moved.module_at(index)((features * scale + 20)[:, :kept]),
            plain.module_at(index)(features[:, :kept]),
            rtol=1e-3,
            atol=2e-3,
        )


def test_probe_is_as_good_as_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    train, labels = blobs(600, 8, 4, seed=1, spread=2.5)
    test, test_labels = blobs(400, 8, 4, seed=2, spread=2.5)
    probe = train_probe({1.0: train, 0.25: train[:, :2]}, labels)
    for index, kept in enumerate((8, 2)):
        found = (probe.module_at(index)(test[:, :kept]).argmax(1) == test_labels).float().mean().item()
        solver = LogisticRegression(max_iter=1000).fit(train[:, :kept].numpy(), labels.numpy())
        assert found == pytest.approx(solver.score(test[:, :kept].numpy(), test_labels.numpy()), abs=0.04)


def test_probe_refuses_features_without_labels():
    with pytest.raises(DataError, match=r"features of width 0.5 has shape \(2, 4\) and labels of shape \(3,\)"):
        train_probe({1.0: torch.zeros(3, 8), 0.5: torch.zeros(2, 4)}, torch.zeros(3, dtype=torch.long))
    with pytest.raises(slimmable.errors.WidthError):
        train_probe({0.5: torch.zeros(3, 8)}, torch.zeros(3, dtype=torch.long))


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 1, 6, 6))


def test_evaluation_leaves_the_backbone_as_it_is(backbone):
    backbone.train()
    backbone[1].eval()
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    slimmable.set_width(backbone, 0.5)
    images, labels = torch.randint(0, 256, (20, 1, 6, 6), dtype=torch.uint8), torch.arange(20) % 3
    found = evaluate_widths(backbone, images[:12], labels[:12], images[12:], labels[12:])
    assert list(found) == [1.0, 0.5]
    assert slimmable.width_of(backbone) == 0.5
    assert [module.training for module in backbone] == [True, False, True, True, True]
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("sizes", [(0, 0, 5, 5), (5, 5, 0, 0), (5, 5, 5, 1), (5, 1, 5, 5)])
def test_evaluation_refuses_sets_that_do_not_fit(backbone, sizes):
    images, labels = torch.rand(5, 1, 6, 6), torch.arange(5) % 2
    train, train_labels, test, test_labels = (
        part[:size] for part, size in zip((images, labels) * 2, sizes, strict=True)
    )
    with pytest.raises(DataError, match="expected one label for each of at least one image"):
        evaluate_widths(backbone, train, train_labels, test, test_labels)
