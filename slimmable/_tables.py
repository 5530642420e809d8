"""Tables as HTML for notebooks and as CSV, and lists of names in messages."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape


def html_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table with its cells escaped."""
    lines = [("th", header), *(("td", row) for row in rows)]
    cells = ["".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in line) for tag, line in lines]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


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
    """Return a line for each kind that has names, after a line break and two spaces, as `listed` lists them."""
    return "".join(f"\n  {kind}: {listed(names, most)}" for kind, names in kinds.items() if names)
