"""Random views, and the order in which they come."""

import os
import re
import signal
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision.transforms import v2

from slimmable.cli.config import AUGMENTATIONS
from slimmable.cli.data import Handwritten, Plain, Views, batches_of, keys_of_steps, load, make_views, seed_of
from slimmable.cli.faults import explained_fault

NUMBERS = ["turn", "area", "ratio", "right", "down", "light", "contrast", "blur"]  # of a handwritten view


def view_of(transform, image):
    return (
        transform.of(image[None], transform(image)[None])[0] if isinstance(transform, Handwritten) else transform(image)
    )


@given(
    st.sampled_from(AUGMENTATIONS),
    st.sampled_from([1, 3]),
    st.integers(28, 224),
    st.tuples(st.integers(20, 90), st.integers(20, 90)),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_views_of_any_size_are_random_images(name, channels, size, shape, mirror):
    image = torch.randint(0, 256, (channels, *shape), dtype=torch.uint8)
    before = image.clone()
    transforms = make_views(name, size, min_crop_scale=0.2, mirror=mirror)
    assert len(transforms) == (1 if name == "supervised" else 2)
    for transform in transforms:
        torch.manual_seed(0)
        first, second = view_of(transform, image), view_of(transform, image)
        assert first.shape == (channels, size, size)
        assert first.dtype == torch.float32
        assert 0 <= first.min() <= first.max() <= 1
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(view_of(transform, image), first)
    assert torch.equal(image, before)


def test_only_mirrored_views_have_left_and_right_exchanged():
    image = torch.zeros(3, 24, 24, dtype=torch.uint8)
    image[..., :8] = 255

    def on_the_right(mirror):
        (transform,) = make_views("supervised", 24, min_crop_scale=0.9, mirror=mirror)
        views = torch.stack([transform(image) for _ in range(200)])
        return (views[..., 16:].sum((1, 2, 3)) > views[..., :8].sum((1, 2, 3))).float().mean()

    torch.manual_seed(0)
    assert on_the_right(False) == 0
    assert 0.3 < on_the_right(True) < 0.7


def test_byol_solarises_the_second_view_only():
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)  # solarised: 55
    torch.manual_seed(0)
    shares = []
    for transform in make_views("byol", 8, min_crop_scale=1.0, mirror=False):
        brightest = torch.stack([transform(image).max() for _ in range(400)])
        shares.append((brightest < 0.3).float().mean().item())
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0.2, abs=0.08)


@pytest.mark.parametrize("name", ["digits", "byol", "mocov2", "gated"])
def test_local_crops_follow_the_views_and_show_small_parts(name):
    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
    transforms = make_views(name, 64, min_crop_scale=0.25, mirror=False, local_crops=3, local_size=16)
    assert [tuple(view_of(each, image).shape) for each in transforms] == [(3, 64, 64)] * 2 + [(3, 16, 16)] * 3
    if name == "digits":
        scales = [(each.least, each.most) for each in transforms]
    else:
        parts = [part for each in transforms for part in each.transforms]
        scales = [tuple(part.scale) for part in parts if isinstance(part, v2.RandomResizedCrop)]
    assert scales == [(0.25, 1.0)] * 2 + [(0.05, 0.25)] * 3


@given(st.integers(1, 40), st.sampled_from([1, 3]), st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_view_does_not_depend_on_the_batch_that_it_is_drawn_in(count, channels, side, size, seed):
    """So a run on several processes, and one that is resumed, sees the same images bit for bit."""
    torch.manual_seed(seed)
    images, transform = (
        torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8),
        Handwritten(size, 0.3, 1),
    )
    drawn = torch.stack([transform(image) for image in images])
    whole = transform.of(images, drawn)
    for at in range(count):
        assert torch.equal(transform.of(images[at : at + 1], drawn[at : at + 1])[0], whole[at])


