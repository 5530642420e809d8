"""Fine-tuning an extracted width: against plain PyTorch, and what must stay as it is."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import slimmable
from benchmarks.finetuning import accuracy_of, finetune
from slimmable.errors import DataError, UsageError


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def data(images=50):
    """Bright left or bright right halves, in noise; the mean brightness says nothing."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(images, 1, 6, 6, generator=generator), torch.arange(images) % 2
    x[labels == 0, :, :, :3] += 0.5
    x[labels == 1, :, :3, :] += 0.5
    return x, labels


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_it_is_plain_training():
    """Ten steps by hand: Nesterov momentum, cosine, decay of matrices only, BatchNorm in train mode."""
    (x, labels), backbone = data(), net()
    found = finetune(backbone, x, labels, epochs=5, batch_size=25, learning_rate=0.1, weight_decay=0.01, seed=3)
    head = nn.Linear(6, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    plain = nn.Sequential(copy.deepcopy(backbone), head).train()
    torch.manual_seed(3)
    velocity = [torch.zeros_like(p) for p in plain.parameters()]
    for step in range(10):
        if step % 2 == 0:
            order = torch.randperm(50)
        rows = order[25 * (step % 2) :][:25]
        gradients = torch.autograd.grad(F.cross_entropy(plain(x[rows]), labels[rows]), list(plain.parameters()))
        rate = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * step / 10)).item())
        for i, (p, gradient) in enumerate(zip(plain.parameters(), gradients, strict=True)):
            gradient = gradient + (0.01 if p.ndim > 1 else 0.0) * p.detach()
            velocity[i] = 0.9 * velocity[i] + gradient
            p.data -= rate * (gradient + 0.9 * velocity[i])
    for ours, theirs in zip(found.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_it_learns_and_leaves_the_backbone_alone():
    (x, labels), backbone = data(), net().train()
    backbone[1].eval()
    before = state(backbone)
    network = finetune(backbone, x, labels, learning_rate=0.2, epochs=40)
    assert list(dict(network.named_children())) == ["backbone", "classifier"]
    assert accuracy_of(network, x, labels) > 0.95  # of a class each: .5 at the start
    assert F.cross_entropy(network(x), labels) < 0.4  # log 2 at the start
    assert not any(module.training for module in network.modules())
    assert [module.training for module in backbone] == [True, False, True, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    for name, tensor in network.backbone.state_dict().items():
        assert not torch.equal(tensor, before[name]), name


def test_the_seed_settles_everything_and_no_other_random_number_changes():
    (x, labels), backbone = data(), net(dropout=0.5)
    torch.manual_seed(5)
    first = state(finetune(backbone, x, labels, epochs=2, batch_size=7))
    drawn = torch.rand(1)
    again, other = (state(finetune(backbone, x, labels, epochs=2, batch_size=7, seed=seed)) for seed in (0, 1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_uint8_images_are_scaled():
    (x, labels), backbone = data(), net()
    pixels = (x / 1.5 * 255).to(torch.uint8)
    first, second = (state(finetune(backbone, part, labels, epochs=1)) for part in (pixels, pixels.float() / 255))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_last_batch_of_one_image_does_not_break_batchnorm():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4))
    x, labels = data(9)
    assert finetune(backbone, x, labels, epochs=1, batch_size=4)(x).isfinite().all()


def test_frozen_parameters_stay():
    backbone = net()
    backbone[0].requires_grad_(False)
    network = finetune(backbone, *data(), epochs=2)
    assert torch.equal(network.backbone[0].weight, backbone[0].weight)
    assert not torch.equal(network.backbone[1].weight, backbone[1].weight)


def test_an_extracted_timm_network():
    torch.manual_seed(0)
    backbone = slimmable.slimify(timm.create_model("resnet10t", num_classes=0), (1.0, 0.25))
    images, labels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 4
    network = finetune(slimmable.extract(backbone, 0.25), images, labels, epochs=1, num_classes=6)
    assert network.classifier.weight.shape == (6, 128)
    with pytest.raises(UsageError, match=r"runs at several widths; give slimmable.extract"):
        finetune(backbone, images, labels)


@pytest.mark.parametrize(
    ("backbone", "labels", "message"),
    [
        (net(), torch.zeros(3).long(), "one label"),
        (net(), torch.full((50,), -1), "labels from -1"),
        (net(), torch.zeros(50), "labels are torch.float32"),
        (nn.Conv2d(1, 6, 3), torch.zeros(50).long(), r"features of shape \(2, 6, 4, 4\), expected \(batch, features\)"),
    ],
)
def test_it_refuses_what_does_not_fit(backbone, labels, message):
    with pytest.raises(DataError, match=message):
        finetune(backbone, data()[0], labels)
