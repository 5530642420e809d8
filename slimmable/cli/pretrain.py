"""`slimmable pretrain`: pre-train a slimmable network, evaluate every width, and write the run folder."""

import signal
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from slimmable._atomic import write_aside
from slimmable._distributed import any_process, is_first
from slimmable.cli import run as runs
from slimmable.cli.commands import Pretrain
from slimmable.cli.config import LOGGERS, PretrainConfig, say
from slimmable.cli.data import Images, Plain, batches_of, load_images, normalisation
from slimmable.cli.evaluation import Watch, report_run, rows_of_run, set_gates
from slimmable.cli.faults import exit_code, explained_fault, on_signals, stop
from slimmable.cli.processes import locked
from slimmable.cli.report import Progress, logged_rows, make_logs, named_at, plot_imbalance
from slimmable.cli.training import Training
from slimmable.errors import DivergedError, SlimmableError, UsageError, require
from slimmable.files.description import differences
from slimmable.gating import gate_plan
from slimmable.training import GradientDiagnostics, calibrate_bn

GRADIENTS = "gradients.csv"
_CALIBRATION = 4096  # images for the BatchNorm statistics of a universal network, or one that was fine-tuned


def pretrain(config: PretrainConfig, options: Pretrain, device: torch.device) -> int:
    """Train from scratch or from the last checkpoint in all processes, evaluate in the first; return the exit code."""
    begin, folder = time.monotonic(), options.output
    with locked(folder, not options.resume) if is_first() else nullcontext():
        any_process(False, device)  # wait until the first one holds the folder
        training = _prepare(config, options, device)
        try:
            _tell(options, _introduction(training.config, training.images))
            _train(training, folder, options)
            if is_first():
                _finish(training, folder, options)
            any_process(False, device)  # wait until the first one has written the results
            _tell(options, f"done in {time.monotonic() - begin:.0f} s; the results are in {folder}")
        except KeyboardInterrupt as error:
            with suppress(OSError):  # the terminal may be gone
                if is_first():
                    say(f"interrupted after step {training.step} of {training.steps}; {_way_on(folder)}")
            return exit_code(error)
        except DivergedError as error:
            last = folder / runs.CHECKPOINT
            kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
            raise DivergedError(f"step {training.step + 1}: {error}; {kept}") from error
        except Exception as error:
            if (fault := explained_fault(error)) is None:
                raise
            way = _way_on(folder)  # which another process may have told
            raise SlimmableError(fault if fault.endswith(way) else f"{fault}; {way}") from error
    return 0


def _way_on(folder: Path) -> str:
    """Return how to go on after a run in `folder` has ended early."""
    if not (folder / runs.CONFIG).exists():
        return f"nothing is left in {folder}; start the run again"
    return f"continue with: slimmable pretrain --output {folder} --resume"


