"""`slimmable pretrain`: pre-train a slimmable network, evaluate every width, and leave it all in a run folder."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from slimmable._errors import CheckpointError, UsageError
from slimmable._files import write_aside
from slimmable.cli.checkpoint import load_checkpoint, save_checkpoint
from slimmable.cli.config import PretrainConfig
from slimmable.cli.progress import Progress, say
from slimmable.cli.run import CHECKPOINT, CONFIG, evaluate_run, load_images, new_network, save_subnetworks
from slimmable.cli.training import Training

INTERRUPTED = 130


def pretrain(config: PretrainConfig, folder: Path, device: torch.device, resume: bool) -> int:
    """Train from the start, or from the last checkpoint, then evaluate; return the exit code.

    Raises: SlimmableError: for data, models and checkpoints that cannot be used.
    """
    begin = time.monotonic()
    if not resume:
        refuse_existing(folder)
    images = load_images(config)
    training = Training(config, new_network(config, images.channels), images, device)
    checkpoint = folder / CHECKPOINT
    if resume and checkpoint.exists():
        training.resume(load_checkpoint(checkpoint))
        say(f"going on after step {training.step} of {training.steps}")
    if not resume:
        start_folder(folder, config)
    say(
        f"pre-training {config.model} at widths {', '.join(f'{width:g}' for width in config.widths)} on "
        f"{len(images.train)} images of {images.size} x {images.size} pixels for {config.epochs} epochs; "
        f"narrower widths join after {config.slow_start:.0%}"
    )
    try:
        if not _train(training, checkpoint):
            raise KeyboardInterrupt
        save_subnetworks(folder, training.network.backbone, config.widths)
        say(evaluate_run(config, folder, training.network, images))
    except KeyboardInterrupt:
        say(f"interrupted after step {training.step} of {training.steps}; go on with: {resume_command(folder)}")
        return INTERRUPTED
    say(f"{folder} holds the results, after {time.monotonic() - begin:.0f} s")
    return 0


def refuse_existing(folder: Path) -> None:
    """Raise UsageError if there is something in the way of a new run."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists; add --resume to go on with it, or choose another folder with --output")


def start_folder(folder: Path, config: PretrainConfig) -> None:
    """Make the run folder with its configuration."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the run folder {folder} ({error})") from error
    write_aside(folder / CONFIG, lambda path: path.write_text(config.to_json()))


def resume_command(folder: Path) -> str:
    """The command line that goes on with the run in `folder`."""
    return f"slimmable pretrain --output {folder} --resume"


def _train(training: Training, checkpoint: Path) -> bool:
    """Take the remaining steps, with a checkpoint after every epoch; return False if interrupted before the end."""

    def save() -> None:
        save_checkpoint(checkpoint, training.network, training.tensors(), training.step)

    with _interruptible() as asked, Progress(training.steps, training.step, training.steps_per_epoch) as progress:
        while training.step < training.steps:
            progress.advance(training.take_step())
            if asked or training.step % training.steps_per_epoch == 0:
                save()
            if asked:
                return training.step == training.steps
    return True


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collect the first interrupt (Ctrl-C or a request to terminate) in a list; a second one stops at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
