"""Images by timm's names: folders, tar files, torchvision's data sets, and those of the Hub."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset

from slimmable.__main__ import main
from slimmable.cli import data
from slimmable.cli.config import PretrainConfig
from slimmable.cli.data import Plain, batches_of, folder_images, load_images
from slimmable.errors import DataError, SlimmableError, UsageError


def picture(seed, size=(9, 7)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def write_folder(root, classes=("cat", "dog"), count=6, start=0):
    for at, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(start + 100 * at + number).save(root / name / f"{number}.png")
    return root


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, files):
    """Write a tar file of name -> bytes."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def described(images):
    """Return the pixels and the class of every image, those to train on and those held out, in any order."""
    parts = ((images.train, images.train_labels), (images.test, images.test_labels))
    return [
        sorted((images.classes[label], part[at].numpy().tobytes()) for at, label in enumerate(labels))
        for part, labels in parts
    ]


# -- folders and tar files
def test_a_folder_has_the_files_and_classes_that_timm_finds(tmp_path):
    write_folder(tmp_path / "images", ("10", "9", "b/cat", "a/dog"), 5)
    images = folder_images(tmp_path / "images", 0, print)
    reader = create_dataset("", str(tmp_path / "images")).reader
    assert (
        images.classes == tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.get)) == ("9", "10", "cat", "dog")
    )
    labels = [*images.train_labels.tolist(), *images.test_labels.tolist()]
    assert sorted(zip([*images.train.names, *images.test.names], labels, strict=True)) == sorted(reader.samples)


def test_a_tar_file_holds_the_same_images_as_its_folder(tmp_path):
    folder = write_folder(tmp_path / "images")
    whole = write_tar(tmp_path / "images.tar", files_in(folder))
    expected = folder_images(folder, 0, print)
    assert described(folder_images(whole, 0, print)) == described(expected)
    assert sorted(os.listdir(tmp_path)) == ["images", "images.tar"]  # no cache beside it

    (tmp_path / "classes").mkdir()
    for name in ("cat", "dog"):
        write_tar(tmp_path / "classes" / f"{name}.tar", files_in(folder / name))
    assert described(folder_images(tmp_path / "classes", 0, print)) == described(expected)
    nested = write_tar(
        tmp_path / "nested.tar", {f"{n}.tar": (tmp_path / "classes" / f"{n}.tar").read_bytes() for n in ("cat", "dog")}
    )
    assert described(folder_images(nested, 0, print)) == described(expected)


@pytest.mark.parametrize(
    "names", [("train", "val"), ("train.tar", "val.tar"), ("training", "validation.tar"), ("train.tar", "test")]
)
def test_a_split_of_folders_or_tar_files_is_kept(tmp_path, names):
    parts = [write_folder(tmp_path / "parts" / part, start=start) for part, start in (("a", 0), ("b", 50))]
    (tmp_path / "images").mkdir()
    for name, part in zip(names, parts, strict=True):
        place = tmp_path / "images" / name
        write_tar(place, files_in(part)) if name.endswith(".tar") else part.rename(place)
    images = folder_images(tmp_path / "images", 0, print)
    for found, start in ((images.train, 0), (images.test, 50)):
        wanted = {picture(start + 100 * at + number).tobytes() for at in range(2) for number in range(6)}
        assert {found[at].permute(1, 2, 0).numpy().tobytes() for at in range(12)} == wanted


def test_workers_read_the_same_tar_file_at_once(tmp_path):
    folder = write_folder(tmp_path / "images", count=40)
    images = folder_images(write_tar(tmp_path / "images.tar", files_in(folder)), 0, print)
    one, several = (torch.cat(list(batches_of(Plain(images.train, 8), 4, workers=workers))) for workers in (0, 2))
    assert torch.equal(one, several)
    assert len(one.flatten(1).unique(dim=0)) == len(one)


def test_broken_images_of_a_tar_file_are_left_out_and_named(tmp_path):
    files = files_in(write_folder(tmp_path / "images")) | {"cat/9.png": b"broken", "dog/huge.png": b""}
    buffer = io.BytesIO()
    Image.new("1", (20_000, 150)).save(buffer, "PNG")
    said = []
    images = folder_images(write_tar(tmp_path / "a.tar", files | {"dog/huge.png": buffer.getvalue()}), 0, said.append)
    assert len(images.train) + len(images.test) == 12
    assert "left out 2 files" in said[0]
    assert re.search(r"a\.tar/cat/9\.png cannot be read \(cannot identify", said[0])
    assert "a.tar/dog/huge.png cannot be read (20000 x 150 pixels are too many" in said[0]


