"""Contrastive losses against slow references, closed forms, and what must not matter."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from slimmable import losses
from slimmable.errors import DataError, UsageError

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**32 - 1)
temperatures = st.floats(0.05, 2)
quick = settings(max_examples=25, deadline=None)


def random(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def slow_cross_entropy(positive, negatives, temperature):
    scores = [positive / temperature] + [negative / temperature for negative in negatives]
    return math.log(sum(math.exp(score - scores[0]) for score in scores))


@quick
@given(sizes, sizes, sizes, temperatures, seeds)
def test_info_nce_equals_the_definition(batch, dim, negatives, temperature, seed):
    query, key, queue = random(seed, (batch, dim), (batch, dim), (dim, negatives))
    slow = [
        slow_cross_entropy(cosine(query[i], key[i]), [cosine(query[i], n) for n in queue.T], temperature)
        for i in range(batch)
    ]
    assert losses.info_nce(query, key, queue, temperature).item() == pytest.approx(sum(slow) / batch, rel=1e-9)


@quick
@given(sizes, sizes, temperatures, seeds)
def test_nt_xent_equals_the_definition(n, dim, temperature, seed):
    z0, z1 = random(seed, (n, dim), (n, dim))
    every = torch.cat([z0, z1])
    slow = [
        slow_cross_entropy(
            cosine(every[i], every[(i + n) % (2 * n)]),
            [cosine(every[i], every[j]) for j in range(2 * n) if j % n != i % n],
            temperature,
        )
        for i in range(2 * n)
    ]
    # The positive's cosine comes from a sum in another order when the batch is 1, so the bound is absolute there.
    assert losses.nt_xent(z0, z1, temperature).item() == pytest.approx(sum(slow) / (2 * n), rel=1e-9, abs=1e-12)


@quick
@given(sizes, sizes, st.integers(0, 4), st.integers(0, 4), temperatures, seeds)
def test_moco_v3_equals_the_definition_also_with_gathered_keys(batch, dim, before, after, temperature, seed):
    query, keys = random(seed, (batch, dim), (before + batch + after, dim))
    slow = [
        slow_cross_entropy(
            cosine(query[i], keys[before + i]),
            [cosine(query[i], key) for j, key in enumerate(keys) if j != before + i],
            temperature,
        )
        for i in range(batch)
    ]
    expected = 2 * temperature * sum(slow) / batch
    assert losses.moco_v3_loss(query, keys, temperature, before).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_offset_says_which_keys_are_ones_own():
    query, keys = random(0, (2, 3), (5, 3))
    table = [[cosine(q, k) / 0.5 for k in keys] for q in query]
    expected = [
        [table[0][2], *(table[0][i] for i in (0, 1, 3, 4))],
        [table[1][3], *(table[1][i] for i in (0, 1, 2, 4))],
    ]
    close(losses.moco_v3_logits(query, keys, 0.5, offset=2), torch.tensor(expected, dtype=torch.float64))


@quick
@given(sizes, sizes, seeds)
def test_the_positive_is_in_column_0_and_each_logit_comes_once(n, dim, seed):
    z0, z1, queue = random(seed, (n, dim), (n, dim), (dim, 5))
    cosines = F.normalize(z0) @ F.normalize(z1).T
    positives = cosines.diagonal()
    close(losses.moco_logits(z0, z1, queue)[:, 0], positives)
    close(losses.nt_xent_logits(z0, z1)[:, 0], torch.cat([positives, positives]))
    v3 = losses.moco_v3_logits(z0, z1)
    close(v3[:, 0], positives)
    close(v3.sort(1).values, cosines.sort(1).values)
    every = F.normalize(torch.cat([z0, z1]))
    pairs = (every @ every.T)[~torch.eye(2 * n, dtype=torch.bool)].reshape(2 * n, -1)
    close(losses.nt_xent_logits(z0, z1).sort(1).values, pairs.sort(1).values)


@quick
@given(st.integers(1, 20), sizes)
def test_embeddings_that_are_all_alike_cost_the_log_of_the_choices(n, dim):
    z = torch.ones(n, dim, dtype=torch.float64)
    close(losses.nt_xent(z, z), torch.tensor(math.log(2 * n - 1), dtype=torch.float64))
    close(losses.moco_v3_loss(z, z), torch.tensor(2 * math.log(n), dtype=torch.float64))
    close(losses.info_nce(z, z, torch.ones(dim, n, dtype=torch.float64)), torch.tensor(math.log(n + 1)).double(), 1e-6)


@quick
@given(st.integers(2, 6), sizes, seeds)
def test_the_order_of_the_batch_and_the_scale_of_embeddings_do_not_matter(n, dim, seed):
    z0, z1, queue, scale = random(seed, (n, dim), (n, dim), (dim, 7), (n, 1))
    scale = scale.exp()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for loss in (losses.nt_xent, losses.moco_v3_loss, lambda a, b: losses.info_nce(a, b, queue)):
        close(loss(z0[order], z1[order]), loss(z0, z1))
        close(loss(z0 * scale, z1 / scale), loss(z0, z1))
    close(losses.nt_xent(z1, z0), losses.nt_xent(z0, z1))
    columns = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    close(losses.info_nce(z0, z1, 3 * queue[:, columns]), losses.info_nce(z0, z1, queue))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("loss", "size"),
    [
        (lambda a, b, _: losses.nt_xent(a, b), 200),  # squared norms overflow float16
        (lambda a, b, _: losses.moco_v3_loss(a, b), 200),
        (losses.info_nce, 200),
        (lambda a, b, _: losses.vicreg_loss(a, b), 2),  # its gradient grows with the cube of the size
    ],
)
def test_half_precision_is_computed_in_float32(loss, size, dtype):
    z0, z1, queue = (size * t.to(dtype) for t in random(0, (4, 8), (4, 8), (8, 16)))
    low = z0.clone().requires_grad_()
    result = loss(low, z1, queue)
    result.backward()
    assert result.dtype == torch.float32
    assert low.grad.isfinite().all()
    close(result, loss(z0.float(), z1.float(), queue.float()), 1e-6)


def test_autocast_does_not_round_the_cosines():
    z0, z1, queue = random(0, (4, 8), (4, 8), (8, 16), dtype=torch.float32)
    expected = losses.info_nce(z0, z1, queue), losses.nt_xent(z0, z1), losses.vicreg_loss(z0, z1)
    with torch.autocast("cpu", torch.bfloat16):
        close((losses.info_nce(z0, z1, queue), losses.nt_xent(z0, z1), losses.vicreg_loss(z0, z1)), expected, 1e-6)


def test_zero_embeddings_stay_finite():
    zero = torch.zeros(3, 4, requires_grad=True)
    for loss in (
        losses.nt_xent(zero, zero),
        losses.moco_v3_loss(zero, zero),
        losses.info_nce(zero, zero, zero.detach().T),
    ):
        (gradient,) = torch.autograd.grad(loss, zero)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_the_queue_may_change_before_backward():
    query, key, queue = random(0, (4, 8), (4, 8), (8, 16))
    before, after = query.clone().requires_grad_(), query.clone().requires_grad_()
    losses.info_nce(before, key, queue.clone()).backward()
    loss = losses.info_nce(after, key, queue)
    queue.zero_()
    loss.backward()
    close(after.grad, before.grad)


@pytest.mark.parametrize(
    "loss",
    [
        losses.nt_xent,
        losses.moco_v3_loss,
        losses.vicreg_loss,
        losses.barlow_twins_loss,
        losses.simsiam_loss,
        lambda a, b: losses.dino_loss([a, b], [b, a]),
    ],
)
def test_compiles_to_one_graph(loss):
    z0, z1 = random(0, (4, 8), (4, 8))
    torch.compiler.reset()
    assert torch.compile(loss, fullgraph=True, backend="eager")(z0, z1) == loss(z0, z1)


A, B = torch.zeros(4, 8), torch.zeros(4, 7)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: losses.nt_xent(A, B), DataError, [r"nt_xent_logits", r"z0 \(4, 8\), z1 \(4, 7\)"]),
        (
            lambda: losses.nt_xent(A[0], A[0]),
            DataError,
            ["z0 must be a tensor of floats", r"batch, features.* shape \(8,\)"],
        ),
        (lambda: losses.nt_xent(A[:0], A[:0]), DataError, [r"\(0, 8\)", "at least one"]),
        (lambda: losses.nt_xent(A.long(), A.long()), DataError, ["torch.int64", "tensor of floats"]),
        (lambda: losses.nt_xent([[1.0]], A), DataError, ["tensor", "list"]),
        (lambda: losses.nt_xent(A, A, 0.0), UsageError, ["temperature", "positive", "0.0"]),
        (lambda: losses.nt_xent(A, A, math.nan), UsageError, ["temperature", "nan"]),
        (
            lambda: losses.info_nce(A, A, torch.zeros(16, 8)),
            DataError,
            [r"\(16, 8\)", r"\(8, negatives\)"],
        ),
        (lambda: losses.info_nce(A, A[:3], A.T), DataError, [r"query \(4, 8\), key \(3, 8\)"]),
        (lambda: losses.moco_v3_loss(A[0], A), DataError, ["query must be", r"batch, features.* shape \(8,\)"]),
        (lambda: losses.moco_v3_loss(A, A[0]), DataError, ["keys must be", r"batch, features.* shape \(8,\)"]),
        (lambda: losses.moco_v3_loss(A, A[:3]), DataError, [r"\(4, 8\)", r"\(3, 8\)", "positives"]),
        (lambda: losses.moco_v3_loss(A, torch.zeros(8, 8), offset=5), DataError, ["offset 5", "rows 5 to 9"]),
        (lambda: losses.moco_v3_loss(A, A, offset=-1), DataError, ["offset -1"]),
        (lambda: losses.vicreg_loss(A[:1], A[:1]), DataError, [r"\(1, 8\)", "two images"]),
        (lambda: losses.barlow_twins_loss(A[:1], A[:1]), DataError, [r"\(1, 8\)", "two images"]),
        (lambda: losses.barlow_twins_loss(A, A, -1.0), UsageError, ["barlow_twins_loss: redundancy", "-1.0"]),
        (lambda: losses.simsiam_loss(A, B), DataError, [r"simsiam_loss.* prediction \(4, 8\), target \(4, 7\)"]),
        (lambda: losses.dino_loss([A, B], [A]), DataError, [r"outputs|students\[1\] \(4, 7\)"]),
        (lambda: losses.dino_loss([A, A], [A], B[0]), DataError, [r"center has shape \(7,\), expected \(8,\)"]),
        (lambda: losses.dino_loss([A], [A]), DataError, ["1 and 1 outputs are not of two different views"]),
        (lambda: losses.dino_loss([], []), DataError, ["0 and 0 outputs are not of two different views"]),
        (lambda: losses.dino_loss([A, A], [A], None, 0.0), UsageError, ["teacher_temperature", "positive", "0.0"]),
        (lambda: losses.vicreg_loss(A, A, -1.0), UsageError, ["vicreg_loss: invariance", "-1.0"]),
        (lambda: losses.vicreg_loss(A, A, covariance="1"), UsageError, ["vicreg_loss: covariance", "'1'"]),
    ],
)
def test_errors_say_what_does_not_fit(call, error, words):
    for word in words:
        with pytest.raises(error, match=word):
            call()


@quick
@given(st.integers(2, 6), sizes, seeds)
def test_vicreg_equals_the_definition(n, dim, seed):
    z0, z1 = random(seed, (n, dim), (n, dim))
    expected = 25 * ((z0 - z1) ** 2).mean()
    for z in (z0, z1):
        covariances = torch.cov(z.T).reshape(dim, dim)
        for i in range(dim):
            expected += 25 * max(0.0, 1 - math.sqrt(covariances[i, i] + 1e-4)) / dim
            expected += sum(covariances[i, j] ** 2 for j in range(dim) if j != i) / dim
    close(losses.vicreg_loss(z0, z1), expected)
    close(losses.vicreg_loss(z1, z0), expected)


@quick
@given(st.integers(2, 6), sizes, seeds)
def test_barlow_twins_equals_the_definition(n, dim, seed):
    z0, z1 = random(seed, (n, dim), (n, dim))
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z0, z1))
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(dim):
        for j in range(dim):
            correlation = (a[:, i] * b[:, j]).sum() / n
            expected += (1 - correlation) ** 2 if i == j else 5e-3 * correlation**2
    close(losses.barlow_twins_loss(z0, z1), expected)
    close(losses.barlow_twins_loss(z1, z0), expected)


@quick
@given(st.integers(1, 6), sizes, seeds)
def test_simsiam_equals_the_definition(n, dim, seed):
    prediction, target = random(seed, (n, dim), (n, dim))
    lengths = prediction.square().sum(1).sqrt() * target.square().sum(1).sqrt()
    close(losses.simsiam_loss(prediction, target), -((prediction * target).sum(1) / lengths).mean())
    close(2 + 2 * losses.simsiam_loss(prediction, target), losses.byol_loss(prediction, target))


@quick
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(2, 4), seeds)
def test_dino_equals_the_definition(n, dim, teachers, students, seed):
    center, *views = random(seed, (dim,), *[(n, dim)] * (teachers + students))
    given, seen = views[:teachers], views[teachers:]
    terms = []
    for i, teacher in enumerate(given):
        weights = ((teacher - center) / 0.3).exp()
        probabilities = weights / weights.sum(1, keepdim=True)
        for j, student in enumerate(seen):
            if i != j:
                scores = student / 0.2
                terms.append(-(probabilities * (scores - scores.exp().sum(1, keepdim=True).log())).sum(1).mean())
    close(losses.dino_loss(seen, given, center, 0.3, 0.2), torch.stack(terms).mean())


@pytest.mark.parametrize("loss", [losses.simsiam_loss, lambda a, b: losses.dino_loss([a, a], [b, b])])
def test_no_gradient_flows_into_targets(loss):
    student, teacher = (each.requires_grad_() for each in random(0, (4, 8), (4, 8)))
    loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None
