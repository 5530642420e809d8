"""Programs of facebookresearch, from checkouts of github.com/facebookresearch/<name>, as one process on the CPU.

Their forward returns the loss, or moves a momentum encoder and a queue. They expect CUDA and several processes: here
moving to a GPU does nothing, the process group has one process, and mixed precision is that of the CPU. The GradScaler
starts at 1, so the scaled loss is the loss.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm.layers
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from benchmarks.clients.client import Client, instead
from benchmarks.clients.programs import Images

sys.modules.setdefault("timm.models.layers.helpers", timm.layers)  # where moco-v3 finds it in timm 0.4

SIZES = {224: 32, 96: 16}  # of crops: in the program, here
LAUNCH = ("--multiprocessing-distributed", "--world-size", "1", "--rank", "0")
EPOCHS = ("--epochs", "10")


def one_process(original: Callable[..., None]) -> Callable[..., None]:
    """Replace the process group of a cluster by one of this process alone."""

    def init(*arguments: Any, **options: Any) -> None:
        if dist.is_initialized():  # by the run before
            dist.destroy_process_group()
        original("gloo", store=dist.HashStore(), world_size=1, rank=0)

    return init


def without_device(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, device: Any = None, device_ids: Any = None, **options: Any) -> Any:
        return original(*arguments, **options)

    return call


def small_crop(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda size, *arguments, **options: original(SIZES[size], *arguments, **options)


def cuda_in_programs(original: Callable[[], bool]) -> Callable[[], bool]:
    """Say that there is CUDA to programs only, not to torch itself."""
    return lambda: "site-packages" not in sys._getframe(1).f_code.co_filename


def only(*layers: int, block: type[Bottleneck] | type[BasicBlock] = BasicBlock, **options: Any) -> Any:
    """Replace a ResNet by one with fewer blocks."""
    return instead(functools.partial(ResNet, block, list(layers), **options))


def small_vit(original: type[VisionTransformer]) -> type[VisionTransformer]:
    """Return the class as moco-v3 knows it from timm 0.4, for small images and with two blocks."""

    class Small(original):  # type: ignore[misc, valid-type]
        num_tokens = 1

        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "img_size": 32, "depth": 2})

    return Small


def contiguous(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `Tensor.t` with a result that `view` takes, as moco's `accuracy` expects of older torch."""
    return lambda tensor: original(tensor).contiguous()


def itself(module: Any, *arguments: Any, **options: Any) -> Any:
    return module


def nothing(*arguments: Any, **options: Any) -> None:
    return None


