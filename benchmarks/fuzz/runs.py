"""Readers of the commands: config.json, checkpoints, tables of a run, image folders, and the command line itself."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import random
import socket
import struct
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from benchmarks.fuzz.mutations import JUNK, changed, damaged, text
from slimmable.cli.commands import COMMANDS, Export, parse
from slimmable.cli.config import PRESETS, PretrainConfig, check, configure, flag
from slimmable.cli.data import Plain, Views, cluttered_digits, folder_images, load, make_views
from slimmable.cli.export import timm_source
from slimmable.cli.pretrain import Training
from slimmable.cli.report import Row, csv_log, read_rows, to_csv
from slimmable.cli.run import CHECKPOINT, CONFIG, load_checkpoint, new_method, read_config, trained_method

Input = tuple[Callable[[], object], str]
SMALL = PretrainConfig(
    num_images=16, batch_size=8, epochs=4, widths=(1.0, 0.5), proj_dim=8, queue_size=8, key_parts=2, slow_start=0.0
)
COLUMNS = ("learning_rate", "train_loss/w1", "train_loss/w0.5")


# -- config.json
def read_configuration(draw: random.Random, folder: Path) -> Input:
    """A configuration with something else in one place, or with other bytes."""
    data, path = json.loads(SMALL.to_json()), folder / CONFIG
    how = draw.choice(["value", "value", "value", "bytes", "twice", "encoding", "kind of file"])
    what = how
    if how == "value":
        data, what = changed(draw, data)
        path.write_text(text(data), errors="surrogatepass")
    elif how == "bytes":
        path.write_bytes(damaged(draw, path_bytes(data)))
    elif how == "twice":
        name = draw.choice(list(data))
        path.write_text(json.dumps(data)[:-1] + f', "{name}": {json.dumps(draw.choice(list(data.values())))}}}')
    elif how == "encoding":
        path.write_bytes(json.dumps(data).encode(draw.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7"])))
    else:
        what = unusual(draw, path)

    def call() -> None:
        found = read_config(folder)
        assert 0 < found.epochs <= 1_000_000
        assert 8 <= found.image_size <= 4096
        assert 0 < len(found.widths) <= 100
        assert all(0 < width <= 1 for width in found.widths)
        assert found == PretrainConfig(**json.loads(found.to_json()))
        numbers = (value for value in asdict(found).values() if isinstance(value, float))
        assert all(map(math.isfinite, numbers))

    return call, what


def path_bytes(data: Any) -> bytes:
    return json.dumps(data, indent=2).encode()


def unusual(draw: random.Random, path: Path) -> str:
    """Put something at a path that is no plain file, and say what."""
    kind = draw.choice(["folder", "fifo", "loop", "dangling", "device", "huge", "empty"])
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in ("loop", "dangling", "device"):
        path.symlink_to({"loop": path.name, "dangling": "nowhere/file", "device": "/dev/zero"}[kind])
    else:
        with path.open("wb") as file:
            file.truncate(2**33 if kind == "huge" else 0)
    return kind


# -- checkpoints
@functools.cache
def whole() -> tuple[Training, bytes]:
    """Return the training of a small run, and its checkpoint after three steps."""
    torch.set_num_threads(1)
    images = cluttered_digits(SMALL.num_images, SMALL.num_images // 4, SMALL.image_size)
    training = Training(SMALL, new_method(SMALL, 1, 10), images, torch.device("cpu"))
    for _ in range(3):
        training.take_step()
    with tempfile.TemporaryDirectory() as folder:
        training.save(Path(folder, CHECKPOINT))
        return training, Path(folder, CHECKPOINT).read_bytes()


def read_checkpoint(draw: random.Random, folder: Path) -> Input:
    """A checkpoint with another header, tensor or name, or with other bytes; a run goes on, or its network is read."""
    training, content = whole()
    (folder / CONFIG).write_text(SMALL.to_json())
    path = folder / CHECKPOINT
    how = draw.choice(["tensor", "tensor", "tensor", "header", "header", "bytes", "kind of file"])
    what = how
    if how == "tensor":
        what = other_tensor(draw, content, path)
    elif how == "header":
        length = struct.unpack("<Q", content[:8])[0]
        header, what = changed(draw, json.loads(content[8 : 8 + length]))
        written = text(header).encode(errors="surrogatepass")
        path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])
    elif how == "bytes":
        path.write_bytes(damaged(draw, content))
    else:
        what = unusual(draw, path)

    def go_on() -> None:
        images = training.images
        own = Training(SMALL, new_method(SMALL, 1, 10), images, torch.device("cpu"))
        own.resume(*load_checkpoint(path, images.digest))
        assert 0 < own.step <= own.steps
        if own.step < own.steps:
            assert all(map(math.isfinite, own.take_step().values()))
        own.check_finite()

    def network() -> None:
        backbone = trained_method(read_config(folder), folder, 1).backbone
        assert all(tensor.isfinite().all() for tensor in backbone.state_dict().values())
        assert backbone(torch.zeros(1, 1, 24, 24)).isfinite().all()

    name, call = draw.choice([("resumed", go_on), ("evaluated", network)])
    return call, f"{what}, {name}"


def other_tensor(draw: random.Random, content: bytes, path: Path) -> str:
    """Write a checkpoint in which a tensor or its name is another."""
    path.write_bytes(content)
    tensors = load_file(path)
    length = struct.unpack("<Q", content[:8])[0]
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    texts = json.loads(metadata.get("slimmable", "{}"))
    name = draw.choice(sorted(tensors))
    tensor, how = tensors[name], draw.choice(["type", "shape", "value", "gone", "more", "name", "swapped", "step"])
    if how == "type":
        tensors[name] = tensor.to(draw.choice([torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]))
    elif how == "shape":
        shapes = [tensor.reshape(1, *tensor.shape), tensor.flatten()[:1], tensor.flatten(), tensor.new_zeros(0)]
        tensors[name] = draw.choice([*shapes, tensor.new_zeros(1000, 1000)]).clone()
    elif how == "value":
        value = draw.choice([math.nan, math.inf, -1.0, 0.0, 1e38, -1e38, 1e-45, 3.0])
        flat = tensor.flatten().double()
        flat[draw.randrange(len(flat)) if draw.random() < 0.5 else slice(None)] = value
        if not tensor.is_floating_point():
            flat = flat.nan_to_num(0, 2**31, -(2**31)).clamp(-(2**31), 2**31)
        tensors[name] = flat.to(tensor.dtype).reshape(tensor.shape)
        how += f" {value}"
    elif how == "gone":
        del tensors[name]
    elif how == "more":
        prefix = draw.choice(["", "training.", "training.optimizer.", "training.scaler.", "training.method."])
        tensors[prefix + draw.choice(["x", name, "", "0.step"])] = torch.ones(draw.randrange(3))
    elif how == "name":
        tensors[draw.choice([name.upper(), f"{name}.", f"..{name}", "", name[:-1]])] = tensors.pop(name)
    elif how == "swapped":
        other = draw.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        texts["step"] = draw.choice(["", "-1", "0", "99999", "1.5", "1e9", "nan", "9" * 5000, "\u0663", "2", "many"])
    save_file(tensors, path, {"slimmable": json.dumps(texts)})
    return f"{how} of {name}"


# -- tables
def read_table(draw: random.Random, folder: Path) -> Input:
    """A table of losses or results, with other cells or bytes."""
    name = draw.choice(["losses", "metrics"])
    path = folder / f"{name}.csv"
    if name == "metrics":
        content = to_csv([Row(width, 100, 1000, {"knn": 0.5, "linear": 0.25}) for width in (1.0, 0.5)])
    else:
        columns = COLUMNS if name == "losses" else ("grad_ratio/w0.5", "rest_ratio/w0.5", "grad_cosine/w1.0_w0.5")
        lines = [f"{step}," + ",".join(f"{draw.random():.6g}" for _ in columns) for step in range(1, 9)]
        content = "\n".join([",".join(("step", *columns)), *lines, ""])
    how = draw.choice(["cell", "cell", "bytes", "lines", "kind of file"])
    if how == "cell":
        cells = [line.split(",") for line in content.splitlines()]
        row = draw.choice(cells)
        value = draw.choice(JUNK)
        row[draw.randrange(len(row))] = draw.choice(
            ['"', "\0", "9" * 200_000, "a,b", "-1", "1e400", str(value)[:200_000]]
        )
        path.write_text("\n".join(",".join(row) for row in cells) + "\n", errors="surrogatepass")
    elif how == "bytes":
        path.write_bytes(damaged(draw, content.encode()))
    elif how == "lines":
        lines = content.splitlines(keepends=True)
        path.write_text("".join(draw.choices(lines, k=draw.choice([0, 1, 5, 50]))))
    else:
        how = unusual(draw, path)

    def call() -> None:
        if name == "metrics":
            for row in read_rows(folder):
                assert all(0 <= share <= 1 for share in (row.width, *row.shares.values()))
                assert row.parameters >= 0 <= row.macs
        else:
            csv_log(path, COLUMNS, 5)
            steps = [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:]]
            assert steps == sorted(set(steps))
            assert all(0 <= step <= 5 for step in steps)

    return call, f"{name}.csv: {how}"


# -- weights of `slimmable export --checkpoint`
@functools.cache
def weights() -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    """Return the weights of a plain timm model, and as files by suffix."""
    torch.manual_seed(0)
    tensors = timm.create_model("test_resnet", num_classes=3).state_dict()
    pickled = io.BytesIO()
    torch.save(tensors, pickled)
    return tensors, {"safetensors": save(tensors), "pth": pickled.getvalue()}


def read_weights(draw: random.Random, folder: Path) -> Input:
    """A file of weights with other bytes, or of other things than these tensors."""
    tensors, files = weights()
    suffix = draw.choice(sorted(files))
    path = folder / f"weights.{suffix}"
    how = draw.choice(["bytes", "bytes", "object", "tensor", "kind of file"])
    if how == "bytes":
        path.write_bytes(damaged(draw, files[suffix]))
    elif how == "object":
        name = draw.choice(sorted(tensors))
        value = draw.choice([*JUNK, Ran(folder), tensors[name].to_sparse(), tensors[name].to("meta"), torch.tensor(1j)])
        held = {**tensors, draw.choice([name, name, "more", 5, "", "state_dict", "model"]): value}
        torch.save(draw.choice([held, held, held, value, [held], {"state_dict": held}, {"model": value}]), path)
    elif how == "tensor":
        how = other_tensor(draw, files["safetensors"], path)
    else:
        how = unusual(draw, path)

    def call() -> None:
        source = timm_source(Export(model="test_resnet", widths=(1.0, 0.5), checkpoint=path, num_classes=3))
        assert all(tensor.isfinite().all() for tensor in source.model.state_dict().values())

    return call, f"{path.name}: {how}"


class Ran:
    """Makes a file named "ran" when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return open, (str(self.folder / "ran"), "w")


