"""Run a published program on stand-in data, watched from outside: its losses, its state, and what it would save."""

from __future__ import annotations

import contextlib
import io
import os
import pkgutil
import random
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

import slimmable
from benchmarks.clients.client import Client, instead

BATCH, BATCHES = 4, 2  # images in a batch, batches in an epoch
State = dict[str, Any]


@dataclass
class Run:
    """What a program did.

    Attributes:
        losses: the loss of the widest width at each step.
        widths: width -> loss at each step, if a recipe trained it.
        begin, first, end: the state of everything that the program trains or keeps: before the first step, after its
            backward pass, and at the end.
        saved: a checkpoint made before epoch `keep_at`, as bytes.
        names: the program's own names at the end.
    """

    losses: list[float] = field(default_factory=list)
    widths: list[dict[float, float]] = field(default_factory=list)
    begin: State = field(default_factory=dict)
    first: State = field(default_factory=dict)
    end: State = field(default_factory=dict)
    saved: bytes = b""
    names: dict[str, Any] = field(default_factory=dict)


def run(
    client: Client,
    texts: Mapping[str, str],
    checkouts: Path,
    keep_at: int | None = None,
    resume: tuple[int, Run] | None = None,
) -> Run:
    """Run a program in a copy of its folder below `checkouts`, with the `texts` of some of its files instead of theirs.

    Args:
        keep_at: the epoch before which a checkpoint is made.
        resume: an epoch and the run whose checkpoint is loaded before it; the epochs before it have no batches.
    """
    torch.use_deterministic_algorithms(True)  # what torch.empty holds too
    _seed(0)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        place = Path(name).resolve() / "program"
        shutil.copytree((checkouts / client.source).parent, place, ignore=shutil.ignore_patterns(".git"))
        for file, text in texts.items():
            (place / file).write_text(text)
        path, watched = place / client.file, _Watched(str(place), keep_at, resume)
        main = types.ModuleType("__main__")
        main.__dict__.update(__file__=str(path), __builtins__=__builtins__)
        stack.callback(os.chdir, os.getcwd())
        os.chdir(place)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(mock.patch.object(sys, "argv", [str(path), *client.arguments]))
        stack.enter_context(mock.patch.object(sys, "path", [str(place), *sys.path]))
        stack.enter_context(_own_modules(main, place))
        loaders = {"torch.utils.data.DataLoader": instead(watched.loader())}
        for target, stand_in in {**STAND_INS, **loaders, **client.stand_ins}.items():
            stack.enter_context(mock.patch(target, stand_in(pkgutil.resolve_name(target))))
        stack.enter_context(watched.steps())
        exec(compile(path.read_text(), str(path), "exec"), main.__dict__)
    return watched.done


@contextlib.contextmanager
def _own_modules(main: types.ModuleType, place: Path) -> Iterator[None]:
    """Let `main` be the main module, and forget what the program imports from its own folder."""
    with mock.patch.dict(sys.modules):
        sys.modules["__main__"] = main
        yield
        kept = {name: module for name, module in sys.modules.items() if not _from(module, place)}
    sys.modules.update({name: module for name, module in kept.items() if name != "__main__"})


def _from(module: Any, place: Path) -> bool:
    return str(getattr(module, "__file__", None) or "").startswith(str(place))


class Images(Dataset[Any]):
    """Stands in for a data set: a few images of noise in four classes, with the program's transforms."""

    def __init__(self, *arguments: Any, transform: Any = None, target_transform: Any = None, **options: Any) -> None:
        self.transform, self.target_transform = transform or (lambda image: image), target_transform or (lambda y: y)

    def __len__(self) -> int:
        return BATCH * BATCHES

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        if place >= len(self):
            raise IndexError(place)
        noise = np.random.default_rng(place).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        return self.transform(Image.fromarray(noise)), self.target_transform(place % 4)


STAND_INS: dict[str, Callable[[Any], Any]] = {
    f"torchvision.datasets.{name}": instead(Images)
    for name in ("CIFAR10", "CIFAR100", "ImageFolder", "ImageNet", "STL10", "VOCDetection")
}


