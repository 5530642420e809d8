"""Nearest neighbours by both metrics, weighted or not, against scikit-learn and plain float64; the five best."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from slimmable import evaluation
from slimmable.errors import UsageError
from slimmable.evaluation import evaluate_features, knn_accuracy

EQUAL = 1e9  # the temperature at which all votes count the same in float32
SETTINGS = [(metric, temperature) for metric in ("cosine", "euclidean") for temperature in (0.07, 1.0, EQUAL)]


def drawn(images, features, classes, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images,), generator=generator)
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = centres[labels] + torch.randn(images, features, generator=generator, dtype=torch.float64)
    return x.to(dtype), labels


def similarities(train, test, metric):
    """Cosines, or minus half the squared distances, one pair at a time."""
    found = np.empty((len(test), len(train)))
    for i, one in enumerate(test):
        for j, other in enumerate(train):
            if metric == "cosine":
                found[i, j] = one @ other / np.sqrt(one @ one) / np.sqrt(other @ other)
            else:
                found[i, j] = -((one - other) @ (one - other)) / 2
    return found


def plain_votes(train, labels, test, classes, k, metric, temperature):
    votes = np.zeros((len(test), classes))
    for row, each in enumerate(similarities(train.double().numpy(), test.double().numpy(), metric)):
        for place in sorted(range(len(each)), key=lambda place: -each[place])[:k]:
            weight = 1 if temperature == EQUAL else np.exp((each[place] - each.max()) / temperature)
            votes[row, int(labels[place])] += weight
    return votes


def top(votes, answers, count):
    """The share of answers among the `count` classes with most votes, the first of equals first."""
    best = np.argsort(-votes, axis=1, kind="stable")[:, :count]
    return np.mean(
        [
            answer in [c for c in row if votes[i, c] > 0]
            for i, (row, answer) in enumerate(zip(best, answers, strict=True))
        ]
    )


@pytest.mark.parametrize(("metric", "temperature"), SETTINGS)
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 25), st.integers(1, 12), st.integers(2, 7), st.integers(1, 8), st.integers(1, 30), st.integers(0, 99)
)
def test_it_is_its_definition(metric, temperature, train, test, features, classes, k, seed):
    (x, labels), (y, answers) = drawn(train, features, classes, seed), drawn(test, features, classes, seed + 1)
    found = evaluate_features(
        {1.0: x}, labels, {1.0: y}, answers, probes=("knn",), k=k, metric=metric, temperature=temperature
    )[1.0]
    votes = plain_votes(x, labels, y, classes, k, metric, temperature)
    assert found.knn == knn_accuracy(x, labels, y, answers, k=k, metric=metric, temperature=temperature)
    assert found.knn == pytest.approx(top(votes, answers.tolist(), 1))


@pytest.mark.parametrize("chunk", [1, 70, 1024])
@pytest.mark.parametrize(("metric", "temperature"), SETTINGS)
def test_it_is_that_of_scikit_learn_for_queries_of_any_number_at_a_time(metric, temperature, chunk, monkeypatch):
    neighbors = pytest.importorskip("sklearn.neighbors")
    monkeypatch.setattr(evaluation, "_CHUNK", chunk)
    (x, labels), (y, answers) = drawn(300, 6, 10, 1, torch.float32), drawn(200, 6, 10, 2, torch.float32)
    x, y = x + 1000 * (metric == "euclidean"), y + 1000 * (metric == "euclidean")  # far away, where float32 is coarse

    def weights(distances):
        near = -distances if metric == "cosine" else -(distances**2) / 2
        return np.exp((near - near.max(1, keepdims=True)) / temperature)

    theirs = neighbors.KNeighborsClassifier(
        11, weights="uniform" if temperature == EQUAL else weights, metric=metric, algorithm="brute"
    ).fit(x.double().numpy(), labels.numpy())
    expected = theirs.score(y.double().numpy(), answers.numpy())
    found = knn_accuracy(x, labels, y, answers, k=11, metric=metric, temperature=temperature)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0.2 < found < 0.95


def test_both_metrics_are_the_same_for_features_of_unit_length():
    (x, labels), (y, answers) = drawn(200, 8, 6, 3), drawn(150, 8, 6, 4)
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    for k, temperature in ((20, 0.07), (5, EQUAL), (200, 1.0)):
        cosine, euclidean = (
            knn_accuracy(x, labels, y, answers, k=k, metric=metric, temperature=temperature)
            for metric in ("cosine", "euclidean")
        )
        assert cosine == euclidean
    far = torch.cat([x, 100 * x])  # of the same directions, so by cosines each feature votes twice
    labels = torch.cat([labels, (labels + 1) % 6])
    assert knn_accuracy(far, labels, y, answers, k=1, metric="euclidean") > 0.5
    assert knn_accuracy(far / 100, labels, y, answers, k=1, metric="euclidean") < 0.5


@pytest.mark.parametrize("metric", ["manhattan", None, 2, ["cosine"]])
def test_an_unknown_metric_is_refused(metric):
    x, labels = drawn(4, 2, 2, 0)
    with pytest.raises(UsageError, match="metric must be one of cosine, euclidean, got"):
        knn_accuracy(x, labels, x, labels, metric=metric)
    with pytest.raises(UsageError, match="metric must be one of cosine, euclidean, got"):
        evaluate_features({1.0: x}, labels, {1.0: x}, labels, probes=("ridge",), metric=metric)
