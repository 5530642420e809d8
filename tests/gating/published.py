"""The published network of the golden data, written as plain torch: no gate and no second norm in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slimmable

GOLDEN = Path(__file__).parents[1] / "golden"


class Block(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class Network(nn.Module):
    def __init__(self, planes: Sequence[int] = (8, 16, 32, 64), *, small_images: bool = True) -> None:
        super().__init__()
        stem = (3, 1, 2) if small_images else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, planes[0], *stem, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.pool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1)
        for number, (before, after) in enumerate(zip((planes[0], *planes), planes, strict=False), 1):
            layer = nn.Sequential(Block(before, after, 1 if number == 1 else 2), Block(after, after, 1))
            self.add_module(f"layer{number}", layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return x.mean((2, 3))


BLOCKS = [f"layer{layer}.{block}" for layer in range(1, 5) for block in range(2)]


def manifest() -> dict:
    return json.loads((GOLDEN / "gating.json").read_text())


def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "gating.safetensors")


def our_name(name: str) -> str:
    """The name that a parameter of the published network has in ours, for the variant with separate norms."""
    parts = {"atten_c.0": "reduce", "atten_c.1": "norm", "atten_c.3": "expand"}
    for theirs, ours in parts.items():
        name = name.replace(f"mask_c.{theirs}", f"conv1.channel_gate.at.0.{ours}")
    return name.replace("_t.", ".").replace("_s.", ".gated.0.")


def network(golden: dict[str, Tensor], *, separate_norms: bool) -> nn.Module:
    """Our gated network with the published weights; shared norms take those of the gated pass."""
    plain = Network().double()
    model = slimmable.gating.gate(
        plain,
        example_inputs=golden["net/x1"].double(),
        separate_norms=separate_norms,
        temperature=0.66667,
        open_at_zero=True,
        bias=False,
        inplace=True,
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("threshold")}
    for name, tensor in golden.items():
        name = name.removeprefix("net/sd/") if name.startswith("net/sd/") else ""
        if not name or (not separate_norms and "_t." in name):
            continue
        ours = our_name(name if separate_norms else name.replace("_s.", "."))
        state[ours] = tensor[:, :, 0, 0] if "mask_c" in name and tensor.ndim == 4 else tensor
    model.load_state_dict(state)
    return model
