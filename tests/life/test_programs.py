"""Models in the shapes of published programs, against a loop over plain networks that is written out here.

In these programs the forward of the model returns the loss, holds the queue, or moves the momentum encoder; or a
student of several crops learns from a teacher beside it. The loop trains one extracted network per width, calls the
teacher once, and adds up the gradients where they belong.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimmable
from slimmable import OnlineDistillation, SlimRecipe
from slimmable.losses import nt_xent_logits

WIDTHS = (1.0, 0.5, 0.25)
WEIGHTS = (3.0, 2.0, 1.0)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def backbone():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def head(size=8):
    return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, size))


def divergence(scores, targets, temperature=5.0):
    """The distillation of SlimCLR by its formula."""
    student, teacher = (scores / temperature).log_softmax(1), (targets / temperature).softmax(1)
    return temperature**2 * (teacher * (teacher.log() - student)).sum(1).mean()


def step_by_hand(model, objective):
    """Return the gradients and BatchNorm statistics of one step, by the names in `model`.

    `objective` takes a plain network and returns its loss and what is compared, one matrix.
    """
    names, expected = dict(model.state_dict(keep_vars=True)), {}
    expected = {name: torch.zeros_like(tensor) for name, tensor in names.items() if tensor.requires_grad}
    taught = None
    for index, (width, weight) in enumerate(zip(WIDTHS, WEIGHTS, strict=True)):
        small = slimmable.extract(model, width)
        loss, scores = objective(small)
        if taught is None:
            taught = scores.detach()
            term = loss
        else:
            term = 0.5 * loss + 0.5 * divergence(scores, taught)
        (weight * term).backward()
        for name, tensor in small.state_dict(keep_vars=True).items():
            place, _, leaf = name.rpartition(".")
            own = f"{place}.narrow.{index - 1}.{leaf}"
            if own in names:
                expected[own] = tensor.grad if tensor.requires_grad else tensor.detach()
            elif tensor.grad is not None:
                expected[name][tuple(slice(size) for size in tensor.shape)] += tensor.grad
            elif index == 0 and not tensor.requires_grad:
                expected[name] = tensor.detach()
    return expected


def check(model, expected, but=()):
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in expected and not name.startswith(tuple(but)):
            torch.testing.assert_close(tensor.grad if tensor.requires_grad else tensor, expected[name], msg=name)


# -- the forward returns the loss
class Decorrelated(nn.Module):
    """Covariances and distances of two views, as in VICReg; the last part may be a norm, as in Barlow Twins."""

    def __init__(self, norm):
        super().__init__()
        self.backbone, self.projector = backbone(), head()
        self.norm = nn.BatchNorm1d(8, affine=False) if norm else None
        self.register_buffer("calls", torch.zeros(()))

    def embed(self, x):
        z = self.projector(self.backbone(x))
        return z if self.norm is None else self.norm(z)

    def loss(self, z0, z1):
        invariance, loss = F.mse_loss(z0, z1), 0.0
        for z in (z0, z1):
            z = z - z.mean(dim=0)
            covariance = z.T @ z / (len(z) - 1)
            loss = loss + F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()
            loss = loss + (covariance - covariance.diag().diag()).square().sum() / 8
        return loss + 25 * invariance

    def forward(self, x0, x1):
        self.calls += 1
        return self.loss(self.embed(x0), self.embed(x1))


@pytest.mark.parametrize("norm", [False, True], ids=["projector", "norm"])
def test_a_forward_that_returns_the_loss_distils_the_last_part(norm):
    x0, x1 = torch.randn(2, 6, 3, 8, 8)
    model = slimmable.slimify(Decorrelated(norm), WIDTHS, example_inputs=(x0, x1))

    def objective(small):
        z0, z1 = small.embed(x0), small.embed(x1)
        return small.loss(z0, z1), nt_xent_logits(z0, z1)

    expected = step_by_hand(model, objective)
    recipe = SlimRecipe(model, OnlineDistillation(), WEIGHTS)
    recipe.backward(lambda: model(x0, x1))
    check(model, expected, but=["calls"])
    assert model.calls == 1


# -- the forward holds the queue and moves the momentum encoder
class Queued(nn.Module):
    """Momentum contrast in one module, with keys in another order than queries, for the sake of BatchNorm."""

    def __init__(self):
        super().__init__()
        self.encoder, self.slow = nn.Sequential(backbone(), head()), nn.Sequential(backbone(), head())
        self.slow.load_state_dict(self.encoder.state_dict())
        self.slow.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(8, 12), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def keys(self, x):
        for mine, other in zip(self.slow.parameters(), self.encoder.parameters(), strict=True):
            mine.data = mine.data * 0.9 + other.data * 0.1
        order = torch.randperm(len(x))
        return F.normalize(self.slow(x[order]), dim=1)[order.argsort()]

    @torch.no_grad()
    def enqueue(self, keys):
        start = int(self.pointer)
        self.queue[:, start : start + len(keys)] = keys.T
        self.pointer[0] = (start + len(keys)) % 12

    def forward(self, x, other):
        queries = F.normalize(self.encoder(x), dim=1)
        keys = self.keys(other)
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.clone()], dim=1) / 0.2
        self.enqueue(keys)
        return logits, torch.zeros(len(x), dtype=torch.long)


def test_a_queue_and_a_momentum_encoder_inside_the_model_move_once():
    views = torch.randn(4, 2, 6, 3, 8, 8)
    plain = Queued()
    model = copy.deepcopy(plain)
    for encoder in (model.encoder, model.slow):  # the whole would get thin embeddings, which do not fit full keys
        slimmable.slimify(encoder, WIDTHS, example_inputs=views[0, 0], inplace=True)
    recipe = SlimRecipe(model, OnlineDistillation(), WEIGHTS, frozen=[model.slow])
    for x, other in views:
        drawn, keys, queue = torch.get_rng_state(), [], plain.queue.clone()

        def objective(small, x=x, other=other, keys=keys, queue=queue):
            if not keys:
                keys.append(copy.deepcopy(plain).keys(other))
            queries = F.normalize(small.encoder(x), dim=1)
            logits = torch.cat([(queries * keys[0]).sum(1, keepdim=True), queries @ queue], dim=1) / 0.2
            return F.cross_entropy(logits, torch.zeros(6, dtype=torch.long)), logits

        expected = step_by_hand(model, objective)
        torch.set_rng_state(drawn)
        plain(x, other)
        after = torch.get_rng_state()
        torch.set_rng_state(drawn)
        recipe.backward(lambda x=x, other=other: F.cross_entropy(*model(x, other)))
        check(model, expected, but=("slow", "queue", "pointer"))
        once = {name: tensor for name, tensor in plain.state_dict().items() if not name.startswith("encoder")}
        mine = {name: model.state_dict()[name] for name in once}
        torch.testing.assert_close(mine, once)
        assert torch.equal(torch.get_rng_state(), after)
        for parameter in model.parameters():  # the next step starts from other weights, in both
            if parameter.requires_grad:
                parameter.data.sub_(parameter.grad, alpha=0.01)
                parameter.grad = None
        plain.encoder.load_state_dict(slimmable.extract(model, 1.0).encoder.state_dict())


# -- the forward moves the momentum encoder and returns the loss
class Predicting(nn.Module):
    """Two views predict each other's targets, as in MoCo v3 and BYOL."""

    def __init__(self):
        super().__init__()
        self.encoder, self.slow = nn.Sequential(backbone(), head()), nn.Sequential(backbone(), head())
        self.slow.load_state_dict(self.encoder.state_dict())
        self.slow.requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))

    def move(self, momentum):
        for mine, other in zip(self.slow.parameters(), self.encoder.parameters(), strict=True):
            mine.data = mine.data * momentum + other.data * (1 - momentum)

    def loss(self, queries, keys):
        logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
        return F.cross_entropy(logits / 0.2, torch.arange(len(queries)))

    def forward(self, x0, x1, momentum):
        q0, q1 = self.predictor(self.encoder(x0)), self.predictor(self.encoder(x1))
        with torch.no_grad():
            self.move(momentum)
            k0, k1 = self.slow(x0), self.slow(x1)
        return self.loss(q0, k1) + self.loss(q1, k0)


