"""`slimmable embed`: its file has what the extracted network gives for the images as evaluation prepares them."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

import slimmable
from slimmable.__main__ import main

HERE = ("--device", "cpu", "--workers", "0")
NAMES = ["cat/10.png", "cat/9.jpg", "dogs/small/1.gif", "dogs/small/2.webp", "loose.bmp"]


@pytest.fixture
def pictures(tmp_path):
    """A folder of images of several sizes, kinds and depths, one of them in no folder, beside what is no image."""
    folder = tmp_path / "pictures"
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (40 + 7 * number, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "cat" / "note.txt").write_text("no image")
    return folder


def prepared(folder, size, mean, std, mode="RGB"):
    """The images as the network takes them."""

    def one(path):
        pixels = pil_to_tensor(Image.open(path).convert(mode))
        pixels = v2.CenterCrop(size)(v2.Resize(size, antialias=True)(pixels)).float() / 255
        return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    return torch.stack([one(folder / name) for name in NAMES])


def trained(name="test_resnet", **settings):
    """A model whose weights and statistics are other than those that it starts from, at two widths."""
    torch.manual_seed(1)
    model = slimmable.slimify(timm.create_model(name, **settings), (1.0, 0.5))
    for _ in range(2):
        slimmable.run_widths(model.train(), torch.rand(4, 3, *model.pretrained_cfg["input_size"][1:]))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_features_of_a_saved_model_are_those_of_its_extracted_networks(name, pictures, tmp_path):
    """Of a model with a classifier they are what the classifier reads."""
    model = trained(name, num_classes=5)
    slimmable.save(model, tmp_path / "model.safetensors")
    line = ["embed", str(tmp_path / "model.safetensors"), str(pictures), "--width", "all", *HERE]
    assert main([*line, "--output", str(tmp_path / "features.npz")]) == 0
    found = np.load(tmp_path / "features.npz")
    assert set(found) == {"names", "labels", "classes", "w1.0", "w0.5"}
    assert found["names"].tolist() == NAMES
    assert found["classes"].tolist() == ["cat", "small"]
    assert found["labels"].tolist() == [0, 0, 1, 1, -1]
    known = model.pretrained_cfg
    images = prepared(pictures, known["input_size"][-1], known["mean"], known["std"])
    for width in (1.0, 0.5):
        small = slimmable.extract(model, width)
        small.reset_classifier(0)
        expected = small.eval()(images)
        assert found[f"w{width}"].dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(found[f"w{width}"]), expected, rtol=1e-5, atol=1e-5)
        assert expected.std(0).max() > 1e-3  # so the images differ


@torch.no_grad()
def test_features_of_a_run_are_those_of_its_files(run, pictures, tmp_path, capsys):
    """A run on digits takes grey images, with no mean and standard deviation."""
    line = ["embed", str(run), str(pictures), "--width", "0.5", *HERE, "--output", str(tmp_path / "features.npz")]
    assert main(line) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'features.npz'}, the features of 5 images\n"
    expected = slimmable.load(run / "width-0.5.safetensors")(prepared(pictures, 24, [0.0], [1.0], "L"))
    found = np.load(tmp_path / "features.npz")["w0.5"]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_features_do_not_depend_on_batches_and_workers(pictures, tmp_path, monkeypatch):
    slimmable.save(trained(num_classes=0), tmp_path / "model.safetensors")
    found = []
    for batch, workers in (("256", "0"), ("2", "1")):
        monkeypatch.setattr("slimmable.cli.data.batches_of.__defaults__", (int(batch), 0))
        options = ("--width", "1", "--workers", workers, "--device", "cpu", "--output", str(tmp_path / f"{batch}.npz"))
        assert main(["embed", str(tmp_path / "model.safetensors"), str(pictures), *options]) == 0
        found.append(np.load(tmp_path / f"{batch}.npz")["w1.0"])
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def test_a_flat_folder_has_no_labels(pictures, tmp_path):
    for name in NAMES[:4]:
        (pictures / name).rename(pictures / name.replace("/", "-"))
    options = ("--width", "1", "--output", str(tmp_path / "features.npz"), *HERE)
    assert main(["embed", "test_resnet", str(pictures), *options]) == 0
    found = np.load(tmp_path / "features.npz")
    assert set(found) == {"names", "w1.0"}
    assert found["names"].tolist() == [name.replace("/", "-") for name in NAMES]


def test_links_out_of_the_folder_are_refused(pictures, tmp_path, capsys):
    (tmp_path / "other.png").write_bytes(b"anything")
    (pictures / "cat" / "other.png").symlink_to(tmp_path / "other.png")
    options = ("--width", "1", "--output", str(tmp_path / "features.npz"), *HERE)
    assert main(["embed", "test_resnet", str(pictures), *options]) == 2
    assert "other.png is a link to" in capsys.readouterr().err


def test_a_file_is_written_whole_or_not_at_all(pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "features.npz"
    out.write_bytes(b"before")
    line = ["embed", "test_resnet", str(pictures), "--width", "1", "--output", str(out), *HERE]
    (pictures / "cat" / "9.jpg").write_bytes(b"broken")
    assert main(line) == 2
    assert "cat/9.jpg cannot be read" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        (pictures / "cat" / "9.jpg").unlink()
        patch.setattr(np, "savez", fail)
        assert main(line) == 2
    assert "cannot write" in capsys.readouterr().err
    assert out.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"features.npz", "pictures"}
    assert main(line) == 0
    assert np.load(out)["w1.0"].shape[0] == 4


def fail(*args, **kwargs):
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--width": "0.3"}, "0.3"),
        ({"--output": "features.csv"}, "--output features.csv must end in .npz"),
        ({"folder": "nowhere"}, "nowhere cannot be listed"),
        ({"folder": "empty"}, "empty holds no images"),
        ({"--checkpoint": "nowhere.pth"}, "there is no file nowhere.pth"),
    ],
)
def test_what_cannot_be_embedded_is_refused(change, message, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    options = {"--width": "1", "--output": "features.npz"} | {k: v for k, v in change.items() if k.startswith("-")}
    words = [word for pair in options.items() for word in pair]
    assert main(["embed", "test_resnet", change.get("folder", "pictures"), *words, *HERE]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "pictures"}


def test_a_network_that_gives_maps_is_refused(pictures, tmp_path, capsys):
    maps = {"num_classes": 0, "global_pool": ""}
    slimmable.save(trained(**maps), tmp_path / "model.safetensors", arguments=maps)
    line = ["embed", str(tmp_path / "model.safetensors"), str(pictures), "--width", "1", *HERE]
    assert main([*line, "--output", str(tmp_path / "features.npz")]) == 2
    assert "test_resnet does not output one feature vector per image" in capsys.readouterr().err
    assert not (tmp_path / "features.npz").exists()