def _prepare(config: PretrainConfig, options: Pretrain, device: torch.device) -> Training:
    """Return the training, from scratch or as of the last checkpoint; write the settings of a new one."""
    for name in options.logger:
        require(LOGGERS[name], name, extra=None)
    for package in ("matplotlib", "tqdm"):
        require(package, package)  # fail now rather than at the end of a long run
    if options.diagnostics and len(config.widths) == 1:
        raise UsageError("--diagnostics compares widths; give more than one with --widths")
    images = load_images(config)
    # with a longer queue, which only mocov2 has, an image could meet its own last key as a negative
    queue = max(config.batch_size, min(config.queue_size, len(images.train) // 4))
    checkpoint = options.output / runs.CHECKPOINT
    resumed = options.resume and checkpoint.exists()
    if not options.resume:
        with torch.device("meta"):
            config = runs.normalised(config, runs.make_backbone(config, images.channels)[0])
    start = None if config.init is None or resumed else runs.read_start(config, images.channels)
    teacher = None if config.teacher is None else runs.make_teacher(config, images.channels)
    method = runs.new_method(replace(config, queue_size=queue), images.channels, len(images.classes), start, teacher)
    if start is not None:
        head = method.encoder.get_submodule("projector").state_dict()
        kept = config.method == "supervised" and not differences(head, start.classifier)
        _tell(options, f"starting from --init {config.init}{', with its classifier' if kept else ''}")
    if config.gate_budget is not None:
        least, width = max((gate_plan(method.backbone).least_share(width), width) for width in config.widths)
        if config.gate_budget < least:
            closed = f"{named_at(config.model, width)} with all gates closed costs {least:.3f} of its multiply-adds"
            raise UsageError(f"--gate-budget {config.gate_budget:g}: {closed}; choose a larger budget")
    training = Training(config, method, images, device, options.workers or 0)
    if resumed:
        training.resume(runs.load_checkpoint(checkpoint, images.digest))
        _tell(options, f"continuing after step {training.step} of {training.steps}")
    if options.diagnostics:
        training.diagnostics = GradientDiagnostics(method.online)
        training.diagnostics.step = training.step
        training.diagnostics.rows = read_gradients(options.output / GRADIENTS, training.step)
    if not options.resume and is_first():
        write_aside(options.output / runs.CONFIG, lambda path: path.write_text(config.to_json()))
    return training


def _introduction(config: PretrainConfig, images: Images) -> str:
    several = len(config.widths) > 1
    gated = "" if config.gate_budget is None else f", dense and gated to {config.gate_budget:g} of the multiply-adds,"
    widths = f" at widths {', '.join(f'{width:g}' for width in config.widths)}" if several or not gated else ""
    joins = f"; narrower widths join after {config.slow_start:.0%}" if several and config.slow_start else ""
    seen = f"{len(images.train)} images of {config.image_size} x {config.image_size} pixels for {config.epochs} epochs"
    return f"pre-training {config.model} by {config.method}{gated}{widths} on {seen}{joins}"


def _train(training: Training, folder: Path, options: Pretrain) -> None:
    """Take the remaining steps, with a checkpoint after each epoch.

    Raises: KeyboardInterrupt: with the signal, after a checkpoint; a second signal in a process stops immediately.
    """
    asked: list[int] = []
    config, gates = training.config, training.gates
    columns = ["learning_rate", *(f"train_loss/w{width:g}" for width in config.widths)]
    columns += [] if gates is None else [named_at("gated_share", width) for width in config.widths]
    usual = 0 if gates is None else max(1, config.epochs // 10)
    every = (usual if options.knn_every is None else options.knn_every) * training.steps_per_epoch
    with (
        on_signals(lambda number: stop(number) if asked else asked.append(number)),
        Progress(training.steps, training.step, training.steps_per_epoch, options.quiet) as progress,
        ExitStack() as ends,
    ):
        logs = make_logs(ends, folder, columns, training.step, options.logger, asdict(config)) if is_first() else []
        watch = Watch(training, folder, logs[1:]) if every and is_first() else None
        while training.step < training.steps:
            losses = training.take_step()
            if is_first():
                progress.advance(losses)
            if training.step % options.log_every == 0 or training.step == training.steps:
                # a universal model's random widths have no curve
                shown = {f"train_loss/w{width:g}": losses[width] for width in config.widths if width in losses}
                for width, reached in {} if gates is None else gates.reached_at.items():
                    shown[named_at("gated_share", width)] = float(reached)
                for log in logs:
                    log(training.step, {"learning_rate": training.learning_rate, **shown})
            stopping = any_process(bool(asked), training.device)
            if stopping or training.step % training.steps_per_epoch == 0:
                training.check_finite()
                if watch is not None and training.step % every == 0:  # before the checkpoint, or its row would be lost
                    progress.note(watch.look())
                if is_first():
                    training.save(folder / runs.CHECKPOINT)
                    if training.diagnostics is not None:
                        training.diagnostics.to_csv(folder / GRADIENTS)
            if stopping and training.step < training.steps:
                raise KeyboardInterrupt(asked[0] if asked else signal.SIGTERM)


def _finish(training: Training, folder: Path, options: Pretrain) -> None:
    """Calibrate, then write the networks and the reports."""
    config, backbone, images = training.config, training.method.backbone, training.images
    if config.universal or (config.init is not None and config.gate_budget is None):
        some = Plain(images.train, config.image_size, normalisation(config), _CALIBRATION)
        calibrate_bn(backbone, batches_of(some, config.batch_size), config.widths)
        training.save(folder / runs.CHECKPOINT)
    if config.gate_budget is not None:
        for width, reached in set_gates(config, backbone, images).items():
            share = f"{reached:.3f} of the multiply-adds"
            _tell(options, f"{named_at('the gates', width)} are set to {share}; the budget is {config.gate_budget:g}")
        training.save(folder / runs.CHECKPOINT)
    for name in runs.save_networks(folder, config, training.method, images.channels):
        say(f"{name} is left out: as timm makes it, {config.model} would compute something else at some width")
    if training.diagnostics is not None and training.diagnostics.rows:
        plot_imbalance(training.diagnostics.rows, folder / "gradients.png")
    rows = rows_of_run(config, training.method, images, workers=options.workers or 0)
    _tell(options, report_run(config, folder, rows, images, options.workers or 0))


def read_gradients(path: Path, done: int) -> list[dict[str, float]]:
    """Return the rows that `GradientDiagnostics.to_csv` wrote for the steps before `done`."""
    rows = [{name: float(value or "nan") for name, value in row.items()} for row in logged_rows(path, done - 1)]
    return [row | {"step": int(row["step"])} for row in rows]


def _tell(options: Pretrain, text: str) -> None:
    if is_first() and not options.quiet:
        say(text)