def test_a_momentum_encoder_that_moves_in_the_forward_moves_once():
    x0, x1 = torch.randn(2, 6, 3, 8, 8)
    plain = Predicting()
    with torch.no_grad():
        for parameter in plain.slow.parameters():
            parameter.mul_(0.9)
    model = copy.deepcopy(plain)
    for part, example in ((model.encoder, x0), (model.slow, x0), (model.predictor, torch.zeros(6, 8))):
        slimmable.slimify(part, WIDTHS, example_inputs=example, inplace=True)
    plain(x0, x1, 0.75)

    def objective(small):
        with torch.no_grad():
            teacher = copy.deepcopy(plain.slow)
            k0, k1 = teacher(x0), teacher(x1)
        q0, q1 = small.predictor(small.encoder(x0)), small.predictor(small.encoder(x1))
        return small.loss(q0, k1) + small.loss(q1, k0), nt_xent_logits(q0, q1)

    expected = step_by_hand(model, objective)
    SlimRecipe(model, OnlineDistillation(), WEIGHTS, frozen=[model.slow]).backward(lambda: model(x0, x1, 0.75))
    check(model, expected, but=["slow"])
    for name, tensor in plain.slow.state_dict().items():
        torch.testing.assert_close(model.slow.state_dict()[name], tensor, msg=name)


