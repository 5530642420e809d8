"""What a client is: code of others that trains, and what is tried with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STAGES = ("equal at 1.0", "all widths", "resumed", "extracted")


@dataclass(frozen=True)
class Client:
    """A published program that is run as it is, and with the lines of its diff.

    The program is found at `source` below the folder of checkouts, such as "lightly/examples/pytorch/moco.py", and its
    diff at `<name>.diff` beside this file. It runs in a copy of its folder, with `arguments` as `sys.argv[1:]`. In its
    imports it meets the `stand_ins`: "module.name" -> a function that gets what is there and returns what the program
    gets instead. Data sets and loaders are replaced for all programs, see `programs.STAND_INS`.

    Attributes:
        name: library and program, such as "lightly/moco".
        source: the program's file.
        arguments: of its command line.
        stand_ins: what is replaced besides data sets and loaders.
        images: shape of a batch that the model takes, for the comparison with extracted networks.
        extracts: the part of the model that is extracted, by its path from the name in the program, such as
            "model.backbone".
        needs: what the program still needs beyond the three lines, and why; a sentence for the table.
        same_as: name of a client of the same program, with other arguments, whose diff is taken.
    """

    name: str
    source: str
    arguments: Sequence[str] = ()
    stand_ins: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    images: tuple[int, ...] = (4, 3, 32, 32)
    extracts: str = "model.backbone"
    needs: str = ""
    same_as: str = ""

    @property
    def file(self) -> str:
        """The program's file in its folder."""
        return Path(self.source).name

    @property
    def diff(self) -> str:
        """The lines to change, as hunks; see `difference`."""
        return (HERE / f"{self.same_as or self.name}.diff").read_text()


def options(**options: Any) -> Callable[[Any], Any]:
    """Return a stand-in that calls what was there, with these arguments whatever the program gives."""
    return lambda original: lambda *args, **given: original(*args, **{**given, **options})


def instead(replacement: Any) -> Callable[[Any], Any]:
    """Return a stand-in that is `replacement`, whatever was there."""
    return lambda original: replacement
