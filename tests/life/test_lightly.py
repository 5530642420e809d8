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

from lightly.loss import DINOLoss, MMCRLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss, TiCoLoss, VICRegLoss
from lightly.models.modules import NNMemoryBankModule, SwaVPrototypes, heads
from lightly.models.utils import deactivate_requires_grad, select_most_similar, update_momentum

FEATURES = 96  # of test_resnet
VIEWS = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def backbone() -> nn.Module:
    return nn.Sequential(*list(plain("test_resnet").children())[:-1], nn.Flatten())


def network(head: nn.Module) -> nn.Module:
    """A backbone and its projection head, converted as one: the embedding stays full."""
    return slimmable.slimify(nn.Sequential(backbone(), head), WIDTHS, example_inputs=VIEWS[0]).train()


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


# -- steps of lightly's examples, on one model as published and on one converted before its momentum encoder is copied
class Published(nn.Module):
    """A model of an example, with its copies; `step` is what an example does between its update and `backward`."""

    def __init__(self, convert, copies=0, **parts):
        super().__init__()
        self.backbone = backbone()
        for name, part in parts.items():
            setattr(self, name, part)
        convert(self)
        self.frozen = [self.copied(module) for module in list(self.children())[:copies]]
        for module in self.frozen:
            deactivate_requires_grad(module)
        self.once = []

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x

    def copied(self, module):
        return copy.deepcopy(module)

    def forward_momentum(self, x):
        for part in self.frozen:
            x = part(x)
        return x.detach()


class Predicting(Published):
    """Returns what the projection and the prediction head give, as SimSiam, NNCLR and SMoG do."""

    def forward(self, x):
        z = self.projection(self.backbone(x))
        return z.detach(), self.prediction(z)


def moco(convert):
    model = Published(convert, 2, head=heads.MoCoProjectionHead(FEATURES, 64, 16))
    criterion = NTXentLoss(memory_bank_size=(32, 16))
    model.once = [criterion]
    return model, lambda: criterion(model(VIEWS[0]), model.forward_momentum(VIEWS[1]))


def byol(convert):
    head, prediction = heads.BYOLProjectionHead(FEATURES, 64, 16), heads.BYOLPredictionHead(16, 64, 16)
    model, criterion = Published(convert, 2, head=head, prediction=prediction), NegativeCosineSimilarity()
    return model, lambda: criterion(model(VIEWS[0]), model.forward_momentum(VIEWS[1]))


def tico(convert):
    model, criterion = Published(convert, 2, head=heads.TiCoProjectionHead(FEATURES, 64, 16)), TiCoLoss()
    model.once = [criterion]
    return model, lambda: criterion(model(VIEWS[0]), model.forward_momentum(VIEWS[1]))


def mmcr(convert):
    model, criterion = Published(convert, 2, head=heads.MMCRProjectionHead(FEATURES, 64, 16)), MMCRLoss()

    def step():
        online = torch.stack([model(view) for view in VIEWS], dim=1)
        return criterion(online, torch.stack([model.forward_momentum(view) for view in VIEWS], dim=1))

    return model, step


def dino(convert):
    class DINO(Published):
        def copied(self, module):  # a head with weight norm cannot be copied, so the teacher's is another one
            return copy.deepcopy(module) if module is self.backbone else dino_head()

    def dino_head():
        return heads.DINOProjectionHead(FEATURES, 64, 32, 48, norm_last_layer=False)

    model, criterion = DINO(convert, 2, head=dino_head()), DINOLoss(output_dim=48, warmup_teacher_temp_epochs=5)
    model.once = [criterion]
    return model, lambda: criterion([model.forward_momentum(v) for v in VIEWS[:2]], [model(v) for v in VIEWS], epoch=0)


def simsiam(convert):
    parts = heads.SimSiamProjectionHead(FEATURES, 64, 16), heads.SimSiamPredictionHead(16, 8, 16)
    model = Predicting(convert, projection=parts[0], prediction=parts[1])
    criterion = NegativeCosineSimilarity()

    def step():
        (z0, p0), (z1, p1) = model(VIEWS[0]), model(VIEWS[1])
        return 0.5 * (criterion(z0, p1) + criterion(z1, p0))

    return model, step


