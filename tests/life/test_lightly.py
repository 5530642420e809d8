"""Methods of lightly, built as in its examples, on a converted network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import slimmable
from slimmable.errors import UsageError
from tests.life.networks import WIDTHS, plain, shapes

pytest.importorskip("lightly", reason="lightly is not installed")

from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import heads
from lightly.models.utils import deactivate_requires_grad, update_momentum

FEATURES = 96  # of test_resnet
VIEWS = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def network(head: nn.Module) -> nn.Module:
    """A backbone and its projection head, converted as one: the embedding stays full."""
    backbone = nn.Sequential(*list(plain("test_resnet").children())[:-1], nn.Flatten())
    return slimmable.slimify(nn.Sequential(backbone, head), WIDTHS, example_inputs=VIEWS[0]).train()


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("head", "size"),
    [
        (heads.SimCLRProjectionHead(FEATURES, 64, 16), 16),
        (heads.MoCoProjectionHead(FEATURES, 64, 16), 16),
        (heads.BYOLProjectionHead(FEATURES, 64, 16), 16),
        (heads.BarlowTwinsProjectionHead(FEATURES, 64, 16), 16),
        (heads.VICRegProjectionHead(FEATURES, 64, 16), 16),
        (heads.SwaVProjectionHead(FEATURES, 64, 16), 16),
        (heads.SimSiamProjectionHead(FEATURES, 64, 16), 16),
        (heads.DINOProjectionHead(FEATURES, 64, 32, 48, norm_last_layer=False), 48),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_heads_get_thinner_inside_and_keep_the_embedding(head, size):
    slim = network(head)
    first = next(module for module in slim[1].modules() if isinstance(module, nn.Linear))
    for width in WIDTHS:
        with slimmable.at_width(slim, width):
            assert first.weight.shape == (int(64 * width), int(FEATURES * width))
    assert shapes(slim.eval(), VIEWS[0]) == [(4, size)] * 3


def test_simclr_trains_every_parameter():
    slim = network(heads.SimCLRProjectionHead(FEATURES, 64, 16))
    criterion, before = NTXentLoss(), parameters(slim)
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.06)
    recipe = slimmable.SlimRecipe(slim)
    for _ in recipe.widths(1.0):
        recipe.loss(criterion(slim(VIEWS[0]), slim(VIEWS[1]))).backward()
    optimizer.step()
    assert changed(slim, before) == set(before)


def test_moco_fills_its_memory_bank_once_per_step(monkeypatch):
    student = network(heads.MoCoProjectionHead(FEATURES, 64, 16))
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    criterion = NTXentLoss(memory_bank_size=(32, 16))
    recipe = slimmable.SlimRecipe(student)
    expected = criterion.memory_bank.bank.clone()
    negatives: list[Tensor] = []
    ask = criterion.memory_bank.forward

    def ask_and_note(*args, **kwargs):
        keys, bank = ask(*args, **kwargs)
        negatives.append(bank)
        return keys, bank

    monkeypatch.setattr(criterion.memory_bank, "forward", ask_and_note)
    for step in range(2):
        before = [parameters(student), parameters(teacher)]
        update_momentum(student, teacher, m=0.75)
        for name, parameter in teacher.named_parameters():
            torch.testing.assert_close(parameter, torch.lerp(before[1][name], before[0][name], 0.25))
        for _ in recipe.widths(1.0):
            queries = student(VIEWS[2 * step])
            if recipe.first:
                keys = teacher(VIEWS[2 * step + 1])
            with recipe.once(criterion):
                recipe.loss(criterion(queries, keys)).backward()
        assert len(negatives) == len(WIDTHS)
        assert all(torch.equal(bank.T, expected) for bank in negatives)  # no width meets this step's keys
        negatives.clear()
        expected[4 * step : 4 * step + 4] = nn.functional.normalize(keys, dim=1)
        torch.testing.assert_close(criterion.memory_bank.bank, expected)
        assert int(criterion.memory_bank.bank_ptr) == 4 * (step + 1)
    assert slimmable.width_of(teacher) == 1.0


def test_byol_switches_network_and_predictor_together():
    student = network(heads.BYOLProjectionHead(FEATURES, 64, 16))
    predictor = slimmable.slimify(heads.BYOLPredictionHead(16, 64, 16), WIDTHS, example_inputs=torch.zeros(2, 16))
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    both = nn.ModuleList([student, predictor])
    recipe, criterion, before = slimmable.SlimRecipe(both), NegativeCosineSimilarity(), parameters(both)
    optimizer = torch.optim.SGD(both.parameters(), lr=0.06)
    update_momentum(student, teacher, m=0.99)
    for _ in recipe.widths(1.0):
        if recipe.first:
            with torch.no_grad():
                targets = [teacher(view) for view in VIEWS[:2]]
        predictions = [predictor(student(view)) for view in VIEWS[:2]]
        recipe.loss((criterion(predictions[0], targets[1]) + criterion(predictions[1], targets[0])) / 2).backward()
    optimizer.step()
    assert changed(both, before) == set(before)


def test_dino_moves_its_centre_once_per_step():
    student = network(heads.DINOProjectionHead(FEATURES, 64, 32, 48, norm_last_layer=False))
    teacher = network(heads.DINOProjectionHead(FEATURES, 64, 32, 48, norm_last_layer=False))
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    criterion = DINOLoss(output_dim=48, warmup_teacher_temp_epochs=5, center_momentum=0.9)
    recipe = slimmable.SlimRecipe(student)
    for _ in recipe.widths(1.0):
        if recipe.first:
            targets = [teacher(view) for view in VIEWS[:2]]
        with recipe.once(criterion):
            recipe.loss(criterion(targets, [student(view) for view in VIEWS], epoch=0)).backward()
    torch.testing.assert_close(criterion.center, 0.1 * torch.stack(targets).mean(dim=(0, 1), keepdim=True))
    for parameter in student.parameters():
        assert parameter.grad is not None


def test_once_belongs_into_the_loop_and_into_every_width_of_it():
    slim = network(heads.SimCLRProjectionHead(FEATURES, 64, 16))
    criterion, recipe = NTXentLoss(memory_bank_size=(32, 16)), slimmable.SlimRecipe(slim)
    with pytest.raises(UsageError, match="no loop is running"), recipe.once(criterion):
        pass
    for _ in recipe.widths(1.0):
        if not recipe.first:
            with pytest.raises(UsageError, match="not used at the widest width"), recipe.once(criterion):
                pass
