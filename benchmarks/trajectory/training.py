"""The trainings whose paths are drawn: a small slimmable ResNet on handwritten digits, with and without labels."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimmable
from benchmarks.importance.run import IMAGE_SIZE
from benchmarks.trajectory.plane import vector_of
from slimmable.losses import nt_xent, nt_xent_logits
from slimmable.training import GradientDiagnostics

WIDTHS = (1.0, 0.75, 0.5, 0.25)
BATCH = 128
LEARNING_RATE = 0.05
TEMPERATURE = 0.2


@dataclass(frozen=True)
class Way:
    """How a network is trained: with labels or by SimCLR, without or with the techniques of SlimCLR."""

    labels: bool
    techniques: bool

    def recipe(self, model: nn.Module) -> slimmable.SlimRecipe:
        """Return the recipe of a training in this way."""
        if not self.techniques:
            return slimmable.SlimRecipe(model, loss_weights="ones")
        return slimmable.SlimRecipe(model, distill=slimmable.OnlineDistillation(), slow_start=0.5)

    def loss(self, model: nn.Module, views: tuple[Tensor, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and what distillation compares."""
        if self.labels:
            scores = model(views[0])
            return F.cross_entropy(scores, labels), scores
        z0, z1 = model(views[0]), model(views[1])
        return nt_xent(z0, z1, TEMPERATURE), nt_xent_logits(z0, z1)


WAYS = {
    "supervised": Way(labels=True, techniques=False),
    "SimCLR": Way(labels=False, techniques=False),
    "SimCLR, three techniques": Way(labels=False, techniques=True),
}


def view(images: Tensor) -> Tensor:
    """Return each image turned by up to 20 degrees, scaled, moved, with another contrast and with noise."""

    def draw(reach: float) -> Tensor:
        return torch.empty(len(images)).uniform_(-reach, reach)

    angle, size = draw(0.35), 1 + draw(0.25)
    turn = torch.stack([angle.cos() * size, -angle.sin() * size, angle.sin() * size, angle.cos() * size], 1)
    place = torch.cat([turn.view(-1, 2, 2), torch.stack([draw(0.2), draw(0.2)], 1).unsqueeze(2)], 2)
    grid = F.affine_grid(place, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    return moved * (1 + draw(0.4)).view(-1, 1, 1, 1) + 0.1 * torch.randn_like(moved)


def create() -> nn.Module:
    """Return a small ResNet with a head of two layers, to class scores or an embedding of ten numbers either way."""
    backbone = timm.create_model("test_resnet", in_chans=1, num_classes=0)
    features = backbone.num_features
    model = nn.Sequential(backbone, nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 10))
    return slimmable.slimify(model, WIDTHS, example_inputs=torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE))


@dataclass(frozen=True)
class Run:
    """A trained model, width -> snapshots of shape (snapshots, parameters), and what its gradients were like."""

    model: nn.Module
    snapshots: dict[float, Tensor]
    diagnostics: GradientDiagnostics


def train(way: Way, images: Tensor, labels: Tensor, steps: int, every: int) -> Run:
    """Train with SGD and a cosine schedule; keep the parameters and sample the gradients every few steps."""
    torch.manual_seed(0)
    model = create().train()
    recipe, diagnostics = way.recipe(model), GradientDiagnostics(model, every)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    snapshots = {width: [vector_of(slimmable.extract(model, width))] for width in WIDTHS}
    for step in range(steps):
        batch = torch.randperm(len(images))[:BATCH]
        views = (view(images[batch]), view(images[batch]))
        optimizer.zero_grad()
        for width in recipe.widths(step / steps):
            loss, teach = way.loss(model, views, labels[batch])
            recipe.loss(loss, teach=teach).backward()
            diagnostics.after_backward(width)
        diagnostics.after_step()
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0:
            for width in WIDTHS:
                snapshots[width].append(vector_of(slimmable.extract(model, width)))
    return Run(model, {width: torch.stack(found) for width, found in snapshots.items()}, diagnostics)
