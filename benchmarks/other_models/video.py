"""Networks of pytorchvideo."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import metadata

from pytorchvideo.models.resnet import create_resnet
from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers
from pytorchvideo.models.x3d import create_x3d

from benchmarks.other_models.entry import FULL, Entry, noise


def entries() -> Iterator[Entry]:
    clip = partial(noise, 1, 3, 4, 64, 64)
    slow = partial(create_resnet, model_num_class=5, stem_dim_out=8, head_pool_kernel_size=(4, 2, 2))
    yield Entry("pytorchvideo", "ResNet", "slow_r50", slow, clip, FULL)
    x3d = partial(create_x3d, input_clip_length=4, input_crop_size=64, model_num_class=5)
    yield Entry("pytorchvideo", "X3D", "x3d", x3d, clip, FULL)
    sizes = {"spatial_size": 32, "temporal_size": 4, "depth": 2, "patch_embed_dim": 32, "num_heads": 2}
    mvit = partial(
        create_multiscale_vision_transformers, head_num_classes=5, conv_patch_embed_kernel=(3, 7, 7), **sizes
    )
    yield Entry("pytorchvideo", "MViT", "mvit", mvit, partial(noise, 1, 3, 4, 32, 32), FULL)


def version() -> tuple[str, str]:
    return "pytorchvideo", metadata.version("pytorchvideo")
