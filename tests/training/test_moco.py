"""The queue and the momentum encoder; whole published steps are in `test_published_steps.py`."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

import slimmable
from slimmable import SlimLinear, at_width
from slimmable.errors import DataError, UsageError
from slimmable.losses import moco_logits
from slimmable.training import MoCo, MomentumEncoder


@given(st.integers(1, 12), st.lists(st.integers(1, 12), max_size=8))
@settings(max_examples=40, deadline=None)
def test_queue_holds_the_newest_keys(size, batches):
    moco = MoCo(nn.Linear(2, 3), proj_dim=3, queue_size=size)
    held = list(moco.queue.T.clone())  # from the oldest on
    for count in (min(count, size) for count in batches):
        keys = torch.randn(count, 3)
        moco.enqueue(keys)
        held = (held + list(keys))[-size:]
    start = int(moco.position)
    torch.testing.assert_close(moco.queue.T.roll(-start, 0), torch.stack(held), rtol=0, atol=0)


@given(st.floats(0, 1), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_key_encoder_is_the_moving_average(momentum, steps):
    network = nn.Linear(2, 3).double()
    moco = MoCo(network, proj_dim=3, queue_size=4, momentum=momentum)
    expected = network.weight.detach().clone()
    for _ in range(steps):
        with torch.no_grad():
            network.weight.add_(torch.randn(3, 2, dtype=torch.double))
        keys = moco.keys(network, torch.ones(5, 2, dtype=torch.double))
        expected = momentum * expected + (1 - momentum) * network.weight.detach()
        torch.testing.assert_close(moco.key_encoder.network.weight, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(keys.norm(dim=1), torch.ones(5, dtype=torch.double))
    assert not keys.requires_grad


@given(st.integers(1, 9), st.integers(2, 12))
@settings(max_examples=20, deadline=None)
def test_parts_change_the_statistics_only(parts, batch):
    """Without statistics of the batch, parts in random order give each image the same key as the whole."""
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    images = torch.randn(batch, 2, dtype=torch.double)
    whole = MoCo(network, proj_dim=3, queue_size=4).keys(network, images)
    torch.testing.assert_close(MoCo(network, proj_dim=3, queue_size=4, bn_splits=parts).keys(network, images), whole)


def test_parts_do_not_share_batch_statistics():
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    images = torch.randn(8, 2)
    torch.manual_seed(0)
    whole = MoCo(network, proj_dim=3, queue_size=4).keys(network, images)
    moco = MoCo(network, proj_dim=3, queue_size=4, bn_splits=2)
    assert not torch.allclose(moco.keys(network, images), whole)
    assert moco.key_encoder.network[0].num_batches_tracked == 2


def test_key_encoder_stays_at_the_full_width():
    network = slimmable.slimify(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (1.0, 0.5), example_inputs=torch.zeros(2, 4)
    )
    moco = MoCo(network, proj_dim=3, queue_size=4)
    images = torch.randn(2, 4)
    keys = moco.keys(network, images)
    slimmable.set_width(network, 0.5)
    torch.testing.assert_close(moco.keys(network, images), keys, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in moco.key_encoder.network.parameters())


def test_state_dict_goes_on_exactly():
    network = nn.Linear(2, 3)
    moco, other = (MoCo(network, proj_dim=3, queue_size=5) for _ in range(2))
    moco.enqueue(torch.randn(3, 3))
    other.load_state_dict(moco.state_dict())
    for copy in (moco, other):
        copy.enqueue(torch.ones(4, 3))
    assert torch.equal(moco.queue, other.queue)
    assert moco.position == other.position == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"proj_dim": 0},
        {"proj_dim": "3"},
        {"queue_size": 0},
        {"queue_size": 1.5},
        {"bn_splits": 0},
        {"bn_splits": True},
        {"momentum": 1.5},
        {"momentum": float("nan")},
        {"momentum": "high"},
    ],
)
def test_refused_settings(settings):
    with pytest.raises(UsageError, match=f"MoCo: {next(iter(settings))}"):
        MoCo(nn.Linear(2, 3), **{"proj_dim": 3, "queue_size": 4} | settings)


def test_a_batch_with_fewer_images_than_parts_has_a_part_for_each():
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.nn.init.uniform_(network[1].bias)
    moco, images = MoCo(network, proj_dim=3, queue_size=4, bn_splits=8), torch.rand(3, 1, 2, 2)
    expected = torch.cat([F.normalize(network(image[None]), dim=1) for image in images])
    torch.testing.assert_close(moco.keys(network, images), expected)
    assert int(moco.key_encoder.network[1].num_batches_tracked) == 3


@pytest.mark.parametrize("shape", [(5, 3), (2, 4)])
def test_refused_keys(shape):
    moco = MoCo(nn.Linear(2, 3), proj_dim=3, queue_size=4)
    before = moco.queue.clone()
    with pytest.raises(DataError, match=r"do not fit a queue of shape \(3, 4\)"):
        moco.enqueue(torch.zeros(shape))
    assert torch.equal(moco.queue, before)
    with pytest.raises(UsageError, match="parameter 2 is None in the copy and a tensor"):
        moco.keys(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)), torch.zeros(1, 2))
    with pytest.raises(DataError, match="keys must be a tensor"):
        moco.enqueue([1.0, 2.0])


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan"), "high"])
def test_a_momentum_encoder_refuses_what_is_no_momentum(momentum):
    network = nn.Linear(2, 3)
    encoder = MomentumEncoder(network)
    before = encoder.network.weight.clone()
    torch.nn.init.zeros_(network.weight)
    with pytest.raises(UsageError, match=r"MomentumEncoder\.update: momentum must be a number in \[0, 1\]"):
        encoder.update(network, momentum)
    assert torch.equal(encoder.network.weight, before)


@pytest.mark.parametrize("network", [None, nn.Flatten()])
def test_a_network_that_cannot_be_followed(network):
    with pytest.raises(UsageError, match=r"MoCo needs a torch.nn.Module|Flatten, has no parameters"):
        MoCo(network, proj_dim=3)


def test_calls_that_are_refused_leave_the_key_encoder_as_it_is():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    moco = MoCo(network, proj_dim=3, queue_size=4, momentum=0.0)
    before = [parameter.clone() for parameter in moco.key_encoder.network.parameters()]
    torch.nn.init.zeros_(network[0].weight)
    differing = r"parameter 2 is .* shape \(3, 3\), .* in the copy and .* \(5, 3\), .* in the network"
    with pytest.raises(UsageError, match=differing):
        moco.keys(nn.Sequential(network[0], nn.Linear(3, 5)), torch.ones(4, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, moco.key_encoder.network.parameters(), strict=True))


def test_the_key_encoder_of_a_network_at_a_narrow_width_is_full():
    network = SlimLinear(2, 3, widths=(1.0, 0.5), slim_in=False)
    with at_width(network, 0.5):
        moco = MoCo(network, proj_dim=3, queue_size=4)
        assert moco.keys(network, torch.ones(2, 2)).shape == (2, 3)


def test_a_network_in_float64():
    network = nn.Linear(2, 3).double()
    moco = MoCo(network, proj_dim=3, queue_size=4)
    images = torch.rand(5, 2, dtype=torch.float64)
    keys = moco.keys(network, images)
    logits = moco_logits(network(images), keys, moco.queue)
    expected = F.normalize(network(images), dim=1) @ torch.cat([keys.T, moco.queue.double()], dim=1)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits[:, 1:], expected[:, 5:])
    torch.testing.assert_close(logits[:, 0], expected[:, :5].diagonal())
