"""`extract` of a run, `profile` and `plan`, and what the program says about itself."""

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

import slimmable
from slimmable.__main__ import main
from slimmable._small_resnet import small_resnet
from slimmable.cli.config import PretrainConfig
from slimmable.cli.run import converted_backbone

LOAD = """
import sys, torch
sys.modules["slimmable"] = None  # importing it would fail
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(1))


def features(run, width, images):
    example = torch.zeros(2, 1, 24, 24)
    small = slimmable.extract(slimmable.slimify(small_resnet(in_chans=1), (1.0, 0.5), example_inputs=example), width)
    small.load_state_dict(load_file(run / f"width-{width}.safetensors"))
    with torch.no_grad():
        return small.eval()(images)


def test_program_runs_without_slimmable(run, tmp_path, images):
    assert main(["export", str(run), "--width", "0.5", "--format", "pt2", "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"width-0.5.pt2", "README.md"}
    torch.save(images, tmp_path / "in.pt")
    files = [str(tmp_path / name) for name in ("width-0.5.pt2", "in.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), features(run, 0.5, images))


def test_onnx_program(run, tmp_path, images):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert main(["export", str(run), "--width", "1", "--format", "onnx", "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"width-1.0.onnx", "README.md"}
    session = runtime.InferenceSession(tmp_path / "width-1.0.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), features(run, 1.0, images), rtol=1e-4, atol=1e-5)


def test_profile_prints_and_writes_the_table(tmp_path, capsys):
    path = tmp_path / "costs.csv"
    options = ["--widths", "1", "0.5", "--image-size", "32", "--csv", str(path)]
    assert main(["profile", "resnet10t", *options]) == 0
    assert "MACs" in capsys.readouterr().out
    header, full, half = path.read_text().splitlines()
    assert header.startswith("width,parameters,macs")
    assert full.startswith("1.0,")
    assert half.startswith("0.5,")
    assert int(half.split(",")[2]) < 0.34 * int(full.split(",")[2])


def test_plan_prints_what_is_pinned(capsys):
    assert main(["plan", "resnet10t", "--widths", "1", "0.5"]) == 0
    output = capsys.readouterr().out
    assert "kept at 1.0, 0.5" in output
    assert "fc.weight[0]" in output


def test_plan_and_profile_take_saved_models(tmp_path, capsys):
    model = slimmable.slimify(timm.create_model("test_resnet", num_classes=3), (1.0, 0.3))
    slimmable.save(model, tmp_path / "model.safetensors")
    assert main(["plan", str(tmp_path / "model.safetensors")]) == 0
    assert capsys.readouterr().out.rstrip() == str(slimmable.plan(model))
    assert main(["profile", str(tmp_path / "model.safetensors"), "--image-size", "32"]) == 0
    assert f"{slimmable.profile(model, (3, 32, 32), repeats=0).rows[1].macs:,}" in capsys.readouterr().out


@pytest.mark.parametrize(("rounding", "kept"), [("nearest", (45, 90, 179)), ("floor", (44, 89, 179))])
def test_every_command_keeps_the_units_of_its_rounding(rounding, kept, tmp_path, capsys):
    options = ["--widths", "1", "0.7", "--rounding", rounding]
    assert main(["plan", "resnet10t", *options]) == 0
    printed = capsys.readouterr().out
    assert all(f"{full}, {count} " in printed for full, count in zip((64, 128, 256), kept, strict=True))
    assert main(["profile", "resnet10t", *options, "--image-size", "32", "--csv", str(tmp_path / "costs.csv")]) == 0
    model = slimmable.slimify(timm.create_model("resnet10t"), (1.0, 0.7), rounding=rounding)
    parameters = (tmp_path / "costs.csv").read_text().splitlines()[2].split(",")[1]
    assert int(parameters) == sum(each.numel() for each in slimmable.extract(model, 0.7).parameters())
    exported = ["export", "resnet10t", "--width", "0.7", "--format", "safetensors", "--image-size", "32"]
    assert main([*exported, *options, "--output", str(tmp_path / "files")]) == 0
    (written,) = (tmp_path / "files").glob("*.safetensors")
    assert len(load_file(written)["layer2.0.conv1.weight"]) == kept[1]
    config = PretrainConfig(model="resnet10t", widths=(1.0, 0.7), rounding=rounding)
    trained = slimmable.extract(converted_backbone(config, 1), 0.7)
    assert [len(stage[0].conv1.weight) for stage in (trained.layer1, trained.layer2, trained.layer3)] == list(kept)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("pretrain", "evaluate", "export", "profile", "plan"))
