"""A small slimmable network, trained on Fashion-MNIST or on the cluttered digits, and the images held out from it."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import slimmable
from slimmable.cli.data import cluttered_digits

WIDTHS = (1.0, 0.75, 0.5, 0.25)
HELD_OUT = 5000  # images that no network is trained on, from which thresholds are chosen
Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Images in [0, 1] of shape (images, 1, size, size), with class numbers from 0 to 9, in three parts."""

    train: Labelled
    held_out: Labelled
    test: Labelled


def fashion(folder: Path, seed: int, most: int | None = None) -> Data:
    """Read the four published files of Fashion-MNIST; `seed` chooses the images that are held out."""
    train, test = (tuple(read(folder / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
                   for part in ("train", "t10k"))  # fmt: skip
    images, labels = train
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:][:most]
    return Data((images[rest], labels[rest]), (images[held_out], labels[held_out]), (test[0], test[1]))


def read(path: Path) -> Tensor:
    """Read a file in MNIST's format: images as floats in [0, 1] with an axis for the channel, or labels."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, 4)
    numbers = torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())
    return numbers[:, None].float() / 255 if axes == 3 else numbers.long()


def digits(count: int, seed: int) -> Data:
    """Draw the cluttered digits of the library, three parts that share no digit between training and the others."""
    images = cluttered_digits(count, count, seed=seed)
    every = {part: torch.stack([numbers[index] for index in range(len(numbers))]).float()
             for part, numbers in (("train", images.train), ("test", images.test))}  # fmt: skip
    half = count // 2
    held_out, test = images.test_labels[:half], images.test_labels[half:]
    return Data((every["train"], images.train_labels), (every["test"][:half], held_out), (every["test"][half:], test))


def network(example: Tensor) -> nn.Module:
    """Return an untrained network of four convolutions and a classifier, at four widths."""
    return slimmable.slimify(plain_network(), WIDTHS, example_inputs=example)


def plain_network() -> nn.Module:
    """Return the same before its conversion."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 1), (64, 128, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def train(data: Data, seed: int, epochs: int, batch_size: int = 128) -> nn.Module:
    """Train all widths, the narrow ones with the widest's scores as their teacher."""
    torch.manual_seed(seed)
    images, labels = data.train
    model, steps = network(images[:2]), epochs * (len(labels) // batch_size)
    recipe = slimmable.SlimRecipe(model, steps=steps, distill=slimmable.OnlineDistillation())
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels))[: len(labels) // batch_size * batch_size].split(batch_size):
            x, y = images[rows], labels[rows]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            optimizer.zero_grad()
            scores = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: B023, E731 -- called at once
            recipe.backward(scores)
            optimizer.step()
            schedule.step()
    return model.eval()
