"""`extract` of a run, `profile` and `plan`, and what the program says about itself."""

import json
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
from slimmable.cli.run import new_method

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


def test_profile_of_a_batch_is_written_as_json(tmp_path, capsys):
    rows = {}
    for batch in (1, 4):
        path = tmp_path / f"{batch}.json"
        assert main(["profile", "test_resnet", "--image-size", "32", "--batch", str(batch), "--json", str(path)]) == 0
        rows[batch] = json.loads(path.read_text())["rows"]
    assert [row["macs"] for row in rows[4]] == [4 * row["macs"] for row in rows[1]]
    assert "latency" in capsys.readouterr().out


def test_profile_in_onnxruntime_has_its_latencies(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    made, session = [], runtime.InferenceSession

    def noted(path, options=None, **more):
        made.append(options)
        return session(path, options, **more)

    monkeypatch.setattr(runtime, "InferenceSession", noted)
    path = tmp_path / "costs.json"
    options = ["--image-size", "32", "--runtime", "onnx", "--threads", "1", "--json", str(path)]
    assert main(["profile", "test_resnet", "--widths", "1", "0.5", *options]) == 0
    assert [row["latency_ms"] > 0 for row in json.loads(path.read_text())["rows"]] == [True, True]
    assert [each.intra_op_num_threads for each in made if isinstance(each, runtime.SessionOptions)][-1] == 1


def test_plan_as_json_is_the_plan(tmp_path):
    path = tmp_path / "plan.json"
    assert main(["plan", "test_resnet", "--widths", "1", "0.5", "--json", str(path)]) == 0
    assert json.loads(path.read_text()) == slimmable.plan(timm.create_model("test_resnet"), (1.0, 0.5)).to_dict()


def test_units_are_multiples(tmp_path):
    path = tmp_path / "plan.json"
    assert main(["plan", "test_resnet", "--widths", "1", "0.3", "--round-to", "8", "--json", str(path)]) == 0
    groups = json.loads(path.read_text())["groups"]
    assert all(kept % 8 == 0 for group in groups for kept in group["kept"])


@pytest.mark.parametrize(("limits", "width"), [(("--budget", "0.3"), 0.5), (("--latency", "1e6"), 1.0)])
def test_export_writes_the_widest_width_that_keeps_to_a_limit(tmp_path, limits, width):
    options = ["--image-size", "32", "--format", "safetensors", "--output", str(tmp_path)]
    assert main(["export", "test_resnet", *limits, *options]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"width-{width}.safetensors", "README.md"}


def test_a_limit_that_no_width_keeps_to_is_refused(tmp_path, capsys):
    options = ["--budget", "0.5", "--latency", "1e-9", "--output", str(tmp_path / "out")]
    assert main(["export", "test_resnet", *options]) == 2
    assert "is too little: the narrowest width 0.25 costs 0.068 of the MACs and " in capsys.readouterr().err
    assert main(["export", "test_resnet", "--budget", "0.5", "--width", "0.5"]) == 2
    assert "each say what to write; give one of them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    trained = slimmable.extract(new_method(config, 1, 10).backbone, 0.7)
    assert [len(stage[0].conv1.weight) for stage in (trained.layer1, trained.layer2, trained.layer3)] == list(kept)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("pretrain", "evaluate", "export", "profile", "plan"))