def test_handwriting_is_turned_cropped_lit_and_blurred(monkeypatch):
    """Each kind of change by itself, with the other numbers at those that change nothing."""
    image = torch.zeros(1, 32, 32, dtype=torch.uint8)
    image[..., 8:24, 14:18] = 255
    transform = Handwritten(32, 0.25, 1.0)

    def seen(**numbers):
        drawn = {**dict.fromkeys(NUMBERS, 0.5), "area": 1.0, **numbers}
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([*drawn.values()]))
        return view_of(transform, image)[0]

    same = seen()
    assert torch.allclose(same, image[0] / 255, atol=1e-4)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")

    def centre(view):
        return tuple(float((view * at).sum() / view.sum()) for at in (rows, columns))

    turned = seen(turn=1.0)
    upper, lower = centre(turned * (rows < 12))[1], centre(turned * (rows > 19))[1]
    assert abs(upper - lower) > 1  # ten degrees over some ten pixels
    assert centre(turned) == pytest.approx((15.5, 15.5), abs=0.1)
    close = seen(area=0.0)  # a quarter of the area: twice as large
    assert int((close > 0.5).sum()) == pytest.approx(4 * int((same > 0.5).sum()), rel=0.3)
    assert centre(seen(area=0.0, right=1.0))[1] < 8  # what is right of the middle is seen, so the line goes left
    assert centre(seen(area=0.0, ratio=0.0))[0] == pytest.approx(15.5, abs=0.1)
    assert float(seen(light=0.0).max()) == pytest.approx(0.6, abs=1e-4)
    assert float(seen(light=1.0).max()) == pytest.approx(1.0, abs=1e-4)
    assert float(seen(contrast=0.0).std()) == pytest.approx(0.6 * float(same.std()), rel=1e-3)
    assert torch.equal(seen(blur=0.49), same)
    assert seen(blur=0.99)[16, 14] < 0.7
    assert seen(blur=0.99)[16, 13] > 0.3
    assert float(seen(blur=0.99).mean()) == pytest.approx(float(same.mean()), rel=1e-2)


def test_a_plain_view_is_the_centre():
    image = torch.arange(30, dtype=torch.uint8).expand(3, 10, 30)
    assert torch.equal(Plain([image], 10)[0], image[:, :, 10:20])
    assert Plain([image], 5)[0].shape == (3, 5, 5)


def test_seeds_depend_on_the_numbers_and_their_order():
    numbers = [(first, second) for first in range(50) for second in range(50)]
    assert len({seed_of(*pair) for pair in numbers}) == len(numbers)
    assert [seed_of(*pair) for pair in numbers] == [seed_of(*pair) for pair in numbers]


def views_of(count, transforms=(lambda image: image.float() + torch.rand(()),)):
    images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1)
    return Views(images, torch.arange(count), transforms, seed=3)


@given(st.integers(4, 40), st.integers(2, 8), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_every_epoch_shows_images_once_in_a_new_order(count, batch, epochs, seed):
    batch = min(batch, count)
    steps = list(keys_of_steps(count, batch, epochs, 0, seed))
    per_epoch = count // batch
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        keys = [key for step in steps[epoch * per_epoch :][:per_epoch] for key in step]
        assert {number for number, _ in keys} == {epoch}
        assert len({image for _, image in keys}) == per_epoch * batch


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 12), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_shares_of_processes_and_the_rest_after_a_break_are_parts_of_the_whole(processes, each, start, seed):
    batch = processes * each
    count = 3 * batch + 1
    whole = list(keys_of_steps(count, batch, 4, 0, seed))
    shares = [list(keys_of_steps(count, batch, 4, start, seed, rank, processes)) for rank in range(processes)]
    assert [[key for share in step for key in share] for step in zip(*shares, strict=True)] == whole[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_views_depend_on_seed_epoch_and_image_only(workers):
    steps = keys_of_steps(count=12, batch_size=4, epochs=2, start=0, seed=1)
    torch.manual_seed(5)
    whole = list(load(views_of(12), 0, batch_sampler=steps))
    torch.manual_seed(6)
    rest = list(load(views_of(12), workers, batch_sampler=keys_of_steps(12, 4, 2, start=4, seed=1)))
    assert len(rest) == 2
    for ours, theirs in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    drawn = torch.cat([view.flatten() for view, _ in whole])
    assert len(drawn.unique()) == 24  # no two alike, in the second epoch either


def after_a_signal(number):
    """Images that come after a signal to the process that reads them."""

    def transform(image):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        return image.float()

    return load(views_of(4, (transform,)), 1, batch_sampler=keys_of_steps(4, 2, 1, 0, seed=0))


def test_an_interrupt_does_not_reach_the_workers():
    assert len(list(after_a_signal(signal.SIGINT))) == 2


def test_a_worker_that_ends_is_one_message():
    with pytest.raises(RuntimeError) as caught:
        list(after_a_signal(signal.SIGKILL))
    assert re.match(r"a process that reads images ended \(.*use fewer --workers$", explained_fault(caught.value))


@given(st.integers(1, 60), st.integers(1, 70))
def test_some_images_are_spread_over_all(count, most):
    """Among those of a folder, which stand class by class, each class has its share."""
    numbers = Plain(torch.zeros(count, 1, 8, 8, dtype=torch.uint8), 8, most=most).places
    assert len(numbers) == min(count, most)
    assert 0 <= numbers[0] <= numbers[-1] < count
    gaps = {after - before for before, after in pairwise(numbers)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
    assert min(gaps, default=1) >= 1


def test_images_for_evaluation_come_in_order():
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    batches = list(batches_of(Plain(images[:5], 8), batch_size=3))
    assert [len(batch) for batch in batches] == [3, 2]
    assert torch.equal(torch.cat(batches), images[:5].float() / 255)