def test_what_is_no_tar_file_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "a.tar")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.tar").symlink_to(tmp_path / "a.tar")
    (tmp_path / "split").mkdir()
    for name in ("train", "val"):
        (tmp_path / "split" / f"{name}.tar").symlink_to(tmp_path / "a.tar")
    write_tar(tmp_path / "empty.tar", {"note.txt": b"x"})
    write_tar(tmp_path / "flat.tar", {"1.png": files_in(write_folder(tmp_path / "images"))["cat/1.png"]})
    for name, message in (
        ("a.tar", "cannot be listed"), ("pipes", "holds no images"), ("linked", "is a link to"),
        ("split", "is a link to"),
        ("empty.tar", "cannot be listed"), ("flat.tar", "no image left"), ("b.tar", "there is no such folder"),
    ):  # fmt: skip
        with pytest.raises(SlimmableError, match=message):
            folder_images(tmp_path / name, 0, print)


def test_a_link_in_a_tar_file_leads_nowhere(tmp_path):
    path = write_tar(tmp_path / "a.tar", files_in(write_folder(tmp_path / "images")))
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"cat/link{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert len(folder_images(path, 0, print).train_labels) == 10


def test_every_process_numbers_the_classes_alike(tmp_path):
    """timm orders classes by a set where their names differ in case or leading zeros alone."""
    write_folder(tmp_path / "images", ("Cat", "cat", "CAT", "1", "01", "001"), 3)
    code = (
        "import sys; from pathlib import Path; from slimmable.cli.data import folder_images;"
        "images = folder_images(Path(sys.argv[1]), 0, print);"
        "print(images.classes, images.train_labels.tolist(), images.train.names, images.digest)"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "images")],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(said) == 1


def test_files_beside_the_folders_of_classes_do_not_count(tmp_path):
    write_folder(tmp_path / "images")
    picture(7).save(tmp_path / "images" / "loose.png")
    assert folder_images(tmp_path / "images", 0, print).classes == ("cat", "dog")


def test_the_digest_does_not_depend_on_how_the_path_is_written(tmp_path, monkeypatch):
    write_folder(tmp_path / "images" / "train")
    write_folder(tmp_path / "images" / "val", start=50)
    monkeypatch.chdir(tmp_path / "images")
    digests = {folder_images(type(tmp_path)(path), 0, print).digest for path in (".", "../images", tmp_path / "images")}
    assert len(digests) == 1


# -- torchvision
def write_mnist(root, name, train=30, test=10):
    """Write the files of one of torchvision's kinds of MNIST."""
    generator = np.random.default_rng(0)
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", train), ("t10k", test)):
        images, labels = generator.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())


@pytest.mark.parametrize(("name", "handwriting"), [("MNIST", True), ("FashionMNIST", False), ("KMNIST", True)])
def test_a_data_set_of_torchvision_has_its_own_images_classes_and_split(tmp_path, name, handwriting):
    write_mnist(tmp_path, name)
    timms = {"FashionMNIST": "fashion_mnist"}.get(name, name.lower())
    config = PretrainConfig(data=f"torch/{timms}", data_dir=str(tmp_path))
    images = load_images(config)
    assert (images.channels, images.handwriting, config.channels) == (1, handwriting, 1)
    for part, labels, split in (
        (images.train, images.train_labels, "train"),
        (images.test, images.test_labels, "validation"),
    ):
        own = create_dataset(f"torch/{timms}", root=str(tmp_path), split=split)
        expected = sorted((own.classes[label], np.asarray(image).tobytes()) for image, label in own)
        found = [(images.classes[label], part[at].numpy().tobytes()) for at, label in enumerate(labels)]
        assert part[0].shape == (1, 28, 28)
        assert sorted(found) == expected


def test_images_of_several_channels(tmp_path, monkeypatch):
    import pickle

    (tmp_path / "cifar-10-batches-py").mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for at, name in enumerate(names):
        pixels = np.random.default_rng(at).integers(0, 256, (10, 3072), np.uint8)
        content = {"data": pixels, "labels": list(range(10))}
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": [f"class {number}" for number in range(10)]}
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(meta))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    images = load_images(PretrainConfig(data="torch/cifar10", data_dir=str(tmp_path)))
    assert (len(images.train), len(images.test), images.channels) == (50, 10, 3)
    own = create_dataset("torch/cifar10", root=str(tmp_path), split="validation")
    assert all(torch.equal(images.test[at].permute(1, 2, 0), torch.from_numpy(own.data[at])) for at in range(10))
    assert images.test_labels.tolist() == own.targets


def test_an_image_folder_of_torchvision_has_its_top_folders_as_classes(tmp_path):
    write_folder(tmp_path / "images", ("cat/tabby", "cat/tiger", "dog"))
    images = load_images(PretrainConfig(data="torch/image_folder", data_dir=str(tmp_path / "images")))
    assert images.classes == ("cat", "dog")
    assert len(images.train) + len(images.test) == 18
    (tmp_path / "images" / "dog" / "out.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a link to"):
        load_images(PretrainConfig(data="torch/folder", data_dir=str(tmp_path / "images")))