# -- image folders
@functools.cache
def pictures() -> dict[str, bytes]:
    """Return images of many kinds, by name."""
    found = {}
    kinds = {
        "png": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "jpg": ("RGB", "L", "CMYK"), "gif": ("P", "L"),
        "bmp": ("RGB", "1"), "tif": ("RGB", "CMYK", "I;16", "F"), "webp": ("RGB", "RGBA"), "ppm": ("RGB",),
        "pgm": ("L", "I;16"),
    }  # fmt: skip
    formats = {"jpg": "JPEG", "tif": "TIFF", "ppm": "PPM", "pgm": "PPM"}
    for suffix, modes in kinds.items():
        for mode in modes:
            image, file = Image.new(mode, (12, 9), 1 if mode in ("F", "I;16") else None), io.BytesIO()
            image.save(file, formats.get(suffix, suffix.upper()))
            found[f"{mode.replace(';', '')}.{suffix}"] = file.getvalue()
    for suffix in ("gif", "webp", "png", "tif"):
        frames, file = [Image.new("RGB", (8, 8), (step, 0, 0)) for step in range(4)], io.BytesIO()
        frames[0].save(file, formats.get(suffix, suffix.upper()), save_all=True, append_images=frames[1:])
        found[f"animated.{suffix}"] = file.getvalue()
    for size in ((1, 1), (1, 5000), (20_000, 20_000)):
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG")
        found[f"{size[0]}x{size[1]}.png"] = file.getvalue()
    found["postscript.png"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile\nshowpage\n"
    found["pbm.ppm"] = b"P6 100000 100000 255\n"
    found["zero.ppm"] = b"P6 0 0 255\n"
    found["empty.jpg"] = b""
    return found


def read_images(draw: random.Random, folder: Path) -> Input:
    """A folder of images, some of them damaged, between links, pipes and odd names; all that is left is loaded."""
    known, done = pictures(), []
    data = folder / "data"
    parts = draw.choice([[""], [""], [""], ["train", "val"], ["train", "test"], ["train"]])
    for part in parts:
        for name in draw.choice(
            [["cat", "dog"], ["one"], ["a" * 255, "\u00fc\u00df"], ["b'\udcff", "c\nd"], ["train", "x"]]
        ):
            (data / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(draw.choice([0, 1, 2, 6])):
                kind = draw.choice(sorted(known)) if draw.random() < 0.7 else "RGB.png"
                content = known[kind]
                if draw.random() < 0.3:
                    content, kind = damaged(draw, content), f"damaged {kind}"
                suffix = draw.choice([".png", ".JPG", ".gif", Path(kind).suffix, Path(kind).suffix])
                place = data / part / name / draw.choice(["", "", "", "deeper/and/deeper"])
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number}{draw.choice(['', '', '.x', chr(10), chr(0xDCFE)])}{suffix}").write_bytes(content)
                done.append(kind)
    folders = sorted(path for path in data.rglob("*") if path.is_dir() and not path.is_symlink())
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(known["RGB.png"])
    for number in range(draw.choice([0, 0, 1, 2])):
        place = draw.choice(folders) / f"odd{number}.png"
        odd = draw.choice(["fifo", "socket", "out", "folder out", "loop", "up", "in", "dangling", "device", "folder"])
        targets = {
            "out": outside / "secret.png", "folder out": outside, "loop": place.name, "up": "..", "in": "0.png",
            "dangling": "../../../nowhere.png", "device": "/dev/zero",
        }  # fmt: skip
        if odd == "fifo":
            os.mkfifo(place)
        elif odd == "folder":
            place.mkdir()
        elif odd == "socket":
            if len(os.fsencode(place)) < 100:
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(str(place))
        else:
            place.symlink_to(targets[odd])
        done.append(odd)

    def call() -> None:
        said: list[str] = []
        images = folder_images(data, 0, said.append)
        inside = os.path.realpath(data)
        for each in (images.train, images.test):
            assert all(os.path.realpath(path).startswith(inside + os.sep) for path in each.names)  # type: ignore[attr-defined]
            plain = Plain(each, 8)
            assert all(plain[index].shape == (3, 8, 8) for index in range(len(each)))
        views = make_views("supervised", 16, min_crop_scale=0.0, mirror=True)
        keys = Views(images.train, images.train_labels, views, seed=0)
        for view, _ in load(keys, 0, sampler=[(0, index) for index in range(len(images.train))]):
            assert view.isfinite().all()
        assert all(line.isprintable() for text in said for line in text.splitlines())

    return call, ", ".join(done) or "nothing"


# -- the command line
def read_arguments(draw: random.Random, folder: Path) -> Input:
    """Options of any command in any order, with values of any kind, up to where work would begin."""
    names = [flag(each.name) for classes in COMMANDS.values() for options in classes for each in fields(options)]
    command = draw.choice([*COMMANDS, *COMMANDS, *COMMANDS, "dance", "--help", ""])
    own = [flag(each.name) for options in COMMANDS.get(command, ()) for each in fields(options)]
    values = [
        "0", "1", "-1", "2", "0.5", "nan", "inf", "1e999", "9" * 400, "all", "knn", "", " ", "\0", "\n", "\udcff",
        "x" * 5000, "--", "-", "-h", "@x", "mocov2", "byol", "kl", "digits", str(folder), "resnet18", "=", "0x1", "1_0",
        "\u0663", *PRESETS,
    ]  # fmt: skip
    line = [command]
    for _ in range(draw.choice([0, 1, 1, 2, 2, 3, 8])):
        name = draw.choice(own or names) if draw.random() < 0.9 else draw.choice(names)
        line += draw.choice(
            [[name], [name, draw.choice(values)], [f"{name}={draw.choice(values)}"], [draw.choice(values)]]
        )
    if draw.random() < 0.05:
        line[draw.randrange(len(line))] = str(draw.choice(JUNK))

    def call() -> None:
        try:
            command, given = parse(line)
        except SystemExit:  # after a help text
            return
        *others, own = COMMANDS[command]
        check(own(**{each.name: given.pop(each.name) for each in fields(own) if each.name in given}))
        if others:
            config = configure(given)
            assert config == PretrainConfig(**json.loads(config.to_json()))

    return call, ascii(line)[:200]


READERS = {
    "config.json": read_configuration,
    "checkpoint": read_checkpoint,
    "tables": read_table,
    "weights": read_weights,
    "images": read_images,
    "arguments": read_arguments,
}
