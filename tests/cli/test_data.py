"""The embedded digits, and image folders."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from slimmable.__main__ import main
from slimmable.cli import data
from slimmable.cli.config import PretrainConfig
from slimmable.cli.data import Pictures, Plain, batches_of, cluttered_digits, folder_images, load_images
from slimmable.errors import DataError


def pictures(path):
    """Return the images of one file."""
    return Pictures([(str(path), 0)], [str(path)], ["one"])


@given(st.integers(1, 40), st.integers(1, 20), st.integers(20, 40), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_digits_are_the_same_for_the_same_seed(train, test, size, seed):
    images, again = (cluttered_digits(train, test, size, seed) for _ in range(2))
    assert images.train.shape == (train, 1, size, size)
    assert images.train.dtype == torch.uint8
    assert images.test.shape == (test, 1, size, size)
    assert torch.equal(images.train, again.train)
    assert torch.equal(images.test, again.test)
    assert (images.train.flatten(1).amax(1) > 100).all()  # something is drawn on every one
    assert not torch.equal(images.train, cluttered_digits(train, test, size, seed + 1).train)


def test_train_and_test_come_from_different_digits(monkeypatch):
    drawn = []

    def record(all_digits, chosen, clutter, size, generator):
        drawn.append((set(chosen.tolist()), set(clutter.tolist())))
        return torch.zeros(len(chosen), 1, size, size)

    monkeypatch.setattr(data, "_draw", record)
    images = cluttered_digits()
    (train, train_clutter), (test, test_clutter) = drawn
    assert not (train | train_clutter) & (test | test_clutter)
    assert len(train_clutter | test_clutter) == 1797
    for labels in (images.train_labels, images.test_labels):
        counts = labels.bincount()
        assert len(counts) == 10
        assert counts.min() > 0.7 * counts.max()


def write(path, colour, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@given(
    st.dictionaries(st.sampled_from("abcde"), st.tuples(st.integers(2, 6), st.integers(0, 3)), min_size=1),
    st.integers(8, 20),
)
@settings(max_examples=10, deadline=None)
def test_folder_reads_every_good_file_and_names_the_others(tmp_path_factory, counts, size):
    root = tmp_path_factory.mktemp("images")
    for name, (good, broken) in counts.items():
        for number in range(good):
            write(root / name / f"{number}.png", (10 * number, ord(name), 0))
        for number in range(broken):
            (root / name / f"broken{number}.jpg").write_bytes(b"no image")
    said = []
    images = folder_images(root, 0, said.append)
    assert images.classes == tuple(sorted(counts))
    plain = Plain(images.train, size)
    assert all(plain[index].shape == (3, size, size) for index in range(len(plain)))
    assert len(images.train) + len(images.test) == sum(good for good, _ in counts.values())
    for stack, labels in ((images.train, images.train_labels), (images.test, images.test_labels)):
        for index, label in enumerate(labels):  # the colour tells the class
            assert chr(stack[index][1, 0, 0]) == images.classes[label]
        assert len(stack) == len(labels)
    total = sum(broken for _, broken in counts.values())
    assert len(said) == bool(total)
    if total:
        assert f"left out {total} files" in said[0]
        assert said[0].count("broken") >= min(total, 10)


def test_folder_with_its_own_split(tmp_path):
    for part, colour in (("train", 10), ("val", 20)):
        for name in ("cat", "dog"):
            write(tmp_path / part / name / "1.png", (colour, 0, 0))
    images = folder_images(tmp_path, 0, print)
    assert images.classes == ("cat", "dog")
    assert {int(images.train[index][0].max()) for index in range(2)} == {10}
    assert {int(images.test[index][0].max()) for index in range(2)} == {20}


def test_centre_of_a_long_image_is_kept(tmp_path):
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 200
    for number in range(2):
        (tmp_path / "one").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "one" / f"{number}.png")
    images = folder_images(tmp_path, 0, print)
    assert images.train[0].shape == (3, 10, 30)
    assert (Plain(images.train, 10)[0] == 200).all()


def test_a_file_that_breaks_later_is_named(tmp_path):
    write(tmp_path / "cat" / "1.png", (1, 2, 3))
    images = pictures(tmp_path / "cat" / "1.png")
    assert images[0].shape == (3, 9, 12)
    (tmp_path / "cat" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        images[0]


def test_a_file_that_breaks_later_is_named_in_one_line_by_a_worker_too(tmp_path):
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        list(batches_of(Plain(pictures(tmp_path / "1.png"), 8), workers=1))
    assert re.fullmatch(r".*1\.png cannot be read \(.*\); replace it", str(caught.value))


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_read_as_their_upper_eight(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 2**16, (5, 7)).astype(np.uint16)
    if kind == "pgm":
        (tmp_path / "1.pgm").write_bytes(b"P5 7 5 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(tmp_path / f"1.{kind}")
    found = pictures(tmp_path / f"1.{kind}")[0]
    assert torch.equal(found, torch.from_numpy((pixels >> 8).astype(np.uint8)).expand(3, 5, 7))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_left_out(tmp_path, dtype):
    write(tmp_path / "cat" / "1.png", (1, 2, 3))
    write(tmp_path / "cat" / "2.png", (1, 2, 3))
    Image.fromarray(np.ones((5, 7), dtype)).save(tmp_path / "cat" / "3.tiff")
    said = []
    folder_images(tmp_path, 0, said.append)
    assert "3.tiff cannot be read (pixels of 32 bits, whose range is unknown" in said[0]


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("P", "gif"), ("1", "bmp"), ("CMYK", "jpg")]
)
def test_pictures_of_all_kinds_have_three_channels(tmp_path, mode, suffix):
    Image.new("RGB", (3, 2), (0, 0, 0)).convert(mode).save(tmp_path / f"1.{suffix}")
    assert torch.equal(pictures(tmp_path / f"1.{suffix}")[0], torch.zeros(3, 2, 3, dtype=torch.uint8))


@given(st.sets(st.text("abc", min_size=1, max_size=3), min_size=3, max_size=6), st.sampled_from("abc"))
@settings(max_examples=10, deadline=None)
def test_the_digest_depends_on_the_names_of_the_files_only(tmp_path_factory, names, place):
    def found(root, names, colour):
        for name in names:
            write(root / place / f"{name}.png", colour)
        return folder_images(root, 0, print).digest

    first, second = (tmp_path_factory.mktemp("images") for _ in range(2))
    digest = found(first, names, (1, 2, 3))
    assert digest == found(second, names, (3, 2, 1))
    assert digest != found(second, {"d"}, (1, 2, 3))
    (second / place / "d.png").unlink()
    assert digest == found(second, names, (1, 2, 3))
    one = second / place / f"{min(names)}.png"
    one.rename(one.with_name("d.png"))
    assert digest != found(second, set(), (1, 2, 3))


def test_only_the_first_process_names_what_was_left_out(tmp_path, monkeypatch, capsys):
    for number in range(2):
        write(tmp_path / "cat" / f"{number}.png", (1, 2, 3))
    (tmp_path / "cat" / "2.png").write_bytes(b"broken")
    for rank in (0, 1):
        monkeypatch.setattr("slimmable.cli.data.rank", lambda rank=rank: rank)
        load_images(PretrainConfig(data=str(tmp_path)))
        assert ("left out 1 files" in capsys.readouterr().out) == (rank == 0)


def test_folder_without_images(tmp_path):
    with pytest.raises(DataError, match="holds no images; expected one folder per class"):
        folder_images(tmp_path, 0, print)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="no image left to train on; 1 files were found"):
        folder_images(tmp_path, 0, print)


def test_pretrain_on_a_folder(tmp_path, capsys, tiny):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "cat" / "broken.png").write_bytes(b"broken")
    folder = str(tmp_path / "images")
    options = [*tiny, "--batch-size", "8", "--epochs", "1", "--method", "supervised", "--data", folder]
    assert main(["pretrain", *options, "--output", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert "left out 1 files" in output
    assert "broken.png" in output
    report = (tmp_path / "run" / "metrics.csv").read_text()
    assert "on 20 images of 64 x 64 pixels" in output
    assert main(["export", str(tmp_path / "run"), "--width", "0.5", "--format", "pt2"]) == 0

    (tmp_path / "images").rename(tmp_path / "gone")  # an export does not need them
    assert main(["export", str(tmp_path / "run"), "--width", "0.5", "--format", "safetensors"]) == 0
    (tmp_path / "gone").rename(tmp_path / "images")

    new = tmp_path / "images" / "dog" / "new.png"
    new.write_bytes((tmp_path / "images" / "cat" / "1.png").read_bytes())
    again = ["pretrain", "--resume", "--device", "cpu", "--workers", "0", "--output", str(tmp_path / "run")]
    for command in (again, ["evaluate", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"]):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert "no longer holds the files of the run (then 20 and 4 files, hash " in message
        assert "; now 20 and 5 files, hash " in message
    new.unlink()
    assert main(again) == 0
    assert (tmp_path / "run" / "metrics.csv").read_text() == report
