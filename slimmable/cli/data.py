"""The images of a run, by the name of the embedded set or from a folder."""

from __future__ import annotations

from pathlib import Path

from slimmable.cli.config import DIGITS, GLYPHS, PretrainConfig
from slimmable.cli.digits import cluttered_digits
from slimmable.cli.folder import folder_images
from slimmable.cli.glyphs import glyphs
from slimmable.cli.images import Images
from slimmable.cli.processes import is_first
from slimmable.cli.progress import say


def load_images(config: PretrainConfig) -> Images:
    """Make or find the images of `config`; the split does not depend on the run's seed."""
    if config.data == DIGITS:
        return cluttered_digits(config.images, config.images // 4, config.image_size)
    if config.data == GLYPHS:
        return glyphs(config.images, config.images // 4, config.image_size)
    return folder_images(Path(config.data), seed=0, say=say if is_first() else lambda text: None)
