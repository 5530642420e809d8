"""Image folders with what no image folder should have: links, pipes, bombs, odd names, and files that vanish."""

import os
import re
import shutil
import socket
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from slimmable.__main__ import main
from slimmable.cli.data import Pictures, Plain, Views, batches_of, folder_images, load, make_views
from slimmable.errors import DataError, SlimmableError


def pictures(path):
    """Return the images of one file."""
    return Pictures([(str(path), 0)], [str(path)], ["one"])


def write(path, size=(12, 9), **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (1, 2, 3)).save(path, **settings)


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images each."""
    for name in ("cat", "dog"):
        for number in range(3):
            write(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def left_out(folder):
    """Return the lines about the files that are left out, of a folder that keeps its six images."""
    said = []
    images = folder_images(folder, 0, said.append)
    assert len(images.train) + len(images.test) == 6
    assert all(line.isprintable() for text in said for line in text.splitlines())
    return "\n".join(said)


# -- links
def out_of(folder, kind):
    """Put a link to something outside of the folder into it, and return the link."""
    outside = folder.parent / "outside"
    write(outside / "cat" / "1.png")
    links = {
        "a file": (folder / "cat" / "9.png", outside / "cat" / "1.png"),
        "a file far below": (folder / "cat" / "far" / "below" / "9.png", outside / "cat" / "1.png"),
        "a class": (folder / "tiger", outside / "cat"),
        "a folder in a class": (folder / "cat" / "more", outside),
        "a file, relative": (folder / "cat" / "9.png", "../../outside/cat/1.png"),
        "nothing": (folder / "cat" / "9.png", folder.parent / "nothing.png"),
        "a device": (folder / "cat" / "9.png", "/dev/zero"),
        "a name that begins alike": (folder / "cat" / "9.png", f"{folder}-more/1.png"),
    }
    link, target = links[kind]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    return link


@pytest.mark.parametrize(
    "kind",
    ["a file", "a file far below", "a class", "a folder in a class", "a file, relative", "nothing", "a device",
     "a name that begins alike"],
)  # fmt: skip
def test_links_out_of_the_folder_are_refused(folder, kind):
    link = out_of(folder, kind)
    with pytest.raises(DataError, match="but only links to files of the same folder are followed") as caught:
        folder_images(folder, 0, print)
    assert f"{link} is a link to {os.path.realpath(link)}" in str(caught.value)
    assert "cp -rlL" in str(caught.value)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_that_is_a_link_is_refused(folder, part):
    for name in ("train", "val"):
        if name == part:
            (folder.parent / name).symlink_to(folder)
        else:
            shutil.copytree(folder, folder.parent / name)
    with pytest.raises(DataError, match=f"{part} is a link to {folder}"):
        folder_images(folder.parent, 0, print)


@pytest.mark.parametrize("target", ["..", ".", "../dog"])
def test_links_to_folders_are_refused(folder, target):
    (folder / "cat" / "again").symlink_to(target)
    with pytest.raises(DataError, match="again is a link to"):
        folder_images(folder, 0, print)


def test_a_class_that_is_another_one_is_refused(folder):
    (folder / "puma").symlink_to("cat")
    with pytest.raises(DataError, match=r"puma is a link to .*cat, but only links to files"):
        folder_images(folder, 0, print)


def test_links_inside_the_folder_are_followed(folder):
    (folder / "cat" / "9.png").symlink_to("../dog/1.png")
    images = folder_images(folder, 0, print)
    assert len(images.train) + len(images.test) == 7


def test_a_folder_that_is_a_link_itself_is_read(folder):
    (folder.parent / "link").symlink_to(folder)
    assert len(folder_images(folder.parent / "link", 0, print).train) == 4


def test_the_way_on_that_the_message_names_goes_on(folder):
    """`cp -rlL` makes hard links of what links lead to."""
    out_of(folder, "a class")
    assert os.system(f"cp -rlL '{folder}' '{folder.parent / 'solid'}'") == 0
    images = folder_images(folder.parent / "solid", 0, print)
    assert images.classes == ("cat", "dog", "tiger")


# -- what is no image
def test_pipes_sockets_and_links_to_nothing_are_left_out_at_once(folder, monkeypatch):
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "cat" / "loop.png").symlink_to("loop.png")
    (folder / "cat" / "nothing.png").symlink_to("missing.png")
    monkeypatch.chdir(folder / "cat")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket.png")
    said = left_out(folder)
    assert "left out 4 files" in said
    for name in ("pipe", "loop", "nothing", "socket"):
        assert f"{name}.png cannot be read (it is no file, or leads to none)" in said


def test_only_images_are_decoded_whatever_their_name(folder, monkeypatch):
    """PostScript would start Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("a program was started"))
    (folder / "cat" / "9.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    assert "9.png cannot be read (cannot identify image file" in left_out(folder)
    write(folder / "cat" / "10.png", format="JPEG")
    assert len(pictures(folder / "cat" / "10.png")[0]) == 3


@pytest.mark.parametrize("size", [(9_500, 9_500), (1, 101), (20_000, 150), (15_000, 15_000)])
def test_what_would_need_much_memory_is_left_out(folder, size):
    Image.new("1", size).save(folder / "cat" / "9.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = left_out(folder)
    assert "left out 1 files" in said
    assert re.search(f"{size[0]} x {size[1]} pixels are too many|exceeds limit", said)


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (300, 3)])
def test_small_and_long_images_are_read(tmp_path, size):
    write(tmp_path / "1.png", size)
    images = pictures(tmp_path / "1.png")
    assert Plain(images, 8)[0].shape == (3, 8, 8)
    views = Views(images, torch.zeros(1), make_views("mocov2", 16, min_crop_scale=0.0, mirror=True), 0)
    assert views.__getitems__([(0, 0)])[0].shape == (1, 3, 16, 16)


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.fromarray(np.full((4, 4, 3), 60 * step, np.uint8)) for step in range(3)]
    for kind in ("gif", "webp", "png", "tiff"):
        settings = {"lossless": True} if kind == "webp" else {}
        frames[0].save(tmp_path / f"1.{kind}", save_all=True, append_images=frames[1:], **settings)
        assert (pictures(tmp_path / f"1.{kind}")[0] == 0).all(), kind


