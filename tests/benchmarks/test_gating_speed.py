"""The benchmarks of gating in time run, and what they time computes what it stands for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slimmable
from benchmarks.gating.sorted import ANY, grouped, masked_run, sorted_run
from benchmarks.gating.speed import WAYS, call, gated
from slimmable._small_resnet import small_resnet

ROOT = Path(__file__).parents[2]


def quick(module, out):
    command = [sys.executable, "-m", f"benchmarks.gating.{module}", "--quick", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    [path] = out.glob("*.json") if module != "speed" else sorted(out.glob("resnet10t--as_it_is-*.json"))
    return json.loads(path.read_text()), (out / "table.md").read_text()


def test_the_speed_of_static_networks_is_measured(tmp_path):
    result, table = quick("speed", tmp_path)
    assert [row["round_to"] for row in result["rows"]] == [1, 8]
    for row in result["rows"]:
        assert 0.45 < row["macs_saving"] < 0.55
        assert row["quotient"] == pytest.approx((1 - row["ratio"]) / row["macs_saving"], abs=1e-3)
        assert row["quotient_low"] <= row["quotient"] <= row["quotient_high"]
    assert table.count("| resnet10t |") == 3
    assert "budget 0.5, round_to 8" in table


def test_the_causes_are_measured(tmp_path):
    result, table = quick("causes", tmp_path)
    found = {(row["way"], row["kind"]): (row["dense_ms"], row["static_ms"]) for row in result["rows"]}
    assert len(found) == 8
    assert min(found["as it is", "convolutions"]) > 0
    assert min(found["as it is", "max pooling"]) > 0
    assert table.count("| resnet10t |") == 2


@pytest.mark.slow
def test_sorted_batches_are_measured(tmp_path):
    result, table = quick("sorted", tmp_path)
    patterns, masked, *groups = result["rows"]
    assert max(patterns["gates"].values()) <= patterns["all"] <= patterns["images"] == 64
    assert [row["way"] for row in groups] == ["1 group", "2 groups", "4 groups", "8 groups"]
    assert all(
        row["share"] > masked["share"] - 0.02 for row in groups
    )  # less, by the gates, than the mean of the masks
    assert table.count("| 16 |") == 5


@pytest.mark.parametrize("way", [way for way in WAYS if way != "compiled"])
def test_a_treated_network_computes_the_same(way):
    torch.manual_seed(0)
    dense, _ = gated("resnet10t", 32)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(call(dense, images, way)(), dense(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the gates of this")
def test_groups_of_one_image_compute_what_the_masks_do():
    torch.manual_seed(0)
    images = torch.randn(6, 3, 16, 16)
    model = slimmable.gating.gate(small_resnet(in_chans=3, channels=(8, 16, 16, 16)), example_inputs=images).eval()
    members = list(torch.tensor([4, 1, 0, 5, 3, 2]).split(1))
    networks = [
        slimmable.gating.extract_gated(model, [images[own]], keep=ANY, recalibrate=False).eval() for own in members
    ]
    torch.testing.assert_close(
        sorted_run(networks, members, images)(), masked_run(model, images)(), rtol=1e-4, atol=1e-5
    )


def test_groups_hold_each_image_once_and_like_ones_together():
    torch.manual_seed(0)
    kinds = torch.tensor([0, 1, 1, 0, 1])
    masks = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])[kinds]
    for groups in (1, 2, 5):
        members = grouped(masks, groups)
        assert torch.cat(members).sort().values.tolist() == [0, 1, 2, 3, 4]
    assert all(len(kinds[own].unique()) == 1 for own in grouped(masks, 5))
