"""Tables as HTML for notebooks and as CSV, and lists in messages: of names, and of how tensors differ."""

import csv
import io
from collections.abc import Container, Iterable, Mapping, Sequence
from html import escape
from typing import Any


def html_table(rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table of a header and rows, with its cells escaped, a long one in a box that scrolls."""
    lines = (("td" if number else "th", row) for number, row in enumerate(rows))
    cells = ["".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in line) for tag, line in lines]
    return f'<div style="max-height: 30em; overflow: auto"><table><tr>{"</tr><tr>".join(cells)}</tr></table></div>'


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Return rows as CSV text with these columns; a cell that a row does not have is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def listed(names: Sequence[str], most: int | None = None) -> str:
    """Return the first names, separated by commas, and how many more there are; `most` is None for all of them."""
    more = 0 if most is None else len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def listing(kinds: Mapping[str, Sequence[str]], most: int | None = None) -> str:
    """Return a line for each kind that has names, as `listed` lists them, behind a line break and two spaces."""
    return "".join(f"\n  {kind}: {listed(names, most)}" for kind, names in kinds.items() if names)


def differences(
    expected: Mapping[str, Any], given: Mapping[str, Any], most: int | None = None, smaller: Container[str] = ()
) -> str:
    """Return how tensors `given` in a file differ in names and shapes: a line per kind, with `most` names, or ""."""

    def fits_inside(small: Sequence[int], large: Sequence[int]) -> bool:
        return len(small) == len(large) and all(min(1, b) <= a <= b for a, b in zip(small, large, strict=True))

    kinds = {
        "missing": [name for name in expected if name not in given],
        "unknown": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in given and given[name].shape != tensor.shape
            if not (name in smaller and fits_inside(given[name].shape, tensor.shape))
        ],
    }
    return listing(kinds, most)