class _Watched:
    """Notes what a program does at each step, and makes or loads its checkpoint between epochs."""

    def __init__(self, folder: str, keep_at: int | None, resume: tuple[int, Run] | None) -> None:
        self.folder, self.keep_at = folder, keep_at
        self.resume_at, self.origin = resume if resume is not None else (0, None)
        self.done = Run()
        self._training: Any = None  # the loader that the program iterates first
        self._inside = False  # of recipe.backward

    def loader(self) -> type[DataLoader[Any]]:
        """Return a class of loaders of small batches: each epoch has its own views, whatever ran before."""
        watched = self

        class Loader(DataLoader[Any]):
            epoch = -1

            def __init__(self, dataset: Any, batch_size: int = 1, **options: Any) -> None:
                options |= {"num_workers": 0, "pin_memory": False}
                for name in ("persistent_workers", "prefetch_factor", "worker_init_fn"):
                    options.pop(name, None)
                if options.get("batch_sampler") is None:
                    options["batch_size"] = BATCH
                super().__init__(dataset, **options)

            def __iter__(self) -> Iterator[Any]:
                self.epoch += 1
                watched.between_epochs(self, self.epoch)
                if watched.origin is not None and self.epoch < watched.resume_at:
                    return iter(())
                with _seeded(self.epoch):
                    return iter(list(super().__iter__()))

        return Loader

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Note the loss and the state at each backward pass of the program."""
        backward = Tensor.backward

        def noting(tensor: Tensor, *arguments: Any, **options: Any) -> None:
            backward(tensor, *arguments, **options)
            if not self._inside:
                self.note(float(tensor.detach()))

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(Tensor, "backward", noting))
            if hasattr(slimmable.SlimRecipe, "backward"):
                recipes = slimmable.SlimRecipe.backward

                def all_widths(recipe: Any, *arguments: Any, **options: Any) -> Any:
                    self._inside = True
                    try:
                        loss = recipes(recipe, *arguments, **options)
                    finally:
                        self._inside = False
                    self.done.widths.append({width: float(found) for width, found in recipe.losses.items()})
                    self.note(float(loss))
                    return loss

                stack.enter_context(mock.patch.object(slimmable.SlimRecipe, "backward", all_widths))
            yield
            self.done.end = state(self.done.names)

    def note(self, loss: float) -> None:
        self.done.losses.append(loss)
        self.done.names = names(self.folder)
        if not self.done.first:
            self.done.first = state(self.done.names)

    def between_epochs(self, loader: object, epoch: int) -> None:
        self._training = self._training or loader
        if loader is not self._training:
            return
        here = names(self.folder)
        if epoch == 0:
            self.done.begin = state(here)
        if epoch == self.keep_at:
            self.done.saved = checkpoint(here)
        if self.origin is not None and epoch == self.resume_at:
            load(here, self.origin.saved)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - transforms draw from it


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw other random numbers for a while, and go on as if nothing had been drawn."""
    kept = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    _seed(seed)
    yield
    torch.set_rng_state(kept[0])
    random.setstate(kept[1])
    np.random.set_state(kept[2])  # noqa: NPY002


def names(folder: str) -> dict[str, Any]:
    """Return what the running program calls what it saves or trains: anything with a state dict, by its name.

    Functions of the program that are running are searched from the outermost in. Of modules that have parts in
    common, such as a model and its backbone, the one that is trained is taken.
    """
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(folder):
            frames.append(frame)
        frame = frame.f_back
    found: dict[str, Any] = {}
    for frame in reversed(frames):
        for name, value in {**frame.f_globals, **frame.f_locals}.items():
            keeps = callable(getattr(value, "state_dict", None)) and hasattr(value, "load_state_dict")
            if (
                keeps
                and not isinstance(value, type | types.ModuleType)
                and not any(value is other for other in found.values())
            ):
                found.setdefault(name, value)
    groups = [group for value in found.values() if isinstance(value, Optimizer) for group in value.param_groups]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    modules = {name: value for name, value in found.items() if isinstance(value, nn.Module)}

    def rank(name: str) -> tuple[int, int]:  # what is trained first, with as little else as possible
        own = {id(parameter) for parameter in modules[name].parameters()}
        return -len(own & trained), len(own - trained)

    taken: set[int] = set()
    for name in sorted(modules, key=rank):
        parts = {id(part) for part in modules[name].modules()}
        if parts & taken:
            del found[name]
        taken |= parts
    return found


def state(objects: Mapping[str, Any]) -> State:
    """Return all tensors and numbers that modules hold, in their state dict or not."""
    found: State = {}
    for name, module in objects.items():
        if not isinstance(module, nn.Module):
            continue
        tensors = {**dict(module.named_buffers()), **module.state_dict()}
        found |= {f"{name}.{key}": value.detach().clone() for key, value in tensors.items()}
        for place, part in _own_parts(module):
            for key, value in vars(part).items():
                if f"{key}_g" in part._parameters:  # computed anew in each forward, by weight_norm
                    continue
                if isinstance(value, Tensor) and value.grad_fn is None:
                    found[f"{name}.{place}.{key}"] = value.detach().clone()
                elif isinstance(value, int | float) and not key.startswith("_slim"):
                    found[f"{name}.{place}.{key}"] = value
    return found


def _own_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the program's own modules with their names; a wrapper keeps notes of its own between processes."""
    return ((name, part) for name, part in module.named_modules() if not isinstance(part, DistributedDataParallel))


def checkpoint(objects: Mapping[str, Any]) -> bytes:
    """Return what a user would save: state dicts, random numbers, and what lightly's modules keep out of their own.

    A memory bank is a buffer that is not persistent, a covariance matrix a plain attribute. Programs that go on exactly
    have to save them too, so criteria and banks are kept whole.
    """
    file = io.BytesIO()
    states = {name: value.state_dict() for name, value in objects.items()}
    rest = {name: _rest(value) for name, value in objects.items() if isinstance(value, nn.Module)}
    torch.save({"states": states, "rest": rest, "torch": torch.get_rng_state(), "python": random.getstate()}, file)
    return file.getvalue()


def load(objects: Mapping[str, Any], saved: bytes) -> None:
    found = torch.load(io.BytesIO(saved), weights_only=False)
    for name, value in objects.items():
        value.load_state_dict(found["states"][name])
        for place, attributes in found["rest"].get(name, {}).items():
            part = value.get_submodule(place)
            for key, kept in attributes.items():
                (part._buffers if key in part._buffers else vars(part))[key] = kept
    torch.set_rng_state(found["torch"])
    random.setstate(found["python"])


def _rest(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the tensors and numbers that a module keeps, but leaves out of its state dict, by submodule."""
    found: dict[str, dict[str, Any]] = {}
    for place, part in _own_parts(module):
        loose = {key: part._buffers[key] for key in part._non_persistent_buffers_set}
        loose |= {key: value for key, value in vars(part).items() if isinstance(value, Tensor | int | float)}
        if loose:
            found[place] = loose
    return found
