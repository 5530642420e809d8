"""The ridge classifier against scikit-learn, the plain normal equations, and what must not matter."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from slimmable.errors import DataError, UsageError
from slimmable.evaluation import ridge_classifier

seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=40, deadline=None)


def random(seed, images, features, classes):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, features, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-2, 2, features, dtype=torch.float64) + 10 * torch.randn(features, generator=generator)
    return x, torch.randint(0, classes, (images,), generator=generator)


@quick
@given(st.integers(2, 30), st.integers(1, 30), st.integers(1, 5), st.sampled_from([1e-6, 0.1, 10.0]), seeds)
def test_it_solves_the_normal_equations(images, features, classes, penalty, seed):
    """As one system with the intercept in it, also where there are fewer images than features."""
    x, labels = random(seed, images, features, classes)
    found = ridge_classifier(x, labels, num_classes=classes, penalty=penalty)
    with_one = torch.cat([x, torch.ones(images, 1, dtype=torch.float64)], dim=1)
    variance = x.var(0, correction=0).mean()
    ridge = torch.diag(torch.tensor([penalty * variance * images] * features + [0.0], dtype=torch.float64))
    solved = torch.cat([found.weight.T, found.bias[None]]).detach()
    left, right = (with_one.T @ with_one + ridge) @ solved, with_one.T @ F.one_hot(labels, classes).double()
    size = (with_one.T @ with_one).norm() * solved.norm() + right.norm()
    assert (left - right).norm() / size < 1e-10


@quick
@given(st.integers(4, 30), st.integers(1, 30), st.integers(2, 4), seeds)
def test_it_is_scikit_learns(images, features, classes, seed):
    from sklearn.linear_model import Ridge, RidgeClassifier

    x, labels = random(seed, images, features, classes)
    labels[:classes] = torch.arange(classes)
    found = ridge_classifier(x, labels)
    alpha = 0.1 * images * x.var(0, correction=0).mean().item()
    onehot = np.eye(classes)[labels.numpy()]
    expected = Ridge(alpha, solver="svd").fit(x.numpy(), onehot).predict(x.numpy())
    scores = found(x).detach()
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-7, atol=1e-7)
    signs = RidgeClassifier(alpha, solver="svd").fit(x.numpy(), labels.numpy()).decision_function(x.numpy())
    ours = 2 * scores.numpy() - 1
    np.testing.assert_allclose(ours[:, 1] if classes == 2 else ours, signs, rtol=1e-7, atol=1e-7)


@quick
@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 4), st.floats(-6, 6), seeds)
def test_a_factor_and_shifts_do_not_matter_and_scores_sum_to_one(images, features, classes, exponent, seed):
    x, labels = random(seed, images, features, classes)
    shift = torch.randn(features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    moved = 10**exponent * (x + shift)
    scores = ridge_classifier(x, labels, num_classes=classes)(x)
    torch.testing.assert_close(
        ridge_classifier(moved, labels, num_classes=classes)(moved), scores, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(scores.sum(1), torch.ones(images, dtype=torch.float64))


def test_it_takes_raw_float32_features():
    x, labels = random(0, 40, 8, 3)
    found = ridge_classifier(x.float(), labels)
    assert found.weight.dtype == torch.float32
    assert not found.weight.grad_fn
    assert found.weight.requires_grad
    torch.testing.assert_close(found(x.float()).double(), ridge_classifier(x, labels)(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e6])
@pytest.mark.parametrize("shape", [(20, 3), (5, 30), (1, 4)])
def test_constant_features_give_the_shares_of_the_classes(value, shape):
    x, labels = torch.full(shape, value), torch.arange(shape[0]) % 3
    found = ridge_classifier(x, labels, num_classes=3)(x)
    shares = torch.bincount(labels, minlength=3) / shape[0]
    torch.testing.assert_close(found, shares.expand(shape[0], -1), rtol=1e-4, atol=1e-4)


def test_one_class_and_classes_without_images():
    x, _ = random(1, 10, 4, 2)
    labels = torch.zeros(10, dtype=torch.long)
    torch.testing.assert_close(ridge_classifier(x, labels)(x), torch.ones(10, 1, dtype=torch.float64))
    several = ridge_classifier(x, labels, num_classes=3)(x)
    torch.testing.assert_close(several, torch.tensor([1.0, 0, 0], dtype=torch.float64).expand(10, -1))


X, Y = torch.ones(4, 2), torch.arange(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ridge_classifier(X, Y[:3]), DataError, r"features has shape \(4, 2\) and labels of shape \(3,\)"),
        (lambda: ridge_classifier(X[0], Y), DataError, r"shape \(2,\)"),
        (lambda: ridge_classifier(X[:0], Y[:0]), DataError, "at least one"),
        (lambda: ridge_classifier(X[:, :0], Y), DataError, "at least one"),
        (lambda: ridge_classifier(X, Y.float()), DataError, r"labels are torch.float32.*labels.long\(\)"),
        (lambda: ridge_classifier(X, Y - 1), DataError, "labels from -1 to 2"),
        (lambda: ridge_classifier(X, Y, num_classes=3), DataError, "labels from 0 to 3 .* from 0 to 2"),
        (lambda: ridge_classifier(X / 0, Y), DataError, "nan or infinity"),
        (
            lambda: ridge_classifier(X, Y, penalty=0.0),
            UsageError,
            "penalty must be a finite number of at least 1e-9, got 0.0",
        ),
        (lambda: ridge_classifier(X, Y, penalty=float("nan")), UsageError, "got nan"),
    ],
)
def test_errors_say_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


@quick
@given(st.integers(3, 8), st.integers(1, 4), st.integers(1, 4), st.booleans(), seeds)
def test_a_cut_classifier_is_the_best_of_the_cut_features_only_if_they_are_orthogonal_to_the_rest(
    more, first, second, orthogonal, seed
):
    """SlimCLR's argument for a classifier per width, for least squares: X1'X2 (W of X2) is what the cut lacks."""
    generator = torch.Generator().manual_seed(seed)
    images = first + second + more
    x, y = (torch.randn(images, n, generator=generator, dtype=torch.float64) for n in (first + second, 3))
    if orthogonal:
        x = torch.linalg.qr(x).Q * torch.linspace(1, 5, first + second, dtype=torch.float64)
    full = torch.linalg.lstsq(x, y).solution
    part = torch.linalg.lstsq(x[:, :first], y).solution
    x1, x2 = x[:, :first], x[:, first:]
    difference = torch.linalg.solve(x1.T @ x1, x1.T @ x2 @ full[first:])
    torch.testing.assert_close(part - full[:first], difference, rtol=1e-7, atol=1e-8)
    assert torch.allclose(part, full[:first], atol=1e-8) == orthogonal
