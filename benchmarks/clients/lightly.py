"""The examples of lightly: `lightly/examples/pytorch` of a checkout of github.com/lightly-ai/lightly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torchvision
from timm.models.vision_transformer import VisionTransformer

from benchmarks.clients.client import Client, instead, options

COPIED = "`slimify` in the constructor, before the momentum encoder is copied"
LATER = "a list of the student's modules for the recipe, since others are made after `slimify`"
SMALL_CROPS = {
    "lightly.transforms.swav_transform.SwaVTransform": options(crop_sizes=(32, 32)),
    "lightly.transforms.dino_transform.DINOTransform": options(global_crop_size=32, local_crop_size=32),
}


# Three examples end with an error after their first epoch: their loss has the shape (1,), which cannot be formatted.
PRINTED = {"torch.Tensor.__format__": lambda original: lambda tensor, how: original(tensor.squeeze(), how)}
# Their learning rates are for 256 images at a time; with four, these losses would grow without end.
SLOWER = {"torch.optim.SGD": lambda original: lambda *args, lr, **more: original(*args, lr=lr / 64, **more)}


def example(name: str, stand_ins: Mapping[str, Callable[[Any], Any]] | None = None, **more: Any) -> Client:
    return Client(f"lightly/{name}", f"lightly/examples/pytorch/{name}.py", stand_ins=stand_ins or {}, **more)


small_vit = functools.partial(VisionTransformer, img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)


def small_torchvision_vit(pretrained: bool = False, images: int = 32, patch: int = 8, size: int = 64) -> Any:
    return torchvision.models.VisionTransformer(images, patch, 2, 4, size, 128)


MASKED = {
    "timm.models.vision_transformer.vit_base_patch32_224": instead(small_vit),
    "torchvision.models.vit_b_32": instead(small_torchvision_vit),
    "lightly.transforms.MAETransform": options(input_size=32),
    "lightly.transforms.mae_transform.MAETransform": options(input_size=32),
}


CLIENTS = [
    example("barlowtwins"),
    example("byol", needs=COPIED),
    example("dcl"),
    example("densecl", needs=f"{COPIED}; the pool, which the forward runs, made before that"),
    example("directclr", extracts="model"),
    example("dino", SMALL_CROPS, extracts="model.student_backbone", needs=f"{COPIED}; {LATER}"),
    example("fastsiam"),
    example("fda"),
    example("frossl", SLOWER),
    example(
        "ijepa",
        {
            "torchvision.models.vit_b_32": instead(
                functools.partial(small_torchvision_vit, images=224, patch=32, size=768)
            )
        },
        extracts="model.encoder",
        images=(2, 3, 224, 224),
        needs="no checkpoint holds how far its generator of momenta has got, in the plain program either",
    ),
    example("mae", MASKED),
    example("mmcr", needs=COPIED),
    example("moco", needs=COPIED),
    example(
        "msn",
        {
            "torchvision.models.VisionTransformer": options(image_size=32, patch_size=8, num_layers=2),
            "lightly.transforms.msn_transform.MSNTransform": options(random_size=32, focal_size=32, focal_views=2),
        },
        extracts="model.anchor_backbone",
        needs=COPIED,
    ),
    example("nnclr"),
    example("simclr"),
    example("simmim", MASKED),
    example("simsiam"),
    example("smog", needs=f"{COPIED}; {LATER}"),
    example("swav", SMALL_CROPS | PRINTED, needs="`skip`, to keep the prototypes and the embedding whole"),
    example(
        "swav_queue",
        SMALL_CROPS | PRINTED,
        needs="its forward normalises the prototypes, so every width does it again: the difference is rounding",
    ),
    example("tico", needs=COPIED),
    example("vicreg", SLOWER),
    example(
        "vicregl",
        {
            "lightly.transforms.vicregl_transform.VICRegLTransform": options(global_crop_size=64, global_grid_size=2),
            **PRINTED,
            **SLOWER,
        },
    ),
]
