"""Show the version of the package beside the name of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2] / "slimmable" / "__init__.py"


def on_config(config: Any, **kwargs: Any) -> Any:
    """Change the name of the site once ProperDocs has read its configuration."""
    (version,) = re.findall(r'^__version__ = "(.+)"$', PACKAGE.read_text(), re.MULTILINE)
    config.site_name = f"{config.site_name} {version}"
    return config
