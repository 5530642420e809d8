"""Every family of timm leaves as a program: extracted, or straight from the slimmable model at its active width.

`benchmarks.export.run` does the same at all widths, and keeps what it found.
"""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import slimmable
from slimmable.deploy.onnx import save_onnx, to_onnx
from slimmable.deploy.programs import difference, save_pt2, trace
from tests.convert import oracles

SMALLEST = json.loads((Path(__file__).parents[1] / "convert" / "zoo.json").read_text())
SAMPLE = ("resnet",)
ONE_IMAGE = ()


def made(name):
    torch.manual_seed(0)
    model = oracles.randomise(timm.create_model(name).eval())
    return model, torch.rand(3, *model.pretrained_cfg["input_size"])


def check(small, images, folder, any_batch=True):
    program = trace(small, images[:2])
    assert bool(program.range_constraints) == any_batch
    files = folder / "program.pt2", folder / "program.onnx"
    for written in (save_pt2(program, files[0]), save_onnx(to_onnx(program), files[1])):
        for batch in (images[:1], images) if any_batch else (images[:1],):
            assert difference(small, written, batch) <= 1e-5


@pytest.mark.parametrize(
    "module", [pytest.param(module, marks=() if module in SAMPLE else pytest.mark.slow) for module in SMALLEST]
)
def test_every_family_runs_as_a_program(module, tmp_path):
    pytest.importorskip("onnxruntime")
    model, images = made(SMALLEST[module])
    small = slimmable.extract(slimmable.slimify(model), 0.25)
    check(small, images, tmp_path, any_batch=module not in ONE_IMAGE)


class FiveAxes(nn.Module):
    """Attention within two windows, as hiera has it."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.proj = 4, nn.Linear(6, 3 * 32), nn.Linear(32, 5)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], 2, 3, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3).mean((1, 2)))


def beit():
    return timm.create_model("beit_base_patch16_224", depth=1, embed_dim=64, num_heads=4, img_size=32).eval()


@pytest.mark.parametrize(("make", "shape"), [(beit, (3, 32, 32)), (FiveAxes, (6, 6))])
def test_attention_that_torch_does_not_translate_by_itself(tmp_path, make, shape):
    """With a mask it needs gradients off, with five axes another form."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    inputs = torch.rand(3, *shape)
    slim = slimmable.slimify(oracles.randomise(make()), (1.0, 0.5), example_inputs=inputs)
    check(slimmable.extract(slim, 0.5), inputs, tmp_path)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "name", ["test_resnet", *(pytest.param(f"test_{name}", marks=pytest.mark.slow) for name in ("vit", "convnext"))]
)
def test_the_slimmable_model_itself_is_a_program_at_its_active_width(name, strict):
    model, images = made(name)
    slim = slimmable.slimify(model, (1.0, 0.5))
    batch = torch.export.Dim("batch")
    slimmable.set_width(slim, 0.5)
    with torch.no_grad():
        program = torch.export.export(slim, (images[:2],), dynamic_shapes=({0: batch},), strict=strict).module()
        slimmable.set_width(slim, 1.0)  # the program stays at its own
        assert oracles.difference(program(images), slimmable.extract(slim, 0.5)(images)) <= 1e-5
