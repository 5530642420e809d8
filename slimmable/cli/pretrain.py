"""`slimmable pretrain`: the training, each step of which seeds its own random numbers, and the command around it."""

import copy
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from slimmable._atomic import write_aside
from slimmable._distributed import any_process, rank, world_size
from slimmable._tables import differences
from slimmable._width import at_width
from slimmable.cli import data, run as runs
from slimmable.cli.commands import Evaluate, Pretrain
from slimmable.cli.config import PretrainConfig, say
from slimmable.cli.evaluation import VOTERS, Prober, draw_neighbours, gate_images, passes_of, report_run, rows_of_run
from slimmable.cli.faults import exit_code, explained_fault, on_signals, stop
from slimmable.cli.processes import locked
from slimmable.cli.report import GATED, Log, Progress, csv_log, named_at
from slimmable.errors import CheckpointError, DivergedError, SlimmableError, UsageError, require
from slimmable.files.description import Tensors
from slimmable.gating import GateBudget, calibrate_gates, gate_parameters, gate_plan
from slimmable.losses import DistillationKind, OnlineDistillation
from slimmable.methods import Batch, Method
from slimmable.training import GradientDiagnostics, SlimRecipe, average_gradients, calibrate_bn

_CALIBRATION = 4096  # images for the BatchNorm statistics of a universal network, or one that was fine-tuned
_GATE_ALPHA = 10.0  # over the whole training: 0.02 per epoch for 500 epochs (Krishna et al. 2023)
_LEAST_SCALE = 2.0**-20  # of the losses in float16; where gradients overflow even then, scaling is not the matter
_RANDOM_WIDTHS = 2  # per step of a universal model, besides the widest and the narrowest (Yu and Huang 2019)


