"""What published programs do that a step of all widths could silently get wrong: it does it right, or says so."""

import copy

import pytest
import torch
from torch import nn

import slimmable
from slimmable.training import SlimRecipe

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    """Predicts hidden inputs from the others, as MAE does; which are hidden is drawn in the forward."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x):
        mask = torch.rand(x.shape) < 0.5
        return self.body(x * mask), mask


class Features(nn.Module):
    """Returns features, which get thinner, and an embedding, as lightly's DenseCL does."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        features = self.backbone(x)
        return features, self.head(features)


def converted(model):
    return slimmable.slimify(model, (1.0, 0.5), example_inputs=X)


def test_every_width_meets_the_same_random_numbers():
    model = converted(Masked())
    recipe = SlimRecipe(model, slimmable.OnlineDistillation("mse"))
    masks = []

    def closure():
        y, mask = model(X)
        masks.append(mask)
        return y.square().mean()

    torch.manual_seed(0)
    recipe.backward(closure)
    drawn = torch.rand(3)
    assert len(masks) == 2
    assert torch.equal(*masks)
    torch.manual_seed(0)
    model(X)
    assert torch.equal(drawn, torch.rand(3))  # the program goes on as if one width had run


def test_a_forward_that_is_called_directly_is_compared_too():
    model = converted(Masked())
    recipe = SlimRecipe(model, slimmable.OnlineDistillation("mse"))
    recipe.backward(lambda: model.forward(X)[0].square().mean())
    assert list(recipe.distillations) == [0.5]


def test_features_that_get_thinner_are_not_compared():
    model = converted(Features())
    recipe = SlimRecipe(model, slimmable.OnlineDistillation("embedding"))
    recipe.backward(lambda: model(X)[1].square().mean())
    assert list(recipe.distillations) == [0.5]


def test_a_frozen_module_that_the_step_does_not_call_is_noticed():
    model = converted(Features())
    teacher = copy.deepcopy(model).requires_grad_(False)
    recipe = SlimRecipe(model, frozen=[teacher])
    teacher = copy.deepcopy(model).requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen"):
        recipe.backward(lambda: (model(X)[1] - teacher(X)[1]).square().mean())


class Queued(nn.Module):
    """Keeps its embeddings in a queue that its forward reads, as lightly's SwaV with a queue does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.queue = nn.Module()
        self.queue.register_buffer("bank", torch.zeros(24, 8))
        self.queue.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        z = self.body(x)
        with torch.no_grad():
            place = int(self.queue.place)
            self.queue.bank[place : place + len(z)] = z
            self.queue.place[0] = (place + len(z)) % len(self.queue.bank)
        return z, self.queue.bank.clone()


@pytest.mark.parametrize("told", [False, True])
def test_a_queue_that_the_models_own_forward_reads_changes_once_per_step(told):
    model = converted(Queued())
    assert all(not column.cuts for column in model.queue._slim.columns)
    recipe = SlimRecipe(model, once=[model.queue] if told else [])
    for step in (1, 2):
        before, full = model.queue.bank.clone(), model(X)[0].detach()
        model.queue.bank.copy_(before)
        model.queue.place[0] = 8 * (step - 1)
        recipe.backward(lambda: model(X)[0].square().mean())
        before[8 * (step - 1) : 8 * step] = full
        assert int(model.queue.place) == 8 * step % 24
        assert torch.equal(model.queue.bank, before)


class Scheduled(nn.Module):
    """Holds a generator, which cannot be copied, as lightly's I-JEPA does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.schedule = (0.1 * step for step in range(10))

    def forward(self, x):
        return self.body(x)


def test_a_model_that_holds_what_cannot_be_copied_is_converted_in_place():
    model = Scheduled()
    assert slimmable.slimify(model, (1.0, 0.5), example_inputs=X, inplace=True) is model
    assert next(model.schedule) == 0.0


class Token(nn.Module):
    """Adds a parameter of its own between its parts, as a vision transformer does with its class token."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)
        self.token = nn.Parameter(torch.randn(32))

    def forward(self, x):
        return self.last((self.first(x) + self.token).relu())


class WithTeacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = Token()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        return self.student(x), self.teacher(x)


def test_a_frozen_module_in_the_model_is_replayed_whole():
    model = converted(WithTeacher())
    recipe, seen = SlimRecipe(model, frozen=[model.teacher]), []

    def closure():
        z, target = model(X)
        seen.append(target)
        return (z - target).square().mean()

    recipe.backward(closure)
    assert torch.equal(seen[0], seen[1])