# -- a student of several crops and a teacher beside it
class Crops(nn.Module):
    """Runs the crops of each size together, and its head on all of them."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = backbone(), head(8)
        self.last_layer = nn.utils.weight_norm(nn.Linear(8, 12, bias=False))
        self.last_layer.weight_g.requires_grad_(False)

    def forward(self, crops):
        sizes = [len(crop[0, 0]) for crop in crops]
        features = [
            self.backbone(torch.cat([crop for crop in crops if len(crop[0, 0]) == size]))
            for size in dict.fromkeys(sizes)
        ]
        return self.last_layer(F.normalize(self.head(torch.cat(features)), dim=1))


class Centred(nn.Module):
    """Cross-entropy of the student's crops with the teacher's centred scores; the centre follows them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(12))

    def forward(self, student, teacher):
        targets = ((teacher - self.centre) / 0.04).softmax(1).chunk(2)
        crops = (student / 0.1).log_softmax(1).chunk(3)
        self.centre = 0.9 * self.centre + 0.1 * teacher.mean(dim=0)
        pairs = [(a, b) for i, a in enumerate(targets) for j, b in enumerate(crops) if i != j]
        return torch.stack([-(target * crop).sum(1).mean() for target, crop in pairs]).mean()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_student_of_several_crops_learns_at_every_width_from_one_teacher():
    crops = [torch.randn(4, 3, size, size) for size in (8, 8, 6)]
    plain = Crops()
    student, teacher = (slimmable.slimify(plain, WIDTHS, example_inputs=(crops,)) for _ in range(2))
    teacher.requires_grad_(False)
    criterion, by_hand, its_teacher = Centred(), Centred(), Crops()
    its_teacher.load_state_dict(plain.state_dict())
    recipe = SlimRecipe(student, OnlineDistillation(), WEIGHTS, frozen=[teacher], once=[criterion])
    targets = its_teacher(crops[:2]).detach()

    def objective(small):
        scores = small(crops)
        return copy.deepcopy(by_hand)(scores, targets), scores

    expected = step_by_hand(student, objective)
    recipe.backward(lambda: criterion(student(crops), teacher(crops[:2])))
    check(student, expected)
    by_hand(plain(crops).detach(), targets)
    torch.testing.assert_close(criterion.centre, by_hand.centre)
    for name, tensor in its_teacher.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[name], tensor, msg=name)


# -- around the step
class Masked(nn.Module):
    """Draws from every generator that programs draw from, and notes what it got."""

    def __init__(self):
        super().__init__()
        self.net, self.drawn = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), []

    def forward(self, x):
        self.drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))  # noqa: NPY002
        return self.net(x).square().mean()


@pytest.mark.parametrize("way", ["backward", "total"])
def test_all_widths_draw_the_random_numbers_of_the_plain_program(way):
    x, plain = torch.randn(5, 4), Masked()
    model = copy.deepcopy(plain)
    slimmable.slimify(model.net, WIDTHS, example_inputs=x, inplace=True)
    for network in (plain, model):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        recipe = SlimRecipe(model)
        for _ in range(2):
            if network is plain:
                plain(x).backward()
            else:
                getattr(recipe, way)(lambda: model(x))
    first, second = plain.drawn
    assert model.drawn == [first] * 3 + [second] * 3
    assert first != second


def test_the_backward_pass_is_not_under_autocast():
    """A block in full precision has its gradient in full precision, though the whole step is under autocast."""
    x = torch.randn(8, 16, dtype=torch.float32)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).float()
    model = slimmable.slimify(model, WIDTHS, example_inputs=x)
    plain = copy.deepcopy(model)

    def similarity(model):
        z = model(x)
        with torch.autocast("cpu", enabled=False):
            return (z.float() @ z.float().T).square().mean()

    with torch.autocast("cpu", torch.bfloat16):
        SlimRecipe(model, loss_weights=(1.0, 0.0, 0.0)).backward(lambda: similarity(model))
        loss = similarity(plain)
    loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=0, atol=0, msg=name)


def test_gradients_that_are_set_to_zero_after_the_step_are_noticed():
    x = torch.randn(5, 4)
    model = slimmable.slimify(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), WIDTHS, example_inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = SlimRecipe(model)
    recipe.backward(lambda: model(x).square().mean())
    optimizer.zero_grad()
    with pytest.raises(slimmable.errors.UsageError, match=r"call zero_grad before recipe\.backward"):
        optimizer.step()
