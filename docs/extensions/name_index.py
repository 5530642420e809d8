"""Write the page that lists every public name, from the docstrings.

PYTHONPATH=. python docs/extensions/name_index.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from itertools import groupby
from pathlib import Path

import slimmable

PAGE = Path(__file__).parents[1] / "reference" / "index.md"
_NAMES = re.compile(r"(<!-- names -->\n).*(<!-- end of names -->)", re.DOTALL)


def with_names(page: str) -> str:
    """Return the page with its list as it has to be."""
    lines = "\n".join(_lines()).strip()
    return _NAMES.sub(lambda found: f"{found[1]}\n{lines}\n\n{found[2]}", page)


def public_names() -> list[str]:
    """Return the names of all that the package and its submodules export, with the modules that hold them."""
    places = ["slimmable", *(f"slimmable.{name}" for name in slimmable._SUBMODULES)]
    return [f"{place}.{name}" for place in places for name in import_module(place).__all__]


def _lines() -> Iterator[str]:
    found: dict[tuple[str, int], list[str]] = {}  # what two modules export under one name has one line
    for path in public_names():
        place, _, name = path.rpartition(".")
        found.setdefault((name, id(getattr(import_module(place), name))), []).append(path)
    order = sorted(found.values(), key=lambda paths: (_name(paths[0]).lower(), paths))
    for letter, entries in groupby(order, lambda paths: _name(paths[0])[0].upper()):
        yield f"\n## {letter}\n\n| name | in | is |\n|---|---|---|"
        for paths in entries:
            places = ", ".join(f"`{path.rpartition('.')[0]}`" for path in paths)
            link, summary = _described(paths[0])
            yield f"| [`{_name(paths[0])}`][{link}] | {places} | {summary} |"


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _described(path: str) -> tuple[str, str]:
    """Return where a name is described, and a line that says what it is."""
    place, _, name = path.rpartition(".")
    value = getattr(import_module(place), name)
    own = getattr(value, "__name__", name)
    if not inspect.ismodule(value) and own != name:
        return f"{value.__module__}.{own}", f"The same as `{own}`."
    first = (inspect.getdoc(value) or "").partition("\n")[0]
    return path, first.partition(" Raises: ")[0].replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(with_names(PAGE.read_text()))
