"""SimCLR and MoCo v2+ on a small backbone, called by Lightning and calling themselves as the methods of solo-learn do.

That is: a method builds its networks in `__init__`, and `forward` gives a dict. The `training_step` of the base classes
runs `forward` once per view and gives a dict of lists, that of the method gives the loss. Networks with a momentum are
updated in pairs after the step, and the queue is a buffer of the method itself.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional


def _backbone() -> nn.Module:
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    return nn.Sequential(block(3, 32), block(32, 64), block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _projector(cfg: Any) -> nn.Module:
    hidden, output = cfg.method_kwargs.proj_hidden_dim, cfg.method_kwargs.proj_output_dim
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, output))


class BaseMethod(LightningModule):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = _backbone()
        self.classifier = nn.Linear(64, cfg.data.num_classes)

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        classifier = {"params": self.classifier.parameters(), "lr": self.cfg.optimizer.classifier_lr}
        return [{"params": self.backbone.parameters()}, classifier]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.learnable_params, lr=self.cfg.optimizer.lr)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        return {"logits": self.classifier(features.detach()), "feats": features}

    def training_step(self, batch: list[Any], batch_idx: int) -> dict[str, Any]:
        _, views, targets = batch
        outputs = [self(view) for view in views]
        outs: dict[str, Any] = {key: [output[key] for output in outputs] for key in outputs[0]}
        losses = [functional.cross_entropy(logits, targets) for logits in outs["logits"]]
        outs["loss"] = sum(losses) / len(losses)
        self.log_dict({"train_class_loss": outs["loss"]}, on_epoch=True)
        return outs


class SimCLR(BaseMethod):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.projector = _projector(cfg)

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        return [*super().learnable_params, {"params": self.projector.parameters()}]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        out = super().forward(images)
        return {**out, "z": self.projector(out["feats"])}

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        out = super().training_step(batch, batch_idx)
        z = functional.normalize(torch.cat(out["z"]), dim=1)
        cosines = (z @ z.T).fill_diagonal_(-torch.inf) / self.cfg.method_kwargs.temperature
        loss = functional.cross_entropy(cosines, torch.arange(len(z)).roll(len(z) // 2))
        self.log("train_nce_loss", loss, on_epoch=True)
        return loss + out["loss"]


class BaseMomentumMethod(BaseMethod):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.momentum_backbone = _backbone()
        _start_equal(self.backbone, self.momentum_backbone)

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.backbone, self.momentum_backbone)]

    @torch.no_grad()
    def momentum_forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"feats": self.momentum_backbone(images)}

    def training_step(self, batch: list[Any], batch_idx: int) -> dict[str, Any]:
        outs = super().training_step(batch, batch_idx)
        momentum = [self.momentum_forward(view) for view in batch[1]]
        return {**outs, **{f"momentum_{key}": [output[key] for output in momentum] for key in momentum[0]}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for online, momentum in self.momentum_pairs:
            for new, old in zip(online.parameters(), momentum.parameters(), strict=False):
                old.data = 0.99 * old.data + 0.01 * new.data


class MoCoV2Plus(BaseMomentumMethod):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.projector, self.momentum_projector = _projector(cfg), _projector(cfg)
        _start_equal(self.projector, self.momentum_projector)
        size = (2, cfg.method_kwargs.proj_output_dim, cfg.method_kwargs.queue_size)
        self.register_buffer("queue", functional.normalize(torch.randn(size), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        return [*super().learnable_params, {"params": self.projector.parameters()}]

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [*super().momentum_pairs, (self.projector, self.momentum_projector)]

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        start = int(self.queue_ptr)
        self.queue[:, :, start : start + keys.shape[1]] = keys.permute(0, 2, 1)
        self.queue_ptr[0] = (start + keys.shape[1]) % self.queue.shape[2]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        out = super().forward(images)
        return {**out, "z": functional.normalize(self.projector(out["feats"]), dim=-1)}

    @torch.no_grad()
    def momentum_forward(self, images: Tensor) -> dict[str, Tensor]:
        out = super().momentum_forward(images)
        return {**out, "z": functional.normalize(self.momentum_projector(out["feats"]), dim=-1)}

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        out = super().training_step(batch, batch_idx)
        (q0, q1), (k0, k1), queue = out["z"], out["momentum_z"], self.queue.clone()
        losses = [self._loss(q0, k1, queue[1]), self._loss(q1, k0, queue[0])]
        self._dequeue_and_enqueue(torch.stack((k0, k1)))
        return sum(losses) / 2 + out["loss"]

    def _loss(self, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], dim=1)
        return functional.cross_entropy(
            logits / self.cfg.method_kwargs.temperature, torch.zeros(len(query), dtype=torch.long)
        )


def _start_equal(online: nn.Module, momentum: nn.Module) -> None:
    for new, old in zip(online.parameters(), momentum.parameters(), strict=True):
        old.data.copy_(new.data)
        old.requires_grad = False


METHODS = {"simclr": SimCLR, "mocov2plus": MoCoV2Plus}
