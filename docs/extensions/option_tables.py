"""Write the tables of options in the page on the command line from the dataclasses that state them.

PYTHONPATH=. python docs/extensions/option_tables.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from slimmable.cli.commands import COMMANDS
from slimmable.cli.config import flag, help_text

PAGE = Path(__file__).parents[1] / "reference" / "command-line.md"
_TABLE = re.compile(r"(<!-- options of (\w+) -->\n).*?(<!-- end of options -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """Return the page with its tables as they have to be."""

    def filled(found: re.Match[str]) -> str:
        lines = "\n".join(table(found[2])).strip()
        return f"{found[1]}\n{lines}\n\n{found[3]}"

    return _TABLE.sub(filled, page)


def table(command: str) -> Iterator[str]:
    """Yield the lines of the table of a command, or of one table per group of its options."""
    start = "| option | means |\n|---|---|"
    for options in COMMANDS[command]:
        for place, each in enumerate(fields(options)):
            if each.metadata["group"]:
                yield f"\n*{each.metadata['group'].capitalize()}*\n\n{start}"
            elif place == 0:
                yield start
            required = each.default is MISSING and not each.metadata["parsing"].get("required")
            yield f"| `{each.metadata['parsing']['metavar'] if required else flag(each.name)}` | {_means(each)} |"


def _means(each: Field[Any]) -> str:
    text = help_text(each)
    choices = ", ".join(f"`{choice}`" for choice in each.metadata["choices"])
    return f"{text}: {choices}" if choices else text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
