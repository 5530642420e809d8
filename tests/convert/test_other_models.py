"""A sample of the models outside timm: every oracle, outputs' sizes and multiply-adds; see docs/other-models.md.

Entries of libraries that are not installed are skipped.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import slimmable

SAMPLE = {
    "hugging_face": (
        "BertModel", "Dinov2Backbone", "BeitForImageClassification", "CLIPModel",
        "MambaForCausalLM", "Wav2Vec2ForCTC", "VideoMAEForVideoClassification",
    ),
    "generators": ("DiTTransformer2DModel",),
    "segmentation": ("FPN",),
    "graphs": ("GIN",),
    "einops_style": ("vit", "xcit", "a Restormer", "a Perceiver"),
    "vision": ("lraspp_mobilenet_v3_large", "squeezenet1_1"),
}  # fmt: skip
NEEDS = {
    "hugging_face": "transformers", "generators": "diffusers", "segmentation": "segmentation_models_pytorch",
    "graphs": "torch_geometric", "einops_style": "vit_pytorch", "vision": "torchvision",
}  # fmt: skip


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in SAMPLE for name in SAMPLE[library]])
def test_everything_holds(library, name):
    pytest.importorskip(NEEDS[library])
    from benchmarks.other_models import measure, table

    entries = import_module(f"benchmarks.other_models.{library}").entries()
    entry = next(entry for entry in entries if entry.name == name)
    record = {"name": entry.key, "error": "", **measure.measure(entry)}
    assert list(table.faults(record)) == []


def test_a_detector_runs_at_every_width_once_its_dense_part_is_converted():
    """A narrow detector is the extracted one, up to the boxes that it chooses."""
    from torchvision import models

    from benchmarks.other_models.vision import Dense

    torch.manual_seed(0)
    detector = models.get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=3)
    images = torch.rand(2, 3, 320, 320)
    dense = Dense(detector.eval())
    with torch.no_grad():
        whole = detector(list(images))
        slimmable.slimify(dense, (1.0, 0.5), example_inputs=images, inplace=True)
        assert torch.equal(detector(list(images))[0]["scores"], whole[0]["scores"])
        with slimmable.at_width(dense, 0.5):
            narrow = detector(list(images))
        small = slimmable.extract(dense, 0.5).detector
        assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(p.numel() for p in detector.parameters())
        for found, expected in zip(small(list(images)), narrow, strict=True):
            assert found.keys() == expected.keys()
            assert torch.equal(found["labels"], expected["labels"])
            torch.testing.assert_close(found["boxes"], expected["boxes"])
