"""Small methods of every kind, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import timm
import torch
from torch import Tensor, nn

import slimmable
from slimmable import methods

WIDTHS = (1.0, 0.5, 0.25)
DIM, HIDDEN, CLASSES, FEATURES = 16, 32, 4, 96
LOCAL = 3  # crops of half the size, after two views


def encoder(projector: nn.Module, widths: tuple[float, ...] = WIDTHS, universal: bool = False) -> nn.Module:
    plain = methods.Encoder(timm.create_model("test_resnet", num_classes=0), projector).double()
    example = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    return slimmable.slimify(plain, widths, example_inputs=example, universal=universal)


def predictor(plain: nn.Module) -> nn.Module:
    return slimmable.slimify(plain.double(), WIDTHS, example_inputs=torch.zeros(2, DIM, dtype=torch.float64))


def teacher(num_classes: int) -> nn.Module:
    """A network of another family, whose features have another size, and which would drop units in training mode."""
    plain = timm.create_model("test_vit", img_size=32, num_classes=num_classes, drop_rate=0.5)
    return plain.double().train()


def distillation_of_features(kind: Literal["mse", "cosine"]) -> methods.Distillation:
    plain = teacher(0)
    return methods.Distillation(encoder(methods.Distillation.projector(FEATURES, plain.num_features)), plain, kind=kind)


MAKE: dict[str, Callable[[], methods.Method]] = {
    "simclr": lambda: methods.SimCLR(encoder(methods.SimCLR.projector(FEATURES, HIDDEN, DIM))),
    "mocov2": lambda: methods.MoCoV2(
        encoder(methods.MoCoV2.projector(FEATURES, HIDDEN, DIM)), proj_dim=DIM, queue_size=32, momentum=0.9, bn_splits=4
    ),
    "mocov3": lambda: methods.MoCoV3(
        encoder(methods.MoCoV3.projector(FEATURES, HIDDEN, DIM)), predictor(methods.MoCoV3.predictor(HIDDEN, DIM))
    ),
    "byol": lambda: methods.BYOL(
        encoder(methods.BYOL.projector(FEATURES, HIDDEN, DIM)), predictor(methods.BYOL.predictor(HIDDEN, DIM))
    ),
    "vicreg": lambda: methods.VICReg(encoder(methods.VICReg.projector(FEATURES, HIDDEN, DIM))),
    "simsiam": lambda: methods.SimSiam(
        encoder(methods.SimSiam.projector(FEATURES, HIDDEN, DIM)), predictor(methods.SimSiam.predictor(HIDDEN, DIM))
    ),
    "barlowtwins": lambda: methods.BarlowTwins(encoder(methods.BarlowTwins.projector(FEATURES, HIDDEN, DIM))),
    "dino": lambda: methods.DINO(
        encoder(methods.DINO.projector(FEATURES, HIDDEN, DIM)), proj_dim=DIM, local_crops=LOCAL
    ),
    "supervised": lambda: methods.Supervised(encoder(methods.Supervised.projector(FEATURES, CLASSES))),
    "scores": lambda: methods.Distillation(
        encoder(methods.Distillation.projector(FEATURES, CLASSES)), teacher(CLASSES), temperature=2.0
    ),
    "mse": lambda: distillation_of_features("mse"),
    "cosine": lambda: distillation_of_features("cosine"),
}


def make(name: str) -> methods.Method:
    """Return the method with weights that are always the same."""
    torch.manual_seed(0)
    return MAKE[name]().double().train()


def batch_of(method: methods.Method, seed: int = 0, share: slice = slice(None)) -> methods.Batch:
    """Return eight images in as many views as the method takes, or a share of them; those after two are smaller."""
    generator = torch.Generator().manual_seed(seed)
    views: list[Tensor] = [
        torch.randn(8, 3, size, size, generator=generator, dtype=torch.float64)[share]
        for size in (32, 32, *[16] * LOCAL)[: method.views]
    ]
    return methods.Batch(views, (torch.arange(8) % CLASSES)[share])


def recipe_of(method: methods.Method, slow_start: float = 0.5) -> slimmable.SlimRecipe:
    return slimmable.SlimRecipe(method.online, distill=method.distillation(), slow_start=slow_start)


def gradients_of(method: methods.Method) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in method.named_parameters()}


def own_views(method: methods.Method, share: slice = slice(None)) -> methods.Batch:
    """Return a batch whose narrower widths see other views."""
    whole, *others = (batch_of(method, seed, share) for seed in range(len(WIDTHS)))
    narrow = {width: each.views for width, each in zip(WIDTHS[1:], others, strict=True)}
    return methods.Batch(whole.views, whole.labels, narrow=narrow)
