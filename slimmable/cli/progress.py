"""Telling how far a run is: a bar on a terminal, one line per epoch otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from slimmable.cli.extras import require


def say(text: str) -> None:
    """Print a line at once, also through a pipe."""
    print(text, flush=True)


class Progress:
    """Shows steps as they are done; use it in a `with` block.

    Args:
        steps: number of steps of the whole run.
        done: steps done before.
        steps_per_epoch: in plain text, a line is printed after each epoch.
    """

    def __init__(self, steps: int, done: int, steps_per_epoch: int) -> None:
        self.steps, self.done, self.steps_per_epoch = steps, done, steps_per_epoch
        self.start, self.first = time.monotonic(), done
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self.bar = require("tqdm", "tqdm").tqdm(
                total=self.steps, initial=self.done, unit="step", dynamic_ncols=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def note(self, text: str) -> None:
        """Print a line beside the bar."""
        say(text) if self.bar is None else self.bar.write(text)

    def advance(self, losses: dict[float, float]) -> None:
        """Count one step; `losses` are shown by width."""
        self.done += 1
        shown = "  ".join(f"{width:g}: {loss:.3f}" for width, loss in losses.items())
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(f"loss at {shown}", refresh=False)
        elif self.done % self.steps_per_epoch == 0:
            epoch, epochs = self.done // self.steps_per_epoch, self.steps // self.steps_per_epoch
            left = (time.monotonic() - self.start) / (self.done - self.first) * (self.steps - self.done)
            say(f"epoch {epoch}/{epochs}  loss at {shown}  ({left:.0f} s left)")
