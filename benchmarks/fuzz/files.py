"""Files for `slimmable.load` and `load_slimclr`: other bytes, headers, descriptions, tensors, and foreign files."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import slimmable
from benchmarks.fuzz.mutations import changed, damaged, text
from slimmable._atomic import write_tensors
from tests.life.test_slimclr_checkpoint import resnet50

Call = Callable[[], object]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
KINDS = ("whole", "half", "universal", "own", "gated")


class Runs:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def chain() -> nn.Module:
    """A network of convolutions without a recipe."""
    sizes = (3, 8, 16, 12)
    layers = [[nn.Conv2d(*pair, 3, padding=1), nn.BatchNorm2d(pair[1]), nn.ReLU()] for pair in pairwise(sizes)]
    return nn.Sequential(*(each for block in layers for each in block), nn.Flatten(), nn.Linear(12 * 32 * 32, 3))


@cache
def good(kind: str) -> tuple[dict[str, Tensor], dict[str, Any], bytes, nn.Module]:
    """Return the tensors, the description and the bytes of a good file, and the model in it."""
    torch.manual_seed(0)
    widths, universal = (1.0, 0.5, 0.25), kind == "universal"
    plain = chain() if kind in ("own", "gated") else timm.create_model("test_resnet", num_classes=3)
    model = slimmable.slimify(plain, widths, example_inputs=IMAGES, universal=universal).eval()
    if kind == "half":
        model = slimmable.extract(model, 0.5)
    if kind == "universal":
        slimmable.calibrate_bn(model, [IMAGES], [0.4])
    if kind == "gated":
        model = slimmable.gating.gate(model, example_inputs=IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        slimmable.save(model, path)
        with safe_open(path, framework="pt") as file:
            description = json.loads(json.loads(file.metadata()["slimmable"])["model"])
        return load_file(path), description, path.read_bytes(), model


def load(draw: random.Random, folder: Path) -> tuple[Call, str]:
    """Make a file that is not what `slimmable.save` wrote."""
    kind = draw.choice(KINDS)
    tensors, description, data, _ = good(kind)
    path, same = folder / "model.safetensors", True
    how = draw.choice(["bytes", "header", "description", "description", "description", "tensors", "foreign"])
    if how == "bytes":
        path.write_bytes(damaged(draw, data))
        what = "other bytes"
    elif how == "header":
        length = int.from_bytes(data[:8], "little")
        header, what = changed(draw, json.loads(data[8 : 8 + length]))
        said = text(header).encode(errors="replace")
        path.write_bytes(len(said).to_bytes(8, "little") + said + data[8 + length :])
    elif how == "description":
        what = ""
        for _ in range(draw.choice([1, 1, 2, 5])):
            if isinstance(description, (dict, list)):
                description, where = changed(draw, description)
                what += f"{where}; "
        said = text(description)
        said = draw.choice([said] * 20 + [said + "}", said[:-1], said.replace('"', "'", 1)])
        write_tensors(path, tensors, {"format": "slimmable 2", "model": said})
    elif how == "tensors":
        tensors, what = other_tensors(draw, tensors)
        same = False
        write_tensors(path, tensors, {"format": "slimmable 2", "model": json.dumps(description)})
    else:
        what = foreign(draw, path)

    def call() -> object:
        model = slimmable.load(path, chain() if kind in ("own", "gated") else None)
        check(model, good(kind)[3], load_file(path), same)
        return model

    return call, f"{kind}, {how}: {what}"


def check(model: nn.Module, expected: nn.Module, tensors: dict[str, Tensor], same: bool) -> None:
    """Assert that a model has the classes of the expected one, the tensors of its file, and the same outputs."""
    assert [type(module).__name__ for module in model.modules()] == [type(m).__name__ for m in expected.modules()]
    state = model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) or tensor.isnan().any() for name, tensor in state.items())
    with torch.no_grad():
        if same:
            torch.testing.assert_close(model(IMAGES), expected(IMAGES), rtol=1e-5, atol=1e-5)


def other_tensors(draw: random.Random, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return tensors of which a few are others, are gone, or have other names, shapes, types or values."""
    tensors, said = dict(tensors), []
    for _ in range(draw.choice([1, 1, 2, 10])):
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        how = draw.choice(["shape", "type", "gone", "more", "name", "nan", "empty", "huge number", "swapped"])
        if how == "shape":
            tensors[name] = draw.choice([tensor[None], tensor.reshape(-1), tensor[:1] if tensor.ndim else tensor[None]])
        elif how == "type":
            kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64)
            tensors[name] = tensor.to(draw.choice(kinds))
        elif how == "gone":
            del tensors[name]
        elif how in ("more", "name"):
            other = draw.choice([f"{name}.0", "x" * 300, "slimmable/buffer/x", "slimmable/units", "narrow", "", "é\t"])
            tensors[other] = tensors.pop(name) if how == "name" else tensor.clone()
        elif how == "empty":
            tensors[name] = tensor.new_zeros(draw.choice([(0,), (0, 10**9), ()]))
        elif how == "swapped":
            other = draw.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other], tensor
        else:
            value = float("nan") if how == "nan" else 1e38
            tensors[name] = torch.full_like(tensor, value if tensor.is_floating_point() else -(2**31))
        said.append(f"{how} {name[:60]}")
    return tensors, ", ".join(said)


