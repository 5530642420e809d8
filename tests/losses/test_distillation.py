"""Online distillation: definitions, what must not matter, extreme input, and no gradient for teachers."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st

from slimmable import losses
from slimmable.errors import DataError, SlimmableError, UsageError

KINDS = ("kl", "embedding", "mse", "dkd", "atkd")
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**32 - 1)
batches, classes = st.integers(1, 5), st.integers(2, 6)
quick = settings(max_examples=25, deadline=None)


def random(seed, *shape, dtype=torch.float64):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def softmax(row):
    exps = [math.exp(value - max(row)) for value in row]
    return [value / sum(exps) for value in exps]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def slow_decoupled(student, teacher, target):
    total = 0.0
    for s, t, k in zip(student.tolist(), teacher.tolist(), target, strict=True):
        ps, pt = softmax(s), softmax(t)
        total += divergence([pt[k], 1 - pt[k]], [ps[k], 1 - ps[k]])
        del s[k], t[k]
        total += 0.5 * divergence(softmax(t), softmax(s))
    return total / len(student)


@quick
@given(batches, classes, seeds, st.data())
def test_decoupled_equals_the_definition(batch, count, seed, data):
    student, teacher = random(seed, 2, batch, count)
    target = data.draw(st.lists(st.integers(0, count - 1), min_size=batch, max_size=batch))
    expected = pytest.approx(slow_decoupled(student, teacher, target), rel=1e-9, abs=1e-9)
    distill = losses.OnlineDistillation("dkd")
    assert distill(student, teacher, torch.tensor(target)).item() == expected
    assert distill(student, teacher, target[0]) == distill(student, teacher, torch.full((batch,), target[0]))


@quick
@given(batches, classes, seeds, st.floats(0.1, 10), st.floats(0.1, 10))
def test_kl_equals_the_definition(batch, count, seed, tt, ts):
    student, teacher = random(seed, 2, batch, count)
    slow = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax([x / tt for x in t]), softmax([x / ts for x in s])
        slow -= sum(a * math.log(b) for a, b in zip(p, q, strict=True)) * ts**2 / batch
    assert losses.OnlineDistillation("kl", tt, ts)(student, teacher).item() == pytest.approx(slow, rel=1e-9)


@quick
@given(kinds, batches, classes, seeds)
def test_orders_of_batch_and_of_wrong_answers_do_not_matter(kind, batch, count, seed):
    student, teacher = random(seed, 2, batch, count)
    distill = losses.OnlineDistillation(kind)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(batch, generator=generator)
    columns = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(count - 1, generator=generator)])
    close(distill(student[rows][:, columns], teacher[rows][:, columns]), distill(student, teacher))


@quick
@given(kinds, batches, classes, seeds)
def test_a_student_like_its_teacher_has_nothing_to_learn(kind, batch, count, seed):
    teacher = random(seed, batch, count)
    student = teacher.clone().requires_grad_()
    losses.OnlineDistillation(kind)(student, teacher).backward()
    close(student.grad, torch.zeros_like(teacher))


@quick
@given(batches, classes, seeds, st.floats(-5, 5))
def test_a_constant_added_to_logits_does_not_matter(batch, count, seed, shift):
    student, teacher = random(seed, 2, batch, count)
    for kind in ("kl", "dkd", "atkd"):
        distill = losses.OnlineDistillation(kind)
        close(distill(student + shift, teacher - shift), distill(student, teacher), 1e-8)


@quick
@given(kinds, st.integers(1, 4), seeds)
def test_several_teachers(kind, count, seed):
    student, *teachers = random(seed, count + 1, 3, 5)
    widest, every = (losses.OnlineDistillation(kind, teachers=which) for which in ("widest", "all wider"))
    assert widest(student, teachers) == widest(student, teachers[0]) == every(student, teachers[0])
    close(every(student, teachers), sum(every(student, teacher) for teacher in teachers) / count)


@pytest.mark.parametrize("teachers", ["widest", "all wider"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_floor_is_the_loss_of_a_student_that_agrees(kind, teachers):
    teacher = random(0, 3, 5).requires_grad_()
    distill = losses.OnlineDistillation(kind, 2.0, 2.0, teachers)
    floor = distill.floor([teacher, teacher])
    close(floor, distill(teacher, [teacher, teacher]).detach())
    assert (floor > 0.1) == (kind in ("kl", "embedding"))
    assert not floor.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_for_the_teacher_and_a_finite_one_for_the_student(kind):
    student = random(0, 3, 5).requires_grad_()
    teacher = random(1, 3, 5).requires_grad_()
    losses.OnlineDistillation(kind, teachers="all wider")(student, [teacher, 2 * teacher]).backward()
    assert teacher.grad is None
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 1e9), (torch.float32, 1e9), (torch.float64, 1e100)]
)
def test_extreme_logits_stay_finite(kind, dtype, size):
    signs = torch.tensor([[1.0, -1, 0, 1], [-1, 1, 1, 0], [0, 0, 0, 0]], dtype=dtype)
    student = (size * signs).requires_grad_()
    loss = losses.OnlineDistillation(kind)(student, -size * signs)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    student, teacher = random(0, 2, 3, 5).to(dtype)
    distill = losses.OnlineDistillation(kind)
    expected = distill(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        close(distill(student, teacher), expected, 1e-6)


def test_copies_and_pickles():
    distill = losses.OnlineDistillation("embedding", 2.0, 3.0, "all wider", 0.25)
    student, teacher = random(0, 2, 3, 5)
    for twin in (copy.deepcopy(distill), pickle.loads(pickle.dumps(distill))):
        assert repr(twin) == repr(distill)
        assert twin(student, teacher) == distill(student, teacher)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph(kind):
    student, teacher = random(0, 2, 3, 5)
    distill = losses.OnlineDistillation(kind)
    torch.compiler.reset()
    compiled = torch.compile(distill, fullgraph=True, backend="eager")
    assert compiled(student, teacher) == distill(student, teacher)


A = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: losses.OnlineDistillation("kd"), UsageError, ["one of kl, embedding, mse, dkd, atkd, got 'kd'"]),
        (lambda: losses.OnlineDistillation(teachers="all"), UsageError, ["widest, all wider, got 'all'"]),
        (lambda: losses.OnlineDistillation(weight=1.5), UsageError, ["weight", "1.5"]),
        (lambda: losses.OnlineDistillation(weight=math.nan), UsageError, ["weight", "nan"]),
        (lambda: losses.OnlineDistillation(teacher_temperature=0), UsageError, ["teacher_temperature", "got 0"]),
        (lambda: losses.OnlineDistillation(student_temperature=-1), UsageError, ["student_temperature", "got -1"]),
        (lambda: losses.OnlineDistillation()(A, A[:, :7]), DataError, [r"student \(4, 8\), teacher \(4, 7\)"]),
        (lambda: losses.OnlineDistillation()(A, []), UsageError, ["no teacher"]),
        (lambda: losses.OnlineDistillation()(A, None), DataError, ["one or several tensors, got None"]),
        (lambda: losses.OnlineDistillation("dkd")(A, A, "0"), DataError, ["a column below 8", "'0'"]),
        (lambda: losses.decoupled_distillation(A, A, alpha=-1), UsageError, ["alpha", "-1"]),
        (lambda: losses.decoupled_distillation(A, A, beta="1"), UsageError, ["beta", "'1'"]),
        (lambda: losses.standardised_distillation(A, A, scale=0), UsageError, ["scale", "0"]),
        (lambda: losses.OnlineDistillation("dkd")(A, A, 8), DataError, ["a column below 8", "got 8"]),
        (lambda: losses.OnlineDistillation("dkd")(A, A, A[:, 0]), DataError, ["float32", "or 4 of them"]),
        (
            lambda: losses.OnlineDistillation("dkd")(A[:, :1], A[:, :1]),
            DataError,
            [r"\(4, 1\)", "no class other"],
        ),
    ],
)
def test_errors_say_what_does_not_fit(call, error, words):
    for word in words:
        with pytest.raises(error, match=word):
            call()
    assert issubclass(error, (SlimmableError, ValueError))
