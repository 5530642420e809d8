"""A frozen teacher: what it is asked, what of its output is compared, and that it stays as it is."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import slimmable
from slimmable import methods
from slimmable.errors import DataError, UsageError
from tests.methods.networks import CLASSES, FEATURES, WIDTHS, batch_of, encoder, make, recipe_of

KINDS = pytest.mark.parametrize("kind", ["scores", "mse", "cosine"])


class Fixed(nn.Module):
    """A teacher whose output is always the same, which counts its calls."""

    def __init__(self, output):
        super().__init__()
        self.output, self.calls = output, 0

    def forward(self, images):
        self.calls += 1
        return self.output


def taught_by(output, kind, size=CLASSES):
    network = encoder(methods.Distillation.projector(FEATURES, size))
    return methods.Distillation(network, Fixed(output), kind=kind)


@KINDS
def test_the_teacher_stays_as_it_is_and_is_no_part_of_the_method(kind):
    method = make(kind)
    before, optimizer = copy.deepcopy(method.teacher), torch.optim.SGD(method.online.parameters(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        method.step(recipe_of(method), batch_of(method, seed), 0.9)
        optimizer.step()
    assert method.teacher.training  # its own mode again
    assert all(parameter.requires_grad and parameter.grad is None for parameter in method.teacher.parameters())
    assert all(map(torch.equal, before.state_dict().values(), method.teacher.state_dict().values()))
    assert all(name.startswith("encoder.") for name in method.state_dict())
    assert {id(p) for p in method.teacher.parameters()}.isdisjoint(id(p) for p in method.parameters())


def test_the_teacher_moves_along_and_is_copied_and_pickled():
    method = make("mse")
    assert method.float().teacher.patch_embed.proj.weight.dtype == torch.float32
    file = io.BytesIO()
    torch.save(method, file)
    file.seek(0)
    for other in (copy.deepcopy(method), torch.load(file, weights_only=False)):
        assert other.teacher is not method.teacher
        batch = methods.Batch([batch_of(method).views[0].float()])
        assert other.step(recipe_of(other), batch, 0.9) == method.step(recipe_of(method), batch, 0.9)


def test_the_teacher_runs_once_per_step_for_all_widths():
    method = taught_by(torch.zeros(8, CLASSES, dtype=torch.float64), "scores")
    assert list(method.step(recipe_of(method), batch_of(method), 0.9)) == list(WIDTHS)
    assert method.teacher.calls == 1


@KINDS
def test_a_student_that_agrees_has_no_loss(kind):
    method = make(kind)
    method = methods.Distillation(method.encoder, copy.deepcopy(method.encoder), kind=kind)
    method.eval()
    found = method.step(recipe_of(method, slow_start=1.0), batch_of(method), 0.5)
    assert found[1.0] == pytest.approx(0.0, abs=1e-12)


ROWS = torch.arange(8.0 * CLASSES, dtype=torch.float64).reshape(8, CLASSES)
TOKENS = torch.stack([ROWS - 1, ROWS + 1, ROWS + 3], 1)


@pytest.mark.parametrize(
    ("kind", "output", "expected"),
    [
        ("scores", ROWS, ROWS),
        ("scores", SimpleNamespace(logits=ROWS, pooler_output=-ROWS), ROWS),
        ("mse", SimpleNamespace(logits=-ROWS, pooler_output=ROWS, last_hidden_state=-TOKENS), ROWS),
        ("mse", SimpleNamespace(pooler_output=ROWS[:, :, None, None]), ROWS),  # as of a ResNet of transformers
        ("mse", SimpleNamespace(pooler_output=None, last_hidden_state=TOKENS), ROWS + 1),
        ("cosine", SimpleNamespace(last_hidden_state=TOKENS), ROWS + 1),
    ],
)
def test_what_is_compared_of_an_output(kind, output, expected):
    method = taught_by(output, kind)
    (found,) = method.prepare(batch_of(method), 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        (
            "mse",
            TOKENS,
            r"the teacher's output must be a tensor of floats of shape \(batch, features\), .* got .* \(8, 3, 4\)",
        ),
        ("scores", ROWS[:5], r"embeddings of shape \(8, 4\) from a teacher's output of \(5, 4\)"),
        ("scores", ROWS.long(), "must be a tensor of floats"),
        (
            "scores",
            SimpleNamespace(pooler_output=ROWS),
            "the teacher's output, or its logits, must be a tensor, got SimpleN",
        ),
        (
            "cosine",
            SimpleNamespace(logits=ROWS),
            "or its pooler_output or last_hidden_state, must be a tensor, got SimpleN",
        ),
        ("mse", (ROWS, ROWS), "must be a tensor, got tuple"),
        ("mse", torch.zeros(8, CLASSES, 7, 7), r"\(8, 4, 7, 7\)"),
        ("mse", None, "must be a tensor, got NoneType"),
    ],
)
def test_an_output_that_cannot_be_compared(kind, output, message):
    method = taught_by(output, kind)
    with pytest.raises(DataError, match=message):
        method.step(recipe_of(method), batch_of(method), 0.9)
    assert all(parameter.grad is None for parameter in method.parameters())


@pytest.mark.parametrize("kind", ["scores", "mse"])
@pytest.mark.parametrize("family", ["vit", "resnet", "dinov2"])
def test_models_of_transformers_teach(family, kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sized = {"image_size": 32, "patch_size": 8, **sizes, "num_labels": CLASSES}
    small = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES}
    name, config = {
        "vit": ("ViT", transformers.ViTConfig(**sized)),
        "resnet": ("ResNet", transformers.ResNetConfig(**small)),
        "dinov2": ("Dinov2", transformers.Dinov2Config(**sized)),
    }[family]
    ending = "ForImageClassification" if kind == "scores" else "Model"
    teacher = getattr(transformers, f"{name}{ending}")(config).double()
    size = CLASSES if kind == "scores" else 16
    network = encoder(methods.Distillation.projector(FEATURES, size))
    method = methods.Distillation(network, teacher=teacher, kind=kind)
    view = batch_of(method).views[0]
    (found,) = method.prepare(methods.Batch([view]), 0.0)
    with torch.no_grad():
        output = teacher.eval()(pixel_values=view)
    torch.testing.assert_close(found, output.logits if kind == "scores" else output.pooler_output.reshape(8, size))
    method.step(recipe_of(method), methods.Batch([view]), 0.9)


def test_a_slimmable_teacher_teaches_at_its_own_width():
    method = make("supervised")
    with slimmable.at_width(method.encoder, 0.5), torch.no_grad():
        expected = method.encoder.eval()(batch_of(method).views[0])
    slimmable.set_width(method.encoder, 0.5)
    taught = methods.Distillation(encoder(methods.Distillation.projector(FEATURES, CLASSES)), method.encoder)
    batch = batch_of(taught)
    taught.step(recipe_of(taught), batch, 0.9)
    assert slimmable.width_of(method.encoder) == 0.5
    torch.testing.assert_close(taught.prepare(batch, 0.0)[0], expected)


def test_the_full_width_can_teach_as_well():
    method = make("scores")
    recipe = slimmable.SlimRecipe(method.online, slimmable.OnlineDistillation("kl"))
    assert list(method.step(recipe, batch_of(method), 0.9)) == list(WIDTHS)
    assert all(recipe.distillations[width] > 0 for width in WIDTHS[1:])


def test_a_trained_width_can_be_extracted():
    method = make("cosine")
    method.step(recipe_of(method), batch_of(method), 0.9)
    images = batch_of(method).views[0]
    small = slimmable.extract(method.backbone, 0.5).eval()
    with slimmable.at_width(method.eval(), 0.5), torch.no_grad():
        torch.testing.assert_close(small(images), method.backbone(images))


def test_arguments_that_do_not_fit():
    network = encoder(methods.Distillation.projector(FEATURES, CLASSES))
    with pytest.raises(UsageError, match="the teacher shares parameters with the encoder; give a copy"):
        methods.Distillation(network, nn.Sequential(network.backbone))
    with pytest.raises(UsageError, match="kind must be one of scores, mse, cosine, got 'kl'"):
        methods.Distillation(network, nn.Linear(2, 2), kind="kl")
    method = taught_by(torch.zeros(8, 7, dtype=torch.float64), "mse")
    with pytest.raises(DataError, match=r"embeddings of shape \(8, 4\) from a teacher's output of \(8, 7\)"):
        method.step(recipe_of(method), batch_of(method), 0.9)
