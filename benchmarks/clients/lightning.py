"""lightly's examples for PyTorch Lightning, which run no loop of their own; see docs/how-to/clients.md.

python -m benchmarks.clients.lightning --programs FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning
import torch
import torchvision
from torch import Tensor

from benchmarks.clients import difference, records
from benchmarks.clients.client import HERE, Client
from benchmarks.clients.measure import WrongError, check_extracted, tried
from benchmarks.clients.programs import Run
from benchmarks.measuring import environment

COPIED = "`slimify` in the constructor, before the momentum encoder is copied"
LATER = "a list of the student's modules for the recipe, since the criterion is made after `slimify`"
BANK = "lightly keeps its memory bank out of checkpoints, so the plain program cannot be resumed either"
EPOCHS = 2


def example(name: str, **more: Any) -> Client:
    return Client(f"lightning/{name}", f"lightly/examples/pytorch_lightning/{name}.py", **more)


CLIENTS = [
    example("barlowtwins"),
    example("byol", needs=COPIED),
    example("moco", needs=f"{COPIED}; {LATER}; {BANK}"),
    example("nnclr", needs=BANK),
    example("simclr"),
    example("simsiam"),
]


class Noise(torch.utils.data.Dataset[Any]):
    """Two views of each of 16 images, the same in every epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.views = torch.rand(16, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return list(self.views[index]), 0


class Watch(pytorch_lightning.Callback):
    """Notes the loss of each step, and ends training early."""

    def __init__(self, epochs: int) -> None:
        self.epochs, self.losses = epochs, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the loss."""
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop after the last epoch that is wanted."""
        trainer.should_stop |= trainer.current_epoch + 1 == self.epochs


@contextmanager
def stand_ins(watch: Watch, resume: Path | None, saved: Path) -> Iterator[None]:
    """Let a program meet noise, small batches on the CPU, and a Trainer that is watched."""
    trainer, loader = pytorch_lightning.Trainer, torch.utils.data.DataLoader
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)

    class Trainer(trainer):
        def __init__(self, callbacks: Any = (), **options: Any) -> None:
            options.update(quiet, max_epochs=EPOCHS, accelerator="cpu")
            super().__init__(callbacks=[*callbacks, watch], **options)

        def fit(self, model: Any, train_dataloaders: Any) -> None:
            torch.manual_seed(1)
            super().fit(model, train_dataloaders, ckpt_path=resume)
            self.save_checkpoint(saved)

    class Loader(loader):
        def __init__(self, dataset: Any, **options: Any) -> None:
            super().__init__(dataset, batch_size=4)

    with (
        mock.patch.object(pytorch_lightning, "Trainer", Trainer),
        mock.patch.object(torch.utils.data, "DataLoader", Loader),
        mock.patch.object(torchvision.datasets, "CIFAR10", Noise),
    ):
        yield


def run(text: str, folder: Path, epochs: int = EPOCHS, resume: Path | None = None) -> Run:
    torch.manual_seed(0)
    watch, saved, names = Watch(epochs), folder / f"{epochs}.ckpt", {"__name__": "__main__"}
    with stand_ins(watch, resume, saved):
        exec(compile(text, "program", "exec"), names)
    model, recipe = names["model"], names.get("recipe")
    widths = [{width: float(loss) for width, loss in recipe.losses.items()}] if recipe else []
    return Run(losses=watch.losses, widths=widths, end=dict(model.state_dict()), names=names)


def check_same(expected: Run, found: Run, since: int = 0) -> None:
    if expected.losses[since:] != found.losses:
        raise WrongError(f"losses {found.losses[:3]}, expected {expected.losses[since:][:3]}")
    other = [name for name, tensor in expected.end.items() if not torch.equal(found.end[name], tensor)]
    if other:
        raise WrongError(f"at the end different: {', '.join(other[:3])}")


def check_widths(plain: Run, slim: Run, start: dict[str, Tensor]) -> None:
    if slim.losses[0] != plain.losses[0]:
        raise WrongError(f"the first loss of the widest is {slim.losses[0]}, plain {plain.losses[0]}")
    if len(slim.widths[0]) < 2 or not all(map(torch.isfinite, map(torch.tensor, slim.widths[0].values()))):
        raise WrongError(f"losses at the end: {slim.widths[0]}")
    still = [name for name in start if ".narrow." in name and "num_batches" not in name]
    still = [name for name in still if "momentum" not in name and torch.equal(start[name], slim.end[name])]
    if still:
        raise WrongError(f"not trained: {', '.join(still[:3])}")


def measure(client: Client, checkouts: Path, folder: Path) -> dict[str, Any]:
    """Return the record of a client, as `benchmarks.clients.measure` does for loops."""
    text = (checkouts / client.source).read_text()
    hunks = (HERE / f"{client.name}.diff").read_text()
    after = difference.apply(hunks, text)
    change = difference.count(text, after)
    converted = difference.apply(hunks, text, difference.converts)
    plain, slim, half = run(text, folder), run(after, folder), run(after, folder, epochs=1)
    return {
        "name": client.name,
        "program": hashlib.sha256(text.encode()).hexdigest()[:12],
        "added": change.added,
        "removed": change.removed,
        "indented": change.indented,
        "needs": client.needs,
        "steps": len(plain.losses),
        "equal at 1.0": tried(lambda: check_same(plain, run(converted, folder))),
        "all widths": tried(lambda: check_widths(plain, slim, half.end)),
        "resumed": tried(lambda: check_same(slim, run(after, folder, resume=folder / "1.ckpt"), len(half.losses))),
        "extracted": tried(lambda: check_extracted(client, slim)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True, help="folder with a checkout of each repository")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = {record["name"] for record in records.read() if records.holds(record)}
    for client in CLIENTS:
        if client.name in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            record = {**measure(client, arguments.programs, Path(folder)), **environment()}
        records.write(record)
        print(record, flush=True)
        (records.FOLDER / "table.md").write_text(records.table(records.read()))


if __name__ == "__main__":
    main()