def nnclr(convert):
    parts = heads.NNCLRProjectionHead(FEATURES, 64, 16), heads.NNCLRPredictionHead(16, 64, 16)
    model = Predicting(convert, projection=parts[0], prediction=parts[1])
    memory_bank, criterion = NNMemoryBankModule(size=(32, 16)), NTXentLoss()
    model.once = [memory_bank]

    def step():
        (z0, p0), (z1, p1) = model(VIEWS[0]), model(VIEWS[1])
        z0, z1 = memory_bank(z0, update=False), memory_bank(z1, update=True)
        return 0.5 * (criterion(z0, p1) + criterion(z1, p0))

    return model, step


def smog(convert):
    parts = heads.SMoGProjectionHead(FEATURES, 64, 16), heads.SMoGPredictionHead(16, 64, 16)
    model = Predicting(convert, 2, projection=parts[0], prediction=parts[1])
    prototypes = heads.SMoGPrototypes(torch.rand(12, 16), beta=0.99)
    memory_bank = NNMemoryBankModule(size=(32, 16))
    model.once = [prototypes, memory_bank]

    def step():
        (encoded, predicted), target = model(VIEWS[0]), model.forward_momentum(VIEWS[1])
        assignments = prototypes.assign_groups(target)
        groups = prototypes.get_updated_group_features(encoded)
        logits = prototypes(predicted, groups, temperature=0.1)
        prototypes.set_group_features(groups)
        memory_bank(encoded, update=True)
        return nn.functional.cross_entropy(logits, assignments)

    return model, step


def swav(convert):
    head, prototypes = heads.SwaVProjectionHead(FEATURES, 64, 16), SwaVPrototypes(16, 24)
    model, criterion = Published(convert, head=head, prototypes=prototypes), SwaVLoss()
    model.prototypes.normalize()
    return model, lambda: criterion([model(view) for view in VIEWS[:2]], [model(view) for view in VIEWS[2:]]).sum()


def densecl(convert):
    class DenseCL(Published):
        def forward(self, x):
            features = self.backbone[:-1](x)
            return features, self.head(features)

    model = DenseCL(convert, head=heads.DenseCLProjectionHead(FEATURES, 64, 16))
    criterion = NTXentLoss(memory_bank_size=(32, 16))
    model.once = [criterion]

    def step():
        features, query = model(VIEWS[0])
        with torch.no_grad():  # of the backbone itself, as published
            key_features, key = model(VIEWS[1])
        places = [each[:, None] for each in (features, key_features, key)]
        return criterion(query, select_most_similar(*places).flatten(end_dim=1))

    return model, step


def vicreg(convert):
    model = Published(convert, head=heads.VICRegProjectionHead(FEATURES, 64, 16))
    criterion = VICRegLoss()
    return model, lambda: criterion(model(VIEWS[0]), model(VIEWS[1]))


def kept(model: Published) -> dict[str, Tensor]:
    """All tensors of a model, its copies and what changes when called, whether in a state dict or not."""
    found = dict(model.state_dict())
    for number, module in enumerate([*model.frozen, *model.once]):
        own = [*module.state_dict().items(), *module.named_buffers()]
        own += [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
        found.update({f"{number}.{name}": value for name, value in own})
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.mark.parametrize(
    "method",
    [moco, byol, tico, mmcr, dino, simsiam, nnclr, smog, swav, densecl, vicreg],
    ids=lambda method: method.__name__,
)
def test_a_step_of_all_widths_leaves_what_a_plain_step_of_the_example_leaves(method):
    def convert(model):
        skip = ["prototypes*"] if hasattr(model, "prototypes") else []
        slimmable.slimify(model, WIDTHS, example_inputs=VIEWS[0], inplace=True, skip=skip)

    (plain_model, plain_step), (model, step) = [
        (torch.manual_seed(0), method(way))[1] for way in (lambda model: None, convert)
    ]
    before, expected = kept(plain_model), plain_step()
    expected.backward()
    recipe = slimmable.SlimRecipe(model, frozen=model.frozen, once=model.once)
    assert torch.equal(recipe.backward(step), expected.detach())
    assert list(recipe.losses) == list(WIDTHS)
    now, found = kept(plain_model), kept(model)
    for name, tensor in now.items():
        assert torch.equal(found[name], tensor), name
    changing = {name for name, tensor in now.items() if name not in before or not torch.equal(tensor, before[name])}
    assert not model.once or any(name[0].isdigit() for name in changing)
    learning = {name for name, parameter in plain_model.named_parameters() if parameter.grad is not None}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in learning or ".narrow." in name), name
