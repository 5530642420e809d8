"""Training steps of a run, each of which seeds its own random numbers, so a run can resume after any step."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from slimmable._distributed import rank, world_size
from slimmable.cli.config import PretrainConfig
from slimmable.cli.data import Images, Views, keys_of_steps, load, make_views, normalisation, seed_of
from slimmable.cli.run import Checkpoint, check_alike, save_checkpoint
from slimmable.errors import CheckpointError, DivergedError, UsageError
from slimmable.gating import GateBudget, gate_parameters
from slimmable.losses import DistillationKind, OnlineDistillation
from slimmable.methods import Batch, Method
from slimmable.training import GradientDiagnostics, SlimRecipe, average_gradients

_GATE_ALPHA = 10.0  # over the whole training: 0.02 per epoch for 500 epochs (Krishna et al. 2023)
_LEAST_SCALE = 2.0**-20  # of the losses in float16; where gradients overflow even then, scaling is not the matter
_OF_SCALER = ("scale", "_growth_tracker")  # what changes of it
_RANDOM_WIDTHS = 2  # per step of a universal model, besides the widest and the narrowest (Yu and Huang 2019)


class Training:
    """A method with all that its training steps need, and the number of steps done; every process makes the same."""

    def __init__(
        self, config: PretrainConfig, method: Method, images: Images, device: torch.device, workers: int = 0
    ) -> None:
        count, batch, processes, groups = len(images.train), config.batch_size, world_size(), config.bn_groups
        if batch > count:
            raise UsageError(f"--batch-size {batch} is more than the {count} training images; choose a smaller one")
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
        self.method, self.normalise = method.to(device).train(), normalisation(config)
        self.method.bn_groups = config.bn_groups
        crops = {"local_crops": config.local_crops, "local_size": config.local_crop_size}
        crop, mirror = config.min_crop_scale, not images.handwriting
        transforms = make_views(config.augmentation, config.image_size, min_crop_scale=crop, mirror=mirror, **crops)
        sets = len(config.widths) if config.views_per_width else 1
        self.views = Views(images.train, images.train_labels, transforms[: method.views] * sets, config.seed)
        self.steps_per_epoch = count // batch
        self.steps = config.epochs * self.steps_per_epoch
        self.step = 0
        distill = method.distillation()
        if config.distill not in ("own", "none"):
            distill = distill or OnlineDistillation()
            distill.kind = cast(DistillationKind, config.distill)
        self.recipe = SlimRecipe(
            method.online,
            distill=None if config.distill == "none" else distill,
            loss_weights=config.loss_weights,
            slow_start=config.slow_start,
            random_widths=_RANDOM_WIDTHS if config.universal else 0,
            seed=config.seed,
        )
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
        self._set_learning_rate(progress)
        torch.manual_seed(seed_of(self.config.seed, -2 - self.step, rank()))  # hash(-1) == hash(-2)
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

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0))

    def _draw(self) -> Iterator[list[Tensor]]:
        """Yield the views and the labels of each step that is left when the first of them is asked for."""
        count, config, device = len(self.views.images), self.config, self.device
        keys = keys_of_steps(count, config.batch_size, config.epochs, self.step, config.seed, rank(), world_size())
        for *views, labels in load(self.views, self.workers, batch_sampler=keys, pin_memory=device.type == "cuda"):
            moved = (view.to(device, non_blocking=True) for view in views)
            yield [*map(self.normalise, moved), labels.to(device, non_blocking=True)]

    def _set_learning_rate(self, progress: float) -> None:
        later = self.config.lr_after_slow_start
        peak = self.config.lr if later is None or progress < self.config.slow_start else later
        self.schedule.base_values = [peak for _ in self.optimizer.param_groups]
        self.schedule.step_update(self.step)

    def check_finite(self) -> None:
        """Raise DivergedError if a parameter is infinite or NaN, as after a gradient that was, or none can change."""
        if self.scaler.get_scale() < _LEAST_SCALE:
            raise DivergedError(f"gradients are not finite, even of losses scaled by {self.scaler.get_scale():g}")
        for name, tensor in (*self.method.named_parameters(), *optimizer_tensors(self.optimizer).items()):
            if not tensor.isfinite().all():
                raise DivergedError(f"{name} is no longer finite")

    def save(self, path: Path) -> None:
        """Write the checkpoint that `resume` returns to."""
        save_checkpoint(path, self.method.encoder, self._own(), self.step, self.images.digest)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Return to the state of `checkpoint`, or change nothing and raise CheckpointError if it is another's."""
        done, given = checkpoint.step, checkpoint.training
        if not 0 < done <= self.steps:
            raise CheckpointError(f"the checkpoint is of step {done}, but the run has steps 1 to {self.steps}")
        check_alike(self.method.encoder.state_dict(), checkpoint.network, "the network in the checkpoint")
        check_alike(self._own(), given, "the training in the checkpoint")
        state = _under("method.", given) | {f"encoder.{name}": tensor for name, tensor in checkpoint.network.items()}
        position = state.get("moco.position")
        if position is not None and position != (done * self.config.batch_size) % state["moco.queue"].shape[1]:
            raise CheckpointError(f"the queue in the checkpoint is at {position}, where it is not after step {done}")
        optimizer, scaler = _under("optimizer.", given), _under("scaler.", given)
        begins = 0.0, self.config.slow_start, 1 / self.config.epochs, 1.0  # of all widths, and of dino's last layer
        counts = {sum(step / self.steps >= begin for step in range(done)) for begin in begins}
        counts = {min(count, 2**24) for count in counts}  # where a float32 stops to count
        for name, tensor in optimizer.items():
            if name.endswith(".step") and tensor.item() not in (range(done + 1) if scaler else counts):
                what = f"the optimizer's state in the checkpoint counts {tensor:g} steps of {name[:-5]}"
                raise CheckpointError(f"{what}, which cannot be after step {done}")
        for name, tensor in optimizer_tensors(self.optimizer).items():  # in its memory layout, which fused ones need
            tensor.copy_(optimizer[name])
        self.method.load_state_dict(state)
        self.scaler.load_state_dict(self.scaler.state_dict() | {name: value.item() for name, value in scaler.items()})
        self.step = done
        self._batches = self._draw()

    def _own(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds besides the encoder."""
        state, scaler = self.method.state_dict(), self.scaler.state_dict()
        own = {f"method.{name}": tensor for name, tensor in state.items() if not name.startswith("encoder.")}
        own |= {f"scaler.{name}": torch.tensor(scaler[name]) for name in _OF_SCALER if scaler}
        return own | {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}


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


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