def foreign(draw: random.Random, path: Path) -> str:
    """Write something else, and say what."""
    code = Runs(path.parent / "ran")
    how = draw.choice(["noise", "nothing", "pickle", "torch.save", "tar", "bomb", "folder", "length", "text", "link"])
    if how == "noise":
        path.write_bytes(draw.randbytes(draw.choice([1, 8, 9, 1000, 100_000])))
    elif how == "nothing":
        path.write_bytes(b"")
    elif how == "pickle":
        path.write_bytes(pickle.dumps(draw.choice([code, {"state_dict": code}, [code]])))
    elif how == "torch.save":
        torch.save({"state_dict": {"weight": code}}, path)
    elif how == "tar":
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("../../ran")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"code"))
    elif how == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("archive/data.pkl", "archive/version", "archive/data/0", "../../ran"):
                archive.writestr(name, bytes(draw.choice([1, 10**7])))
    elif how == "folder":
        path.mkdir()
    elif how == "length":
        path.write_bytes(draw.choice([2**63, 2**31, 2**64 - 1, 10**8]).to_bytes(8, "little") + b"{}" * 100)
    elif how == "text":
        path.write_text(
            draw.choice(["{}", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "[" * 10**5])
        )
    else:
        path.symlink_to(draw.choice([path, path.parent, Path("/dev/null"), Path("/nowhere/else")]))
    return how


# -- checkpoints of SlimCLR
@cache
def published() -> dict[str, Tensor]:
    return resnet50().state_dict()


def odd_tensors() -> list[Tensor]:
    """Return tensors that are sparse, nested, quantised, without memory, or larger than their memory."""
    return [
        torch.zeros(3).to_sparse(),
        torch.zeros(1).expand(2**30),
        torch.empty(3, device="meta"),
        torch.nested.nested_tensor([torch.zeros(2)]),
        torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        torch.zeros(2, dtype=torch.complex64),
    ]


def load_slimclr(draw: random.Random, folder: Path) -> tuple[Call, str]:
    """Make a checkpoint that is not one of the published code, or one with something else in it."""
    path = folder / "checkpoint.pth"
    how = draw.choice(["bytes", "entries", "entries", "values", "foreign"])
    whole = draw.random() < 0.05
    state: dict[Any, Any] = dict(published())
    if not whole:
        state = {name: state[name].flatten()[:4].clone() for name in draw.sample(sorted(state), 20)}
    if how == "foreign":
        what = foreign(draw, path)
    else:
        what = "the same"
        if how == "entries":
            state, what = other_tensors(draw, state)
        elif how == "values":
            value: Any = draw.choice([None, 1, "x", [1], {"a": 1}, 10**5000, float("nan"), *odd_tensors()])
            names = ["a\0b", "features.", "module." * 1000, *sorted(state)[:3]]
            key: Any = draw.choice([1, 10**5000, None, (1, 2), *names])
            state[key] = value
            what = f"{type(value).__name__} at a {type(key).__name__}"
        data: Any = draw.choice([state, {"state_dict": state, "epoch": 1}, {"state_dict": [state]}, [state]])
        if draw.random() < 0.5 and isinstance(data, dict) and "state_dict" in data:
            named = [(name, each) for name, each in state.items() if isinstance(name, str)]
            data = {"state_dict": {f"module.encoder_q.{name}": each for name, each in named}}
        stream = io.BytesIO()
        torch.save(data, stream, _use_new_zipfile_serialization=draw.random() < 0.8)
        written = stream.getvalue()
        path.write_bytes(damaged(draw, written) if how == "bytes" else written)

    def call() -> object:
        model = slimmable.load_slimclr(path)
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        return model

    return call, f"{how}: {what}"


READERS = {"load": load, "load_slimclr": load_slimclr}
