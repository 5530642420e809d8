"""Where the figures of a training go: a CSV file always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from slimmable.cli.extras import require

LOG = "losses.csv"
LOGGERS = ("tensorboard", "wandb")
Values = Mapping[str, float]


class Logger(Protocol):
    """Takes the figures of a step under flat names such as `train_loss/w0.5`."""

    def log(self, step: int, values: Values) -> None:
        """Take the figures of one step."""

    def flush(self) -> None:
        """Bring to the disk what was taken."""


class CsvLog:
    """A file with a line for each logged step; a run that goes on keeps the lines of the steps that it has done."""

    def __init__(self, path: Path, columns: Sequence[str], done: int) -> None:
        kept = []
        if done and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= done]
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, ("step", *columns), lineterminator="\n")
        self.writer.writeheader()
        self.writer.writerows(kept)

    def log(self, step: int, values: Values) -> None:
        """Write a line; a width that did not run has no figure."""
        self.writer.writerow({"step": step, **{name: f"{value:.6g}" for name, value in values.items()}})

    def flush(self) -> None:
        """Bring to the disk what was taken."""
        self.file.flush()


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path, done: int) -> None:
        make: Any = require("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.writer = make(str(folder), purge_step=done + 1 if done else None)

    def log(self, step: int, values: Values) -> None:
        """Add a point to the curve of each name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring to the disk what was taken."""
        self.writer.flush()


class WandB:
    """A run of Weights & Biases; the folder makes its id, so that resuming finds it again."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        init: Any = require("wandb", "wandb").init
        own = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.run = init(
            project="slimmable", id=own, name=folder.name, dir=str(folder), config=dict(settings), resume="allow"
        )

    def log(self, step: int, values: Values) -> None:
        """Send the figures."""
        self.run.log(dict(values), step=step)

    def flush(self) -> None:
        """Nothing to do: it sends by itself."""


def make_loggers(
    folder: Path, columns: Sequence[str], done: int, asked: Sequence[str], settings: Mapping[str, Any]
) -> list[Logger]:
    """Return the loggers of a run of which `done` steps are done.

    Raises: MissingPackageError: if TensorBoard or W&B is asked for and not installed.
    """
    loggers: list[Logger] = []
    if "tensorboard" in asked:
        loggers.append(TensorBoard(folder / "tensorboard", done))
    if "wandb" in asked:
        loggers.append(WandB(folder, settings))
    return [CsvLog(folder / LOG, columns, done), *loggers]
