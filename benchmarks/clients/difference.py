"""The few lines that a program needs to train all widths: kept as hunks, applied, and counted as `diff -w` counts."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

SEPARATOR = "@@\n"
HEADER = "+++ "  # the hunks behind it belong to this file


def by_file(difference: str, first: str) -> dict[str, str]:
    """Return the hunks of each file; those before any header belong to the file `first`."""
    found: dict[str, str] = {}
    name = first
    for line in difference.splitlines(keepends=True):
        if line.startswith(HEADER):
            name = line.removeprefix(HEADER).strip()
        else:
            found[name] = found.get(name, "") + line
    return found


def apply(difference: str, program: str, wanted: Callable[[str], bool] = lambda hunk: True) -> str:
    """Return `program` with the wanted hunks of `difference` applied.

    A hunk has lines that begin with " ", "-" and "+", as in a unified diff. Instead of line numbers, its old lines tell
    its place: they must occur once behind the hunk before it.
    """
    start, done = 0, ""
    for hunk in difference.split(SEPARATOR):
        old, new = side(hunk, " -"), side(hunk, " +")
        if program.count(old, start) != 1:
            raise ValueError(f"found {program.count(old, start)} times, wanted once:\n{old}")
        place = program.index(old, start)
        done += program[start:place] + (new if wanted(hunk) else old)
        start = place + len(old)
    return done + program[start:]


def side(hunk: str, kept: str) -> str:
    """Return the lines of one side of a hunk: of the program before (" -") or after (" +")."""
    return "".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[:1] in kept)


def converts(hunk: str) -> bool:
    """Say whether a hunk belongs to the conversion; the others train the widths."""
    return "slim" in side(hunk, "+") and "recipe" not in hunk.lower()


@dataclass(frozen=True)
class Changes:
    """How many lines a program has more and less than before, white space aside, and how many are only re-indented."""

    added: int
    removed: int
    indented: int


def count(before: str, after: str) -> Changes:
    """Count as `diff -w` does: lines that differ in white space only are the same."""
    old, new = before.splitlines(), after.splitlines()
    bare = [["".join(line.split()) for line in lines] for lines in (old, new)]
    added = removed = indented = 0
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *bare, autojunk=False).get_opcodes():
        if kind == "equal":
            indented += sum(was != now for was, now in zip(old[a:b], new[c:d], strict=True))
        else:
            removed, added = removed + b - a, added + d - c
    return Changes(added, removed, indented)
