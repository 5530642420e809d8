"""SlimCLR with MoCo v2, step by step; every step seeds its own random numbers, so a run can stop and go on anywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimmable._errors import UsageError
from slimmable.cli.augment import augment
from slimmable.cli.checkpoint import Checkpoint, load_exactly, load_optimizer_tensors, optimizer_tensors
from slimmable.cli.config import PretrainConfig
from slimmable.cli.images import Images
from slimmable.cli.networks import PretrainNetwork
from slimmable.losses import OnlineDistillation, contrast, moco_logits
from slimmable.training.moco import MoCo
from slimmable.training.recipe import SlimRecipe

_WARM_UP = 0.05  # share of the steps over which the learning rate rises


class Training:
    """The network with everything that a training step needs, and the number of steps done."""

    def __init__(self, config: PretrainConfig, network: PretrainNetwork, images: Images, device: torch.device) -> None:
        count = len(images.train)
        if config.batch_size > count:
            raise UsageError(f"--batch-size {config.batch_size} is more than the {count} training images")
        self.config = config
        self.network = network.to(device).train()
        self.images = images.train.to(device)
        self.mirror = not images.handwriting
        self.steps_per_epoch = count // config.batch_size
        self.steps = config.epochs * self.steps_per_epoch
        self.step = 0
        # An image must not meet its own last key among the negatives, so the queue is much shorter than an epoch.
        queue_size = max(config.batch_size, min(config.queue_size, count // 4))
        parts = max(1, min(config.key_parts, config.batch_size // 8))  # statistics need a few images
        self.moco = MoCo(network, config.embedding, queue_size, config.momentum, parts=parts).train()
        self.recipe = SlimRecipe(network, distill=OnlineDistillation(), slow_start=config.slow_start)
        matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            fused=True,
        )

    def take_step(self) -> dict[float, float]:
        """Train on the next batch; return width -> contrastive loss, the widest first."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        torch.manual_seed(_seed(self.config.seed, self.step))
        batch = self._order(epoch)[place * self.config.batch_size :][: self.config.batch_size]
        images = self.images[batch]
        queries, positives = (augment(images, mirror=self.mirror) for _ in range(2))
        progress = self.step / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.config.learning_rate * min(progress / _WARM_UP, 1) * (1 + math.cos(math.pi * progress)) / 2
            )
        self.optimizer.zero_grad()
        losses = {}
        keys = None
        for width in self.recipe.widths(progress):
            embeddings = self.network(queries)
            if keys is None:
                keys = self.moco.keys(self.network, positives)
            logits = moco_logits(embeddings, keys, self.moco.queue)
            contrastive = contrast(logits, self.config.temperature)
            self.recipe.loss(contrastive, teach=logits).backward()  # type: ignore[no-untyped-call]
            losses[width] = contrastive.item()
        if keys is not None:
            self.moco.enqueue(keys)
        self.optimizer.step()
        self.step += 1
        return losses

    def _order(self, epoch: int) -> Tensor:
        """The images in the order of this epoch."""
        generator = torch.Generator().manual_seed(_seed(self.config.seed, -1 - epoch))
        return torch.randperm(len(self.images), generator=generator).to(self.images.device)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the network and the number of steps that resuming needs."""
        state = {f"moco.{name}": tensor for name, tensor in self.moco.state_dict().items()}
        return state | {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go back to where `checkpoint` was written.

        Raises: CheckpointError: if it is of another model or other widths, listing what differs.
        """
        load_exactly(self.network, checkpoint.network, "the checkpoint")
        load_exactly(self.moco, _under("moco.", checkpoint.training), "the checkpoint's training state")
        load_optimizer_tensors(self.optimizer, _under("optimizer.", checkpoint.training))
        self.step = checkpoint.step


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _seed(seed: int, number: int) -> int:
    """A seed for each step (from 0 on) and epoch (-1 and below) of the run with `seed`."""
    return (seed * 1_000_003 + number) % 2**62