def test_a_run_on_a_data_set_of_torchvision(tmp_path, tiny, capsys):
    write_mnist(tmp_path, "MNIST")
    out, options = tmp_path / "run", (*tiny, "--image-size", "32", "--epochs", "1", "--batch-size", "8")
    named = ("--data", "torch/mnist", "--data-dir", str(tmp_path), "--model", "test_resnet")
    assert main(["pretrain", *options, *named, "--output", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["mean"] == config["std"] == [0.5]  # as timm says for this model
    report = (out / "metrics.csv").read_text()
    assert main(["evaluate", str(out), "--device", "cpu", "--workers", "1"]) == 0
    assert (out / "metrics.csv").read_text() == report
    assert main(["export", str(out), "--width", "0.5", "--format", "safetensors"]) == 0
    assert "32 x 32, 1 channels, values in [0, 1], minus the mean (0.5,), divided by" in (out / "README.md").read_text()
    again = ["pretrain", "--resume", "--output", str(out), "--device", "cpu", "--workers", "0"]
    assert main(again) == 0
    assert main([*again, "--data-dir", "elsewhere"]) == 2
    assert "--data-dir: the run has" in capsys.readouterr().err


# -- the Hub
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a writer of data sets of the Hub in a local folder: split -> labels -> the folder's name."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(splits, label=None):
        kinds = datasets.Features(
            {"image": datasets.Image(), "label": label or datasets.ClassLabel(names=["no", "yes"])}
        )
        (tmp_path / "hub").mkdir()
        for split, labels in splits.items():
            pixels = [encoded(picture(at + 10 * len(split))) for at in range(len(labels))]
            rows = {"image": [{"bytes": content, "path": None} for content in pixels], "label": labels}
            table = pyarrow.table(rows, schema=kinds.arrow_schema)
            parquet.write_table(table, tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
        return f"hfds/{tmp_path / 'hub'}"

    return write


@pytest.mark.parametrize("held_out", ["validation", "test", None])
def test_a_data_set_of_the_hub(hub, held_out, tmp_path):
    name = hub({"train": [0, 1] * 10, **({held_out: [1, 0, 0]} if held_out else {})})
    images = load_images(PretrainConfig(data=name, data_dir=str(tmp_path / "cache")))
    assert images.classes == ("no", "yes")
    assert (len(images.train), len(images.test)) == ((20, 3) if held_out else (16, 4))
    pixels = {picture(at + 50).tobytes(): at % 2 for at in range(20)}
    for at, label in enumerate(images.train_labels.tolist()):
        assert pixels[images.train[at].permute(1, 2, 0).numpy().tobytes()] == label
    assert images.digest == load_images(PretrainConfig(data=name)).digest
    one, several = (torch.cat(list(batches_of(Plain(images.train, 8), 4, workers=workers))) for workers in (0, 2))
    assert torch.equal(one, several)


def test_labels_of_the_hub_without_names(hub):
    import datasets

    images = load_images(PretrainConfig(data=hub({"train": [3, 7, 11] * 4}, datasets.Value("int64"))))
    assert images.classes == ("3", "7", "11")
    assert images.train_labels.bincount().tolist() == [3, 3, 3]


def test_a_data_set_that_is_not_there_is_named(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(SlimmableError, match=r"--data hfds/.*missing cannot be read"):
        load_images(PretrainConfig(data=f"hfds/{tmp_path / 'missing'}"))


def test_without_the_package_of_the_hub_a_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SlimmableError, match="pip install datasets"):
        load_images(PretrainConfig(data="hfds/someone/something"))


@pytest.mark.parametrize("kind", ["wds", "tfds", "hfids", "WDS"])
def test_data_sets_that_are_read_from_first_to_last_are_refused(kind):
    with pytest.raises(UsageError, match="so no run could be resumed; use files"):
        PretrainConfig(data=f"{kind}/name")


def test_reading_in_advance_keeps_no_image(tmp_path, monkeypatch):
    """Up to 50,000 files are decoded once before a run."""
    import weakref

    alive, most = set(), [0]
    original = data.pil_to_tensor

    def watched(image):
        found = original(image)
        number = len(alive) + 1000 * most[0] + id(found)
        alive.add(number)
        weakref.finalize(found, alive.discard, number)
        most[0] = max(most[0], len(alive))
        return found

    monkeypatch.setattr(data, "pil_to_tensor", watched)
    folder_images(write_folder(tmp_path / "images", count=60), 0, print)
    assert 0 < most[0] <= 2 * (os.cpu_count() or 1) + 8
