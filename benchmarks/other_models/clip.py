"""Networks of open_clip."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import metadata
from typing import Any

from open_clip.model import CLIP, CustomTextCLIP

import slimmable
from benchmarks.other_models.entry import FULL, Entry, noise, tokens

VISION: dict[str, Any] = {"layers": 2, "width": 64, "head_width": 16, "image_size": 32, "patch_size": 8}
RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16, "image_size": 64}
TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}


def pair(size: int) -> slimmable.Inputs:
    return slimmable.Inputs(noise(2, 3, size, size), tokens(2, 16, vocabulary=99))


def entries() -> Iterator[Entry]:
    yield Entry("open_clip", "CLIP", "CLIP", partial(CLIP, 32, VISION, TEXT), partial(pair, 32), FULL)
    yield Entry("open_clip", "CLIP", "CLIP, ResNet", partial(CLIP, 32, RESNET, TEXT), partial(pair, 64), FULL)
    custom = partial(CustomTextCLIP, 32, VISION, TEXT)
    yield Entry("open_clip", "CLIP", "CustomTextCLIP", custom, partial(pair, 32), FULL)


def version() -> tuple[str, str]:
    return "open_clip", metadata.version("open_clip_torch")
