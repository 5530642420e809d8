"""Write the notebooks of the tutorials, from their pages.

python docs/extensions/notebooks.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parents[1] / "tutorials"
_PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def pages() -> list[Path]:
    """Return the pages that have a notebook, which lies beside each under the same name."""
    return sorted(TUTORIALS.glob("*.md"))


def link_to_notebook(page: Path) -> str:
    """Return the line with which a page begins, after its title."""
    return f"[This page as a notebook]({page.stem}.ipynb)\n\n"


def notebook(page: Path) -> str:
    """Return a page as a notebook: a code cell for each Python block, a Markdown cell for what stands between them."""
    found = {"cells": [], "metadata": {"kernelspec": _KERNEL, "language_info": {"name": "python"}}}
    for number, (kind, text) in enumerate(_cells(page)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"{page.stem}-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        found["cells"].append(cell | {"source": text.splitlines(keepends=True)})
    return json.dumps(found | {"nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False) + "\n"


def _cells(page: Path) -> Iterator[tuple[str, str]]:
    text = page.read_text().replace(link_to_notebook(page), "", 1)
    for place, part in enumerate(_PROGRAM.split(text)):  # what is captured has the odd places
        if part.strip():
            yield ("code" if place % 2 else "markdown"), part.strip("\n")


if __name__ == "__main__":
    for each in pages():
        each.with_suffix(".ipynb").write_text(notebook(each))
