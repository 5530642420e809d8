"""Every probe and measure says which argument does not fit, with its value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slimmable
from benchmarks.finetuning import finetune
from slimmable.errors import DataError, UsageError, WidthError
from slimmable.evaluation import (
    evaluate_features,
    evaluate_widths,
    knn_accuracy,
    probe_loss,
    ridge_classifier,
    train_probe,
)

X, Y = torch.eye(4).repeat(4, 1), torch.arange(4).repeat(4)
CUT = {1.0: X, 0.5: X[:, :2]}
SLIM = slimmable.SlimLinear(4, 2, widths=(1.0, 0.5))
NET = nn.Sequential(nn.Linear(4, 4), nn.ReLU())


@pytest.mark.parametrize(
    "train",
    [
        lambda **more: train_probe(CUT, Y, **more),
        lambda **more: train_probe(CUT, Y, **more, shared=True),
        lambda **more: finetune(NET, X, Y, **more),
    ],
)
@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"epochs": -1}, "epochs must be a 64-bit integer of at least 0, got -1"),
        ({"epochs": 1.5}, "epochs must be a 64-bit integer of at least 0, got 1.5"),
        ({"batch_size": 0}, "batch_size must be a 64-bit integer of at least 1, got 0"),
        ({"batch_size": -3}, "batch_size must be a 64-bit integer of at least 1, got -3"),
        ({"learning_rate": "a"}, "learning_rate must be a finite number of at least 0, got 'a'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number of at least 0, got nan"),
        ({"num_classes": 4.0}, "num_classes must be a 64-bit integer of at least 1, got 4.0"),
    ],
)
def test_settings_of_a_training(train, setting, says):
    with pytest.raises(UsageError, match=says):
        train(**setting)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: train_probe(CUT, Y.tolist()), DataError, "labels must be a tensor, got list"),
        (
            lambda: train_probe({1.0: X.numpy()}, Y),
            DataError,
            "images must be a tensor, got ndarray",
        ),
        (lambda: train_probe({1.0: X[:, :2], 0.5: X}, Y, shared=True), DataError, r"\[2, 4\] features at widths"),
        (lambda: ridge_classifier(X.to(torch.complex64), Y), DataError, "complex64, expected real"),
        (lambda: finetune(None, X, Y), UsageError, "finetune needs a torch.nn.Module"),
        (lambda: finetune(NET, X, Y, weight_decay=-1), UsageError, "weight_decay must be a finite number .* got -1"),
        (lambda: probe_loss({0.5: X}, Y), WidthError, "full width 1.0 is missing"),
        (lambda: probe_loss({1.0: X}, Y[:3]), DataError, r"scores has shape \(16, 4\) and labels of shape \(3,\)"),
        (lambda: probe_loss({1.0: X}, Y.float()), DataError, "float32, expected class numbers"),
        (lambda: knn_accuracy(X, Y, X, Y, k=1.5), UsageError, "k must be a 64-bit integer of at least 1, got 1.5"),
        (lambda: knn_accuracy(X, Y, X, Y, temperature="a"), UsageError, "temperature must be .* got 'a'"),
        (lambda: knn_accuracy(X, Y - 1, X, Y), DataError, "labels from -1"),
        (lambda: knn_accuracy(X, Y.float(), X, Y), DataError, "labels are torch.float32"),
        (lambda: knn_accuracy(X, Y.tolist(), X, Y), DataError, "labels must be a tensor, got list"),
        (lambda: evaluate_features(CUT, Y, CUT, Y, probes=None), UsageError, "probes must be a list .* got None"),
        (lambda: evaluate_features(CUT, Y, CUT, Y, probes=("ridge",), k=0), UsageError, "k must be .* got 0"),
        (lambda: evaluate_features({1.0: X}, Y, {1.0: X[:, :2]}, Y), DataError, r"\(16, 4\), test \(16, 2\)"),
        (
            lambda: evaluate_features(X, Y, {1.0: X}, Y),
            DataError,
            r"train must be features by width, such as \{1.0: fea",
        ),
    ],
)
def test_wrong_calls(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_knn_takes_class_numbers_of_any_integer_type(dtype):
    assert knn_accuracy(X, Y.to(dtype), X, Y.to(dtype), k=1) == 1.0


def test_knn_of_one_number_per_image():
    """Features of shape (images,): a cosine of numbers is the sign of their product."""
    signs = torch.tensor([-2.0, -1.0, 1.0, 3.0])
    assert knn_accuracy(signs, (signs > 0).long(), signs, (signs > 0).long(), k=2) == 1.0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda bad: train_probe({1.0: X, 0.5: bad}, Y), r"width 0.5: 3 of 16 rows hold nan or infinity"),
        (lambda bad: train_probe({1.0: bad}, Y, shared=True), r"width 1.0: 3 of 16 rows"),
        (lambda bad: ridge_classifier(bad, Y), "3 of 16 rows"),
        (lambda bad: knn_accuracy(bad, Y, X, Y), "knn_accuracy: train: 3 of 16 rows"),
        (lambda bad: knn_accuracy(X, Y, bad, Y), "knn_accuracy: test: 3 of 16 rows"),
        (
            lambda bad: evaluate_features({1.0: X, 0.5: bad}, Y, {1.0: X, 0.5: X}, Y),
            "train features at width 0.5: 3 of 16 rows",
        ),
        (lambda bad: evaluate_features({1.0: X}, Y, {1.0: bad}, Y), "test features at width 1.0: 3 of 16 rows"),
        (lambda bad: finetune(NET, bad[:3], Y[:3]), "finetune"),
    ],
)
def test_features_that_are_not_finite_have_no_accuracy(call, says, value):
    with pytest.raises(DataError, match=says):
        call(torch.cat([X[:3] + value, X[3:]]))


def test_the_widths_of_a_broken_network_have_no_accuracy():
    model = slimmable.slimify(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (1.0, 0.5), example_inputs=X, outputs="slim")
    with torch.no_grad():
        model[0].bias[6] = torch.nan  # which width 0.5 does not read
    with pytest.raises(DataError, match=r"train features at width 1.0: 16 of 16 rows hold nan"):
        evaluate_widths(model, X, Y, X, Y)
    with torch.no_grad():
        features = slimmable.extract(model, 0.5)(X)
    assert knn_accuracy(features, Y, features, Y, k=1) > 0
