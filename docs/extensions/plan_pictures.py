"""Draw the plans of the gallery into `docs/images`: PYTHONPATH=. python docs/extensions/plan_pictures.py."""

from pathlib import Path

import slimmable
import timm
import torch
from timm.models.resnet import BasicBlock
from torch import nn

IMAGES = Path(__file__).parents[1] / "images"


class UNet(nn.Module):
    """Two levels, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.decode = nn.Conv2d(32, 16, 3, padding=1)
        self.mask = nn.Conv2d(16, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return a mask of the images' size."""
        wide = self.encode(images).relu()
        deep = self.middle(self.down(wide).relu()).relu()
        return self.mask(self.decode(torch.cat([wide, self.up(deep)], 1)).relu())


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Return name -> a network and images for it."""
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2), nn.BatchNorm2d(32))
    blocks = [nn.Conv2d(3, 16, 3), BasicBlock(16, 16), BasicBlock(16, 32, stride=2, downsample=shortcut)]
    resnet = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    vit = timm.create_model("test_vit", depth=2, num_classes=10)
    return {
        "resnet": (resnet, torch.zeros(2, 3, 32, 32)),
        "vit": (vit, torch.zeros(2, 3, 160, 160)),
        "unet": (UNet(), torch.zeros(2, 3, 32, 32)),
    }


def main() -> None:
    """Write a picture of each plan."""
    for name, (network, images) in networks().items():
        slimmable.plan(network, (1.0, 0.5), example_inputs=images).plot().savefig(IMAGES / f"plan-{name}.png", dpi=110)


if __name__ == "__main__":
    main()
