"""What the page on timm's train.py replaces in it: the same names, called with the same arguments, no more."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import nn


def main() -> None:
    args = Namespace(model="resnet10t", epochs=2, num_classes=10, cooldown=1)
    model = create_model(args.model, pretrained=False, in_chans=3, num_classes=args.num_classes, drop_rate=0.0)
    task = ClassificationTask(
        model=model, criterion=nn.CrossEntropyLoss(), device=torch.device("cpu"), dtype=None, verbose=True
    )
    model = task.get_trainable_module()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05)
    loader = [(torch.rand(8, 3, 32, 32), torch.randint(10, (8,)))]
    for epoch in range(args.epochs + args.cooldown):
        train_one_epoch(epoch, model, loader, optimizer, args, task=task, device=torch.device("cpu"))


def train_one_epoch(
    epoch: int, model: nn.Module, loader: Any, optimizer: Any, args: Namespace, task: Any = None, device: Any = None
) -> None:
    for images, labels in loader:
        loss = task(images, labels)["loss"]
        loss /= 1  # in place, as with steps of gradient accumulation
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