class Training:
    """A method with all that its training steps need, and the number of steps done; every process makes the same."""

    def __init__(
        self, config: PretrainConfig, method: Method, images: data.Images, device: torch.device, workers: int = 0
    ) -> None:
        count, batch, processes, groups = len(images.train), config.batch_size, world_size(), config.bn_groups
        if batch % processes:
            raise UsageError(f"--batch-size {batch} cannot be shared by {processes} processes; choose a multiple")
        if groups > 1 and (batch < 2 * groups or batch % groups or groups % processes):
            needed = f"must be equal, of two images or more, and a multiple of the {processes} processes"
            raise UsageError(f"--bn-groups {groups} of --batch-size {batch}: they {needed}")
        parts, shared = f"--key-parts {config.key_parts} of --batch-size {batch}", max(config.key_parts, processes)
        if config.method == "mocov2" and batch < 2 * config.key_parts:
            raise UsageError(f"{parts} have fewer than two images each; choose fewer parts")
        if config.method == "mocov2" and processes > 1 and (shared % processes or batch % shared):
            raise UsageError(f"{parts} cannot be shared by {processes} processes; choose multiples of their number")
        self.config, self.images, self.device, self.workers = config, images, device, workers
        self.method, self.normalise = method.to(device).train(), data.normalisation(config)
        self.method.bn_groups = config.bn_groups
        crops: Any = {"mirror": not images.handwriting, "min_crop_scale": config.min_crop_scale}
        crops |= {"local_crops": config.local_crops, "local_size": config.local_crop_size}
        transforms = data.make_views(config.augmentation, config.image_size, **crops)
        sets = len(config.widths) if config.views_per_width else 1
        self.views = data.Views(images.train, images.train_labels, transforms[: method.views] * sets, config.seed)
        self.steps_per_epoch = count // batch
        self.steps = config.epochs * self.steps_per_epoch
        self.step = 0
        distill = method.distillation()
        if config.distill not in ("own", "none"):
            distill = distill or OnlineDistillation()
            distill.kind = cast(DistillationKind, config.distill)
        rules: Any = {"loss_weights": config.loss_weights, "slow_start": config.slow_start, "seed": config.seed}
        rules["random_widths"] = _RANDOM_WIDTHS if config.universal else 0
        self.recipe = SlimRecipe(method.online, None if config.distill == "none" else distill, **rules)
        self.diagnostics: GradientDiagnostics | None = None
        share, weight = config.gate_budget, config.gate_loss_weight
        self.gates = None if share is None else GateBudget(share, budget_weight=weight, alpha=_GATE_ALPHA)
        self.optimizer = make_optimizer(config, method.online)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        rising = config.epochs / 20 if config.warmup_epochs is None else config.warmup_epochs
        warm_up = round(rising * self.steps_per_epoch)
        rest = self.steps - warm_up
        if rest <= 0:
            raise UsageError(f"--warmup-epochs {rising:g} leaves none of the {config.epochs} epochs; choose fewer")
        self.schedule = CosineLRScheduler(self.optimizer, rest, warmup_t=warm_up, warmup_prefix=True, t_in_epochs=False)
        self._batches = self._draw()

    def take_step(self) -> dict[float, float]:
        """Train on the next batch; return each width's loss, the widest first; a DivergedError changes no weight."""
        *drawn, labels = next(self._batches)
        views, *others = (drawn[at : at + self.method.views] for at in range(0, len(drawn), self.method.views))
        narrow = dict(zip(self.config.widths[1:], others, strict=False))  # none, unless each width has its own
        progress = self.step / self.steps
        later = self.config.lr_after_slow_start
        peak = self.config.lr if later is None or progress < self.config.slow_start else later
        self.schedule.base_values = [peak for _ in self.optimizer.param_groups]
        self.schedule.step_update(self.step)
        group = self.optimizer.param_groups[0]
        self.learning_rate = float(group["lr"] / group.get("lr_scale", 1.0))
        torch.manual_seed(data.seed_of(self.config.seed, -2 - self.step, rank()))  # hash(-1) == hash(-2)
        self.optimizer.zero_grad()
        losses = self.method.step(
            self.recipe,
            Batch(views, labels, narrow=narrow),
            progress,
            step=self.step,
            autocast=None if self.config.precision == "float32" else getattr(torch, self.config.precision),
            backward=lambda loss: self.scaler.scale(loss).backward(),  # type: ignore[no-untyped-call]
            diagnostics=self.diagnostics,
            gates=self.gates,
        )
        average_gradients(self.method)
        if self.diagnostics is not None:
            self.diagnostics.after_step(self.scaler.get_scale())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return losses

    def _draw(self) -> Iterator[list[Tensor]]:
        """Yield the views and the labels of each step that is left when the first of them is asked for."""
        count, config, device = len(self.views.images), self.config, self.device
        keys = data.keys_of_steps(count, config.batch_size, config.epochs, self.step, config.seed, rank(), world_size())
        for *views, labels in data.load(self.views, self.workers, batch_sampler=keys, pin_memory=device.type == "cuda"):
            moved = (view.to(device, non_blocking=True) for view in views)
            yield [*map(self.normalise, moved), labels.to(device, non_blocking=True)]

    def check_finite(self) -> None:
        """Raise DivergedError if a parameter is infinite or NaN, as after a gradient that was, or none can change."""
        if self.scaler.get_scale() < _LEAST_SCALE:
            raise DivergedError(f"gradients are not finite, even of losses scaled by {self.scaler.get_scale():g}")
        for name, tensor in (*self.method.named_parameters(), *optimizer_tensors(self.optimizer).items()):
            if not tensor.isfinite().all():
                raise DivergedError(f"{name} is no longer finite")

    def save(self, path: Path) -> None:
        """Write the checkpoint that `resume` returns to."""
        runs.save_checkpoint(path, self._state(), self.step, self.images.digest)

    def resume(self, saved: Tensors, done: int) -> None:
        """Return to the state of a checkpoint, or change nothing and raise CheckpointError if it is another's."""
        if not 0 < done <= self.steps:
            raise CheckpointError(f"the checkpoint is of step {done}, but the run has steps 1 to {self.steps}")
        runs.check_alike(own := self._state(), saved, "the checkpoint")
        for name, tensor in own.items():  # in its memory layout, which fused optimizers need
            tensor.copy_(saved[name])
        at = f"{runs.TRAINING}scaler."
        scaler = {name.removeprefix(at): tensor.item() for name, tensor in own.items() if name.startswith(at)}
        self.scaler.load_state_dict(self.scaler.state_dict() | scaler)
        self.step = done
        self._batches = self._draw()

    def _state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: the encoder, and what else training needs."""
        state, scaler = self.method.state_dict(), self.scaler.state_dict()
        own = {f"method.{name}": tensor for name, tensor in state.items() if not name.startswith("encoder.")}
        own |= {f"scaler.{name}": torch.tensor(scaler[name]) for name in ("scale", "_growth_tracker") if scaler}
        own |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        return self.method.encoder.state_dict() | {runs.TRAINING + name: tensor for name, tensor in own.items()}


def make_optimizer(config: PretrainConfig, online: nn.Module) -> Optimizer:
    """Return timm's optimizer; by default without weight decay, and in LARS scaling, of norms, biases and gates."""
    gates = set(map(id, gate_parameters(online)))
    decay = config.weight_decay
    gating: dict[str, Any] = {"weight_decay": 0.0, "lr_scale": config.gate_lr_scale}  # by which timm's schedule scales
    kinds: dict[tuple[bool, bool], dict[str, Any]] = {  # whether it is a gate, and a matrix
        (False, False): {"weight_decay": decay if config.decay_norms else 0.0, "lr_scale": config.norm_lr_scale},
        (False, True): {"weight_decay": decay},
        (True, False): gating,
        (True, True): {**gating, "always_adapt": config.lars_gates},  # LARS scales without weight decay too
    }
    for name, parameter in online.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 and not name.endswith(".bias")
            kinds[id(parameter) in gates, matrix].setdefault("params", []).append((name, parameter))
    groups = [group for group in kinds.values() if "params" in group]
    name = {"adamw": "adamw", "lars": "lars", "sgd": "momentum"}[config.opt]  # timm's "sgd" is Nesterov's
    settings: dict[str, Any] = {"fused": True} if config.opt == "adamw" else {"momentum": 0.9}
    if config.opt == "lars":
        settings |= {"trust_coeff": config.lars_trust, "trust_clip": config.lars_clip}
    optimizer = create_optimizer_v2(groups, name, lr=config.lr, **settings)
    fill_state(optimizer)
    return optimizer