# -- names
@pytest.mark.parametrize("name", ["a\nb", "caf\udce9", "\x1b[2J", "n" * 250])
def test_odd_names_are_read_and_shown_in_one_line(folder, name):
    write(folder / "cat" / f"{name}.png")
    images = folder_images(folder, 0, print)
    assert len(images.train) + len(images.test) == 7
    (folder / "cat" / f"{name}.png").write_bytes(b"broken")
    assert len(left_out(folder).splitlines()) == 2
    with pytest.raises(DataError) as caught:
        list(batches_of(Plain(pictures(folder / "cat" / f"{name}.png"), 8), workers=1))
    assert str(caught.value).isprintable()
    assert re.search(r"\.png'? cannot be read", str(caught.value))


def test_a_name_that_is_not_utf8_can_be_trained_on(folder, tmp_path, tiny, capsys):
    for number in range(3, 8):
        write(folder / "caf\udce9" / f"\udce9{number}.png")
    (folder / "caf\udce9" / "broken.png").write_bytes(b"broken")
    options = ("--batch-size", "8", "--epochs", "1", "--image-size", "32", "--data", str(folder))
    assert main(["pretrain", *tiny, *options, "--output", str(tmp_path / "run")]) == 0
    assert "caf\\udce9/broken.png' cannot be read (cannot identify" in capsys.readouterr().out


# -- shapes of folders
def test_classes_without_images_do_not_count(folder):
    for number in range(300):
        (folder / f"empty{number}").mkdir()
    assert folder_images(folder, 0, print).classes == ("cat", "dog")


def test_one_class_and_one_image(tmp_path):
    write(tmp_path / "cat" / "1.png")
    with pytest.raises(DataError, match="no image left to hold out; 1 files were found"):
        folder_images(tmp_path, 0, print)
    write(tmp_path / "cat" / "2.png")
    images = folder_images(tmp_path, 0, print)
    assert (len(images.train), len(images.test), images.classes) == (1, 1, ("cat",))
    write(tmp_path / "dog" / "1.png")  # one image: to train on
    images = folder_images(tmp_path, 0, print)
    assert images.train_labels.tolist() == [0, 1]


def test_a_class_that_is_only_held_out_is_refused(folder):
    shutil.copytree(folder, folder.parent / "all" / "train")
    shutil.copytree(folder, folder.parent / "all" / "val")
    write(folder.parent / "all" / "val" / "zebra" / "1.png")
    with pytest.raises(DataError, match="nothing to train on for the held-out classes zebra"):
        folder_images(folder.parent / "all", 0, print)


def test_a_very_deep_folder_is_read_or_refused(tmp_path, monkeypatch):
    """Deeper than Python's stack, on which `os.walk` runs before Python 3.12."""
    write(tmp_path / "cat" / "1.png")
    monkeypatch.chdir(tmp_path / "cat")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    write(tmp_path / "cat" / "2.png")
    try:
        if sys.version_info >= (3, 12):
            assert len(folder_images(tmp_path, 0, print).train) == 1
        else:
            with pytest.raises(SlimmableError, match="cannot be listed"):
                folder_images(tmp_path, 0, print)
    finally:  # pytest cannot remove so deep a folder
        for _ in range(1200):
            os.chdir("..")
            os.rmdir("d")


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    original = os.scandir

    def forbidden(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(SlimmableError, match=r"cannot be listed \(.*Permission denied.*dog"):
        folder_images(folder, 0, print)


@pytest.mark.parametrize("name", ["missing", "file", "loop", "x" * 300, "a\0b", ""])
def test_what_is_no_folder_is_named(tmp_path, monkeypatch, name):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("loop").symlink_to("loop")
    if name:
        with pytest.raises(DataError, match="there is no such folder"):
            folder_images(Path(name), 0, print)


# -- files that change while they are read
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", [os.unlink, lambda path: path.write_bytes(b"other"), lambda path: pipe(path)])
def test_files_that_change_after_the_listing_are_named(folder, workers, change):
    images = folder_images(folder, 0, print)
    path = folder / "cat" / "1.png"
    change(path)
    views = Views(images.train, images.train_labels, make_views("supervised", 8, min_crop_scale=0.1, mirror=True), 0)
    both = Views(Both(images), torch.zeros(6), views.transforms, 0)
    with pytest.raises(DataError, match=r"cat/1\.png cannot be read \(.*\); replace it") as caught:
        list(load(both, workers, sampler=[(0, index) for index in range(6)]))
    assert len(str(caught.value).splitlines()) == 1


class Both:
    """The training and the held-out images."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return 6

    def __getitem__(self, index):
        train, test = self.images.train, self.images.test
        return train[index] if index < len(train) else test[index - len(train)]


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def test_a_file_that_vanishes_between_the_listing_and_the_first_reading_is_left_out(folder, monkeypatch):
    original = Image.open

    def opened(path, *arguments, **settings):
        if path.endswith("cat/1.png"):
            os.unlink(path)
        return original(path, *arguments, **settings)

    monkeypatch.setattr("slimmable.cli.data.Image.open", opened)
    said = []
    images = folder_images(folder, 0, said.append)
    assert len(images.train) + len(images.test) == 5
    assert "1.png cannot be read ([Errno 2] No such file" in said[0]
