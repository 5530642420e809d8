"""Values and gradients of Barlow Twins, SimSiam and DINO are those of lightly's losses."""

from __future__ import annotations

import pytest
import torch

from slimmable import losses

theirs = pytest.importorskip("lightly.loss")


def random(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def assert_alike(ours, other, inputs):
    found = []
    for loss in (ours, other):
        leaves = [each.clone().requires_grad_() for each in inputs]
        value = loss(*leaves)
        found.append((value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)))
    for mine, expected in zip(*found, strict=True):
        if mine is None or expected is None:
            assert mine is expected is None
        else:
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("redundancy", [5e-3, 0.0, 1.0])
def test_barlow_twins(redundancy, dtype):
    inputs = random(0, (12, 7), (12, 7), dtype=dtype)
    other = theirs.BarlowTwinsLoss(lambda_param=redundancy)
    assert_alike(lambda a, b: losses.barlow_twins_loss(a, b, redundancy), other, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_simsiam(dtype):
    other = theirs.NegativeCosineSimilarity()
    assert_alike(losses.simsiam_loss, lambda p, z: other(p, z.detach()), random(1, (12, 7), (12, 7), dtype=dtype))


@pytest.mark.parametrize("local", [0, 1, 4])
def test_dino_with_its_centre_over_several_steps(local):
    other = theirs.DINOLoss(9, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=4).double()
    center = torch.zeros(9, dtype=torch.float64)
    for step in range(6):
        *students, first, second = random(step, *[(5, 9)] * (4 + local))
        teachers = [first + 1, second]
        temperature = 0.04 + 0.01 * min(step, 3)
        assert_alike(
            lambda *views, t=temperature, shift=center, given=teachers: losses.dino_loss(views, given, shift, t),
            lambda *views, e=step, given=teachers: other_loss(other, given, views, e),
            students,
        )
        other(teachers, students, epoch=step)
        center = center.lerp(torch.cat(teachers).mean(0), 0.1)
        torch.testing.assert_close(center, other.center.flatten(), rtol=1e-9, atol=1e-9)


def other_loss(criterion, teachers, students, epoch):
    """The loss, without the change of the centre."""
    before = criterion.center.clone()
    value = criterion(teachers, list(students), epoch=epoch)
    criterion.center.data = before
    return value