STAND_INS: dict[str, Callable[[Any], Any]] = {
    "os.environ": lambda environ: {**environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    "torchvision.datasets.ImageFolder": instead(lambda root, transform: Images(transform=transform)),
    "torch.Tensor.cuda": instead(itself),
    "torch.nn.Module.cuda": instead(itself),
    "torch.cuda.is_available": cuda_in_programs,
    "torch.cuda.device_count": instead(lambda: 1),
    "torch.cuda.set_device": instead(nothing),
    "torch.cuda.synchronize": instead(nothing),
    "torch.cuda.max_memory_allocated": instead(lambda: 0),
    "torch.cuda.amp.GradScaler": instead(functools.partial(torch.amp.GradScaler, "cpu", init_scale=1.0)),
    "torch.cuda.amp.autocast": instead(lambda enabled=True: torch.amp.autocast("cpu", torch.bfloat16, enabled)),
    "torch.distributed.init_process_group": one_process,
    "torch.distributed.barrier": instead(nothing),
    "torch.hub.list": instead(lambda repository: []),
    "torch.multiprocessing.spawn": instead(lambda worker, args=(), nprocs=1: worker(0, *args)),
    "torch.nn.parallel.distributed.DistributedDataParallel._passing_sync_batchnorm_handle": instead(nothing),
    "torch.nn.parallel.distributed.DistributedDataParallel.__init__": without_device,
    "torch.nn.SyncBatchNorm.forward": instead(_BatchNorm.forward),  # what it does with one process on a GPU
    "torch.tensor": without_device,
    "torchvision.transforms.RandomResizedCrop": small_crop,
    "torchvision.models.resnet18": only(1, 1, 1, 1),
}


def program(
    name: str,
    file: str,
    arguments: tuple[str, ...],
    extracts: str,
    stand_ins: Mapping[str, Callable[[Any], Any]] | None = None,
    **more: Any,
) -> Client:
    """Return the client for a file below `facebookresearch`."""
    return Client(
        f"facebook/{name}",
        f"facebookresearch/{file}",
        arguments=(*arguments, *EPOCHS),
        stand_ins={**STAND_INS, **(stand_ins or {})},
        extracts=extracts,
        **more,
    )


BATCH = ("-b", "4")
RESNET = (*BATCH, "-a", "resnet18")
ZERO_GRAD = "`zero_grad`, between loss and `backward` in the program, moves up"
TEACHER = f"{ZERO_GRAD}; the teacher is converted too, since it takes the student's state dict"
MOCO_V3 = ("images", "--moco-dim", "16", "--moco-mlp-dim", "64", "--moco-m-cos", "--warmup-epochs", "1", *LAUNCH)
SMALL_VIT: dict[str, Callable[[Any], Any]] = {
    "timm.models.vision_transformer.VisionTransformer": small_vit,
}
DINO = ("--out_dim", "64", "--batch_size_per_gpu", "4", "--local_crops_number", "2", "--warmup_epochs", "1")

CLIENTS = [
    program(
        "vicreg",
        "vicreg/main_vicreg.py",
        ("--data-dir", "images", "--exp-dir", "run", "--arch", "resnet34", "--mlp", "64-64-64", "--batch-size", "4"),
        extracts="model.module.backbone",
    ),
    program(
        "barlowtwins",
        "barlowtwins/main.py",
        ("images", "--batch-size", "4", "--projector", "64-64-64", "--checkpoint-dir", "run"),
        stand_ins={"torchvision.models.resnet50": only(1, 1, 1, 1, block=Bottleneck, width_per_group=16)},
        extracts="model.module.backbone",
    ),
    program(
        "moco",
        "moco/main_moco.py",
        ("images", *RESNET, "--moco-k", "16", "--moco-dim", "16", "--mlp", "--aug-plus", "--cos", *LAUNCH),
        stand_ins={"torch.Tensor.t": contiguous},
        extracts="model.module.encoder_q",
        needs=f"{ZERO_GRAD}; the accuracy that it prints needs the logits of the widest",
    ),
    program(
        "moco-v3", "moco-v3/main_moco.py", (*MOCO_V3, *RESNET), extracts="model.module.base_encoder", needs=ZERO_GRAD
    ),
    program(
        "moco-v3-vit",
        "moco-v3/main_moco.py",
        (*MOCO_V3, *BATCH, "-a", "vit_small", "--optimizer", "adamw", "--lr", "0.01", "--stop-grad-conv1"),
        stand_ins=SMALL_VIT,
        extracts="model.module.base_encoder",
        needs=ZERO_GRAD,
        same_as="facebook/moco-v3",
    ),
    program(
        "simsiam",
        "simsiam/main_simsiam.py",
        ("images", *RESNET, "--dim", "64", "--pred-dim", "16", "--fix-pred-lr", *LAUNCH),
        extracts="model.module.encoder",
        needs=f"{ZERO_GRAD}; a loss of four outputs becomes a function",
    ),
    program(
        "dino",
        "dino/main_dino.py",
        (*DINO, "--arch", "vit_tiny", "--patch_size", "8"),
        extracts="student.module.backbone",
        needs=TEACHER,
    ),
    program(
        "dino-resnet",
        "dino/main_dino.py",
        (*DINO, "--arch", "resnet18", "--optimizer", "lars", "--use_bn_in_head", "true"),
        extracts="student.module.backbone",
        needs=TEACHER,
    ),
]
