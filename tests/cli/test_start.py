"""What a run starts from: `--init`, `--teacher`, and models that timm reads from a folder or the Hub."""

import json
import shutil

import pytest
import safetensors.torch
import timm
import torch

import slimmable
from slimmable.__main__ import main
from slimmable.cli.config import configure
from slimmable.cli.run import (
    CLASSIFIER,
    load_checkpoint,
    make_teacher,
    new_method,
    read_config,
    read_start,
    trained_method,
)
from slimmable.errors import CheckpointError, SlimmableError, UsageError

IMAGE = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
FILES = ("model.safetensors", "model.pth", "plain of slimmable.save", "local-dir")


def plain(classes=7, seed=3):
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=classes)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape))
    return model.eval()


def config(**given):
    return configure({"method": "supervised", "model": "test_resnet", "image_size": 64, "widths": (1.0, 0.5), **given})


def started(settings, channels=3, classes=7):
    return new_method(settings, channels, classes, read_start(settings, channels)).eval()


def folder_of(model, path, **more):
    """Make a folder that timm reads as `local-dir:`."""
    path.mkdir()
    known = {
        "input_size": [3, 64, 64],
        "classifier": "fc",
        "first_conv": "conv1.0",
        "num_classes": model.num_classes,
        **more,
    }
    (path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": known} | known))
    safetensors.torch.save_file(model.state_dict(), path / "model.safetensors")
    return f"local-dir:{path}"


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """The folder of a supervised run at two widths."""
    folder = tmp_path_factory.mktemp("runs") / "supervised"
    options = ("--num-images", "64", "--batch-size", "16", "--epochs", "1", "--widths", "1", "0.5")
    line = ["pretrain", *options, "--method", "supervised", "--device", "cpu", "--workers", "0"]
    assert main([*line, "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("kind", FILES)
def test_the_full_width_computes_what_the_weights_of_a_plain_model_do(tmp_path, kind):
    model, path, name = plain(), tmp_path / kind, "test_resnet"
    if kind == "model.safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    elif kind == "model.pth":
        torch.save({"state_dict": {f"module.{key}": each for key, each in model.state_dict().items()}}, path)
    elif kind == "plain of slimmable.save":
        slimmable.save(model, path)
    else:
        name, path = folder_of(model, tmp_path / "folder"), "pretrained"
    method = started(config(model=name, init=str(path)))
    with torch.no_grad():
        torch.testing.assert_close(method.encoder(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)


def test_narrow_widths_keep_the_channels_with_the_largest_weights(tmp_path):
    model = plain()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    ordered = started(config(init=str(tmp_path / "w.pth")))
    same = started(config(init=str(tmp_path / "w.pth"), importance="none"))
    assert torch.equal(same.backbone.conv1[0].weight, model.conv1[0].weight)
    assert not torch.equal(ordered.backbone.conv1[0].weight, model.conv1[0].weight)
    expected = slimmable.slimify(model, (1.0, 0.5), example_inputs=IMAGE, importance="magnitude").eval()
    with torch.no_grad(), slimmable.at_width(expected, 0.5), slimmable.at_width(ordered, 0.5):
        torch.testing.assert_close(ordered.encoder(IMAGE), expected(IMAGE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_std", [None, 0.01])
@pytest.mark.parametrize("classes", [7, 5])
def test_a_classifier_stays_if_the_number_of_classes_fits(tmp_path, classes, head_std):
    model = plain()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    method = started(config(init=str(tmp_path / "w.pth"), importance="none", head_std=head_std), classes=classes)
    assert method.encoder.projector.weight.shape == (classes, 96)
    assert torch.equal(method.encoder.projector.weight, model.fc.weight) == (classes == 7)


def test_weights_of_a_slimmable_network_keep_what_each_width_learnt(supervised):
    own = read_config(supervised)
    assert own.init is None
    trained, _ = load_checkpoint(supervised / "checkpoint.safetensors")
    for source in (supervised, supervised / CLASSIFIER):
        settings = configure({"method": "supervised", "widths": (1.0, 0.5), "init": str(source), "seed": 1})
        method = started(settings, 1, 10)
        assert all(torch.equal(each, trained[name]) for name, each in method.encoder.state_dict().items())
    settings = configure({"method": "simclr", "widths": (1.0, 0.5), "init": str(supervised / "model.safetensors")})
    method = started(settings, 1, 10)
    assert all(torch.equal(e, trained[f"backbone.{n}"]) for n, e in method.backbone.state_dict().items())


def test_the_classifier_of_a_run_is_a_file_of_its_own(supervised):
    whole = slimmable.load(supervised / CLASSIFIER)
    assert slimmable.widths_of(whole) == (1.0, 0.5)
    method = trained_method(read_config(supervised), supervised, 1)
    images = torch.rand(3, 1, 24, 24)
    for width in (1.0, 0.5):
        with torch.no_grad(), slimmable.at_width(method, width):
            expected = method.encoder(images)
            torch.testing.assert_close(slimmable.extract(whole, width)(images), expected, rtol=1e-4, atol=1e-5)
    assert "own classifier" in (supervised / "metrics.md").read_text()


def test_weights_that_do_not_fit_are_refused(tmp_path, supervised):
    other = timm.create_model("test_vit", num_classes=7)
    torch.save(other.state_dict(), tmp_path / "vit.pth")
    narrow = {key: each for key, each in plain().state_dict().items() if not key.startswith("layer1.")}
    torch.save(narrow, tmp_path / "part.pth")
    broken = plain()
    broken.conv1[0].weight.data[0] = torch.nan
    torch.save(broken.state_dict(), tmp_path / "nan.pth")
    assert len(narrow) < len(plain().state_dict())
    for name in ("vit.pth", "part.pth"):
        with pytest.raises(CheckpointError, match=f"{name} belongs to another model or other widths"):
            started(config(init=str(tmp_path / name)))
    with pytest.raises(CheckpointError, match=r"infinite or NaN: conv1\.0\.weight"):
        started(config(init=str(tmp_path / "nan.pth")))
    with pytest.raises(CheckpointError, match="belongs to another model or other widths"):
        started(configure({"method": "supervised", "widths": (1.0, 0.25), "init": str(supervised)}), 1, 10)
    with pytest.raises(UsageError, match="neither pretrained, nor a file of weights, nor the folder of a run"):
        started(config(init=str(tmp_path / "missing")))
    with pytest.raises(UsageError, match="timm has no pretrained weights for small_resnet"):
        started(config(init="pretrained", model="small_resnet"))


def test_a_resumed_run_needs_its_start_no_more(tmp_path, supervised, capsys):
    source, folder = tmp_path / "source", tmp_path / "out"
    shutil.copytree(supervised, source)
    options = ["--num-images", "64", "--batch-size", "16", "--epochs", "1", "--widths", "1", "0.5", "--workers", "0"]
    line = ["pretrain", *options, "--method", "supervised", "--device", "cpu", "--output", str(folder)]
    assert main([*line, "--init", str(source)]) == 0
    assert f"starting from --init {source}, with its classifier" in capsys.readouterr().out
    assert read_config(folder).init == str(source)
    shutil.rmtree(source)
    assert main(["pretrain", "--output", str(folder), "--resume", "--device", "cpu"]) == 0
    assert main(["pretrain", "--output", str(folder), "--resume", "--init", "pretrained"]) == 2
    assert f"--init: the run has {source}, now pretrained" in capsys.readouterr().err


@pytest.mark.parametrize("teach", ["cosine", "scores"])
def test_teachers_are_networks_of_the_full_width(tmp_path, supervised, teach):
    method = trained_method(read_config(supervised), supervised, 1)
    images = torch.rand(3, 1, 24, 24)
    with torch.no_grad():
        expected = (method.backbone if teach == "cosine" else method.encoder)(images)
        for source in (supervised, supervised / CLASSIFIER):
            settings = configure({"method": "distillation", "teacher": str(source), "teach": teach})
            teacher = make_teacher(settings, 1).eval()
            torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)
            taught = new_method(settings, 1, 10, teacher=teacher)
            assert taught.teacher is teacher
            assert taught.kind == teach
    model = plain()
    settings = config(method="distillation", teacher=folder_of(model, tmp_path / "folder"), teach=teach)
    with torch.no_grad():
        expected = (
            model(IMAGE) if teach == "scores" else model.forward_head(model.forward_features(IMAGE), pre_logits=True)
        )
        torch.testing.assert_close(make_teacher(settings, 3).eval()(IMAGE), expected)


@pytest.mark.parametrize("teach", ["cosine", "mse"])
def test_a_network_taught_by_what_it_starts_from_begins_with_its_features(tmp_path, supervised, teach):
    """The linear map to the teacher's features changes nothing at first, whether units are moved or not."""
    name, run = folder_of(plain(), tmp_path / "folder"), str(supervised)
    how = {"method": "distillation", "teach": teach}
    of_run = configure({**how, "widths": (1.0, 0.5), "teacher": run, "init": run})
    of_timm = config(**how, model=name, teacher=name, init="pretrained")
    for settings, images in ((of_run, torch.rand(3, 1, 24, 24)), (of_timm, IMAGE)):
        channels = images.shape[1]
        teacher = make_teacher(settings, channels).eval()
        method = new_method(settings, channels, 10, read_start(settings, channels), teacher).eval()
        with torch.no_grad():
            torch.testing.assert_close(method.encoder(images), teacher(images), rtol=1e-4, atol=1e-5)


def test_teachers_that_cannot_teach(supervised):
    for given, message in (
        ({"teacher": "no_model"}, "timm has no model 'no_model'"),
        ({"teacher": str(supervised / "model.safetensors"), "teach": "scores"}, "has no classifier"),
        ({"teacher": "small_resnet"}, "timm has no pretrained weights for small_resnet"),
    ):
        with pytest.raises(SlimmableError, match=message):
            make_teacher(configure({"method": "distillation", **given}), 1)
    with pytest.raises(UsageError, match="only --method distillation needs a --teacher, got None for distillation"):
        configure({"method": "distillation"})
    with pytest.raises(UsageError, match="only --method distillation needs a --teacher, got test_resnet for simclr"):
        configure({"method": "simclr", "teacher": "test_resnet"})


def test_a_teacher_sees_images_with_its_own_mean_and_standard_deviation(tmp_path, supervised):
    """The student's images are (x - 0.2) / 0.4, those of the teacher (x - 0.5) / (0.5, 1, 2)."""
    model, name = plain(), folder_of(plain(), tmp_path / "folder", mean=[0.5] * 3, std=[0.5, 1.0, 2.0])
    given = {"method": "distillation", "teach": "scores", "data": str(tmp_path), "mean": (0.2,), "std": (0.4,)}
    teacher = make_teacher(config(**given, teacher=name), 3).eval()
    with torch.no_grad():
        expected = model((IMAGE - 0.5) / torch.tensor([0.5, 1.0, 2.0])[:, None, None])
        torch.testing.assert_close(teacher((IMAGE - 0.2) / 0.4), expected, rtol=1e-4, atol=1e-4)
        run = tmp_path / "run"
        shutil.copytree(supervised, run)
        settings = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(settings | {"mean": [0.1], "std": [0.5]}))
        teacher = make_teacher(configure({**given, "data": "digits", "teacher": str(run)}), 1).eval()
        same = make_teacher(configure({"method": "distillation", "teach": "scores", "teacher": str(supervised)}), 1)
        image = IMAGE[:, :1, :24, :24]
        expected = same.eval()((image - 0.1) / 0.5)
        torch.testing.assert_close(teacher((image - 0.2) / 0.4), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["plain", "slimmable"])
@pytest.mark.parametrize("given", [{"method": "byol"}, {"method": "simclr", "gate_budget": 0.5}])
def test_momentum_encoders_and_gated_networks_start_there_too(tmp_path, source, given):
    network = plain(0)
    if source == "slimmable":
        network = slimmable.slimify(network, (1.0, 0.5), example_inputs=IMAGE)
    slimmable.save(network, tmp_path / "w.safetensors")
    own = {"init": str(tmp_path / "w.safetensors"), "model": "test_resnet", "image_size": 64, "widths": (1.0, 0.5)}
    method = started(configure({**own, "importance": "none", **given}))
    with torch.no_grad():
        torch.testing.assert_close(method.backbone(IMAGE), network.eval()(IMAGE), rtol=1e-4, atol=1e-5)
        if source == "slimmable":
            with slimmable.at_width(network, 0.5), slimmable.at_width(method, 0.5):
                torch.testing.assert_close(method.backbone(IMAGE), network(IMAGE), rtol=1e-4, atol=1e-5)
        if given["method"] == "byol":
            torch.testing.assert_close(method.momentum_encoder(IMAGE), method.encoder(IMAGE), rtol=1e-4, atol=1e-5)


def test_a_run_is_taught_and_resumed_and_exported(tmp_path, supervised):
    options = ["--num-images", "64", "--batch-size", "16", "--epochs", "1", "--widths", "1", "0.5", "--workers", "0"]
    line = ["pretrain", *options, "--method", "distillation", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main([*line, "--teacher", str(supervised)]) == 0
    assert not any("teacher" in name for name in load_checkpoint(tmp_path / "out" / "checkpoint.safetensors")[0])
    assert main(["pretrain", "--output", str(tmp_path / "out"), "--resume", "--device", "cpu"]) == 0
    written = ("--width", "0.5", "--format", "safetensors", "--output", str(tmp_path / "files"))
    assert main(["export", str(tmp_path / "out"), *written]) == 0
    assert slimmable.load(tmp_path / "files" / "width-0.5.safetensors")(torch.rand(2, 1, 24, 24)).shape == (2, 64)


def test_a_model_in_a_folder_is_planned_and_exported(tmp_path, capsys):
    model = plain()
    name = folder_of(model, tmp_path / "folder")
    assert main(["plan", name, "--widths", "1", "0.5"]) == 0
    written = ("--width", "1", "--format", "safetensors", "--output", str(tmp_path / "files"))
    assert main(["export", name, "--pretrained", *written]) == 0
    loaded = slimmable.load(tmp_path / "files" / "width-1.0.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGE), model(IMAGE))
    missing = f"local-dir:{tmp_path / 'missing'}"
    assert main(["plan", missing]) == 2
    assert f"timm cannot make the model '{missing}' (FileNotFoundError" in capsys.readouterr().err
