"""Make Markdown of what the docstrings say in plain text: examples become code, `Raises:` and the like stand out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import Class, Extension, Function, Module

_SHORT_SECTION = re.compile(r"(Raises|Returns|Shapes|Source): (?=\S)")


class PlainDocstrings(Extension):
    """Rewrite every docstring before it is parsed."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Change the docstring of one object that the loader has found."""
        if isinstance(obj, (Class, Function, Module)) and obj.docstring is not None:
            obj.docstring.value = "\n".join(_lines(obj.docstring.value.splitlines()))


def _lines(lines: list[str]) -> Iterator[str]:
    fenced = False
    for line in lines:
        example = line.startswith((">>> ", "... "))
        if example and not fenced:
            yield "```pycon"
            fenced = True
        elif fenced and not line.strip():
            yield "```"
            fenced = False
        yield _SHORT_SECTION.sub(r"\n**\1:** ", line) if not fenced and _SHORT_SECTION.match(line) else line
    if fenced:
        yield "```"
