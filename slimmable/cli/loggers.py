"""Progress of a training on the terminal, and its metrics in a CSV file, TensorBoard or Weights & Biases."""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimmable._atomic import write_aside
from slimmable._tables import csv_text
from slimmable.cli.config import require, say
from slimmable.errors import CheckpointError

Values = Mapping[str, float]


class Logger:
    """Writes the metrics of a step under flat names such as `train_loss/w0.5`."""

    def log(self, step: int, values: Values) -> None:
        """Write the metrics of one step."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write to disk what is still buffered; by default nothing is."""


class CsvLog(Logger):
    """A file with a line for each logged step; a resumed run keeps the lines of the steps that are done."""

    def __init__(self, path: Path, columns: Sequence[str], done: int) -> None:
        names = ("step", *columns)
        kept = read_rows(path, done)
        if kept and tuple(kept[0]) != names:
            raise CheckpointError(f"{path} has columns other than {', '.join(names)}; move it away, then resume")
        write_aside(path, lambda aside: aside.write_text(csv_text(names, kept)))
        self.path = path
        self.file = path.open("a", newline="", buffering=1)  # line by line, so none is written in part
        self.writer = csv.DictWriter(self.file, names, lineterminator="\n")

    def log(self, step: int, values: Values) -> None:
        """Write a line; the cell of a width that did not run stays empty."""
        try:
            self.writer.writerow({"step": step, **{name: f"{value:.6g}" for name, value in values.items()}})
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path} ({error})") from error


class TensorBoard(Logger):
    """TensorBoard's event files in a folder."""

    def __init__(self, folder: Path, done: int) -> None:
        purge = done + 1 if done else None
        self.writer: Any = require_logger("tensorboard").SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, values: Values) -> None:
        """Add a point to the curve of each name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write to disk what is still buffered."""
        self.writer.flush()


class WandB(Logger):
    """A run of Weights & Biases, whose id follows from the folder, so resuming finds it again."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        own = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        known = {"id": own, "name": folder.name, "dir": str(folder), "config": dict(settings)}
        self.run: Any = require_logger("wandb").init(project="slimmable", resume="allow", **known)

    def log(self, step: int, values: Values) -> None:
        """Send the metrics of one step."""
        self.run.log(dict(values), step=step)


def require_logger(name: str) -> Any:
    """Import and return the module that the logger of this name needs; no extra of this package installs it."""
    return require({"tensorboard": "torch.utils.tensorboard"}.get(name, name), name, extra=None)


def read_rows(path: Path, last: int) -> list[dict[str, str]]:
    """Return the rows of a CSV file up to the step `last`, none without a file; refuse incomplete or other rows."""
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file, strict=True) if int(row["step"]) <= last]
        for row in rows:
            [float(cell) for cell in row.values() if cell != ""]  # fails on missing or extra cells, too
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); move it away, then resume") from error
    return rows


def make_loggers(
    folder: Path, columns: Sequence[str], done: int, asked: Sequence[str], settings: Mapping[str, Any]
) -> list[Logger]:
    """Return the loggers of a run with `done` steps done: the CSV file, and those that are `asked` for."""
    loggers: list[Logger] = []
    if "tensorboard" in asked:
        loggers.append(TensorBoard(folder / "tensorboard", done))
    if "wandb" in asked:
        loggers.append(WandB(folder, settings))
    return [CsvLog(folder / "losses.csv", columns, done), *loggers]


class Progress:
    """Progress of a run as a bar on a terminal, and otherwise as a line after each epoch; use it in a `with` block.

    Of the run's `steps`, `done` are done before.
    """

    def __init__(self, steps: int, done: int, steps_per_epoch: int) -> None:
        self.steps, self.done, self.steps_per_epoch = steps, done, steps_per_epoch
        self.start, self.first = time.monotonic(), done
        bar: Any = require("tqdm", "tqdm").tqdm  # None disables it where there is no terminal
        self.bar = bar(total=steps, initial=done, unit="step", dynamic_ncols=True, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        say(text) if self.bar.disable else self.bar.write(text)

    def advance(self, losses: dict[float, float]) -> None:
        """Count one step and show its loss at each width."""
        self.done += 1
        shown = "  ".join(f"{width:g}: {loss:.3f}" for width, loss in losses.items())
        self.bar.set_postfix_str(f"loss at {shown}", refresh=False)
        self.bar.update()
        if self.bar.disable and self.done % self.steps_per_epoch == 0:
            epoch, epochs = self.done // self.steps_per_epoch, self.steps // self.steps_per_epoch
            left = (time.monotonic() - self.start) / (self.done - self.first) * (self.steps - self.done)
            say(f"epoch {epoch}/{epochs}  loss at {shown}  ({left:.0f} s left)")