def fill_state(optimizer: Optimizer) -> None:
    """Give every parameter the state that its first step starts from, zeros, so that any checkpoint holds all of it."""
    example = copy.deepcopy(optimizer)
    for parameter in (each for group in example.param_groups for each in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    type(example).step.__wrapped__(example)  # type: ignore[attr-defined]  # without the hooks that watch all optimizers
    optimizer.load_state_dict(example.state_dict())
    for tensor in optimizer_tensors(optimizer).values():
        tensor.zero_()


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named `<parameter>.<name>`."""
    pairs = [pair for own in optimizer.param_groups for pair in zip(own["param_names"], own["params"], strict=True)]
    return {f"{name}.{key}": value for name, tensor in pairs for key, value in optimizer.state[tensor].items()}


class Watch:
    """Log of the kNN accuracy of a run's networks in `knn.csv`, without effect on the training."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, config, backbone = training, training.config, training.method.backbone
        self.prober = Prober(config, training.images, Evaluate(folder, ("knn",), workers=training.workers), VOTERS)
        # a universal model has no statistics for the other widths before the end
        widths = config.widths[:: len(config.widths) - 1] if config.universal else config.widths
        self.passes = passes_of(config, backbone, widths)
        columns = [f"knn/w{width:g}" for width in widths]
        if config.gate_budget is not None:
            columns = [named_at(kind, width) for width in widths for kind in ("knn/dense", "knn/gated", "gated_share")]
        self.log = csv_log(folder / "knn.csv", columns, training.step)

    def look(self) -> str:
        """Evaluate, log the numbers, and return them as text; gates decide without noise, at training's thresholds."""
        found, costs = self.prober.measure(self.training.method.backbone, self.passes)
        shares = {name if isinstance(name, str) else f"w{name:g}": each["knn"] for name, each in found.items()}
        values = {f"knn/{name}": share for name, share in shares.items()}
        values |= {name.replace(GATED, "gated_share"): cost for name, cost in costs.items()}
        shown = "  ".join(f"{name.lstrip('w')}: {100 * share:.1f}" for name, share in shares.items())
        spent = f"  ({', '.join(f'{cost:.2f}' for cost in costs.values())} of the multiply-adds)" if costs else ""
        self.log(self.training.step, values)
        return f"kNN accuracy in %  {shown}{spent}"


def pretrain(config: PretrainConfig, options: Pretrain, device: torch.device) -> int:
    """Train from scratch or from the last checkpoint in all processes, evaluate in the first; return the exit code."""
    begin, folder = time.monotonic(), options.output
    with locked(folder, not options.resume) if rank() == 0 else nullcontext():
        any_process(False, device)  # wait until the first one holds the folder
        training = _prepare(config, options, device)
        try:
            _train(training, folder, options)
            if rank() == 0:
                _finish(training, folder, options)
            any_process(False, device)  # wait until the first one has written the results
            _tell(options, f"done in {time.monotonic() - begin:.0f} s; the results are in {folder}")
        except KeyboardInterrupt as error:
            with suppress(OSError):  # the terminal may be gone
                if rank() == 0:
                    say(f"interrupted after step {training.step} of {training.steps}; {_way_on(folder)}")
            return exit_code(error)
        except DivergedError as error:
            last = folder / runs.CHECKPOINT
            kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
            raise DivergedError(f"step {training.step + 1}: {error}; {kept}") from error
        except Exception as error:
            if (fault := explained_fault(error)) is None:
                raise
            raise SlimmableError(f"{fault}; {_way_on(folder)}") from error
    return 0


def _way_on(folder: Path) -> str:
    """Return how to go on after a run in `folder` has ended early."""
    if not (folder / runs.CONFIG).exists():
        return f"nothing is left in {folder}; start the run again"
    return f"continue with: slimmable pretrain --output {folder} --resume"


def _prepare(config: PretrainConfig, options: Pretrain, device: torch.device) -> Training:
    """Return the training, from scratch or as of the last checkpoint; write the settings of a new one."""
    require("matplotlib", "matplotlib")  # fail now rather than at the end of a long run
    if options.diagnostics and len(config.widths) == 1:
        raise UsageError("--diagnostics compares widths; give more than one with --widths")
    images = data.load_images(config)
    if config.batch_size > (most := len(images.train) // world_size() * world_size()):
        _tell(options, f"--batch-size {config.batch_size} is lowered to {most}, with {len(images.train)} images")
        config = replace(config, batch_size=most)
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
    training = Training(config, method, images, device, options.count_workers())
    if resumed:
        training.resume(*runs.load_checkpoint(checkpoint, images.digest))
        _tell(options, f"continuing after step {training.step} of {training.steps}")
    if options.diagnostics:
        training.diagnostics = GradientDiagnostics(method.online)
        training.diagnostics.step = training.step
    if not options.resume and rank() == 0:
        write_aside(options.output / runs.CONFIG, lambda path: path.write_text(config.to_json()))
    several = len(config.widths) > 1
    gated = "" if config.gate_budget is None else f", dense and gated to {config.gate_budget:g} of the multiply-adds,"
    widths = f" at widths {', '.join(f'{width:g}' for width in config.widths)}" if several or not gated else ""
    joins = f"; narrower widths join after {config.slow_start:.0%}" if several and config.slow_start else ""
    seen = f"{len(images.train)} images of {config.image_size} x {config.image_size} pixels for {config.epochs} epochs"
    _tell(options, f"pre-training {config.model} by {config.method}{gated}{widths} on {seen}{joins}")
    return training


def _train(training: Training, folder: Path, options: Pretrain) -> None:
    """Take the remaining steps, with a checkpoint after each epoch and a signal; a second one stops immediately."""
    asked: list[int] = []
    gradients: Log | None = None
    config, gates = training.config, training.gates
    columns = ["learning_rate", *(f"train_loss/w{width:g}" for width in config.widths)]
    columns += [] if gates is None else [named_at("gated_share", width) for width in config.widths]
    usual = 0 if gates is None else max(1, config.epochs // 10)
    every = (usual if options.knn_every is None else options.knn_every) * training.steps_per_epoch
    progress = Progress(training.steps, training.step, training.steps_per_epoch, options.quiet or rank() > 0)
    with on_signals(lambda number: stop(number) if asked else asked.append(number)), progress.bar:
        log = csv_log(folder / "losses.csv", columns, training.step) if rank() == 0 else None
        watch = Watch(training, folder) if every and rank() == 0 else None
        while training.step < training.steps:
            losses = training.take_step()
            progress.advance(losses)
            while training.diagnostics is not None and training.diagnostics.rows and rank() == 0:
                at = int((row := training.diagnostics.rows.pop()).pop("step"))
                gradients = gradients or csv_log(folder / "gradients.csv", [*row], at - 1)
                gradients(at, row)
            if log is not None and (training.step % options.log_every == 0 or training.step == training.steps):
                # a universal model's random widths have no curve
                shown = {f"train_loss/w{width:g}": losses[width] for width in config.widths if width in losses}
                for width, reached in {} if gates is None else gates.reached_at.items():
                    shown[named_at("gated_share", width)] = float(reached)
                log(training.step, {"learning_rate": training.learning_rate, **shown})
            stopping = any_process(bool(asked), training.device)
            if stopping or training.step % training.steps_per_epoch == 0:
                training.check_finite()
                if watch is not None and training.step % every == 0:  # before the checkpoint, or its row would be lost
                    progress.note(watch.look())
                if rank() == 0:
                    training.save(folder / runs.CHECKPOINT)
            if stopping and training.step < training.steps:
                raise KeyboardInterrupt(asked[0] if asked else signal.SIGTERM)


def _finish(training: Training, folder: Path, options: Pretrain) -> None:
    config, backbone, images = training.config, training.method.backbone, training.images
    if config.universal or (config.init is not None and config.gate_budget is None):
        some = data.Plain(images.train, config.image_size, data.normalisation(config), _CALIBRATION)
        calibrate_bn(backbone, data.batches_of(some, config.batch_size), config.widths)
        training.save(folder / runs.CHECKPOINT)
    if config.gate_budget is not None:
        batches = gate_images(config, images)
        for width in config.widths:
            with at_width(backbone, width):
                share = f"{calibrate_gates(backbone, batches, config.gate_budget):.3f} of the multiply-adds"
            _tell(options, f"{named_at('the gates', width)} are set to {share}; the budget is {config.gate_budget:g}")
        training.save(folder / runs.CHECKPOINT)
    for name in runs.save_networks(folder, config, training.method, images.channels):
        say(f"{name} is left out: as timm makes it, {config.model} would compute something else at some width")
    default = Evaluate(folder, workers=training.workers)
    _tell(options, report_run(config, rows_of_run(config, training.method, images, default), images, default))
    draw_neighbours(config, backbone, images, default)
    if (folder / runs.MODEL).exists() and config.gate_budget is None:
        load = f'model = slimmable.load("{folder / runs.MODEL}")  # images in, features out'
        _tell(options, f"import slimmable\n{load}\nsmall = slimmable.extract(model, {config.widths[-1]})\n")


def _tell(options: Pretrain, text: str) -> None:
    if rank() == 0 and not options.quiet:
        say(text)
