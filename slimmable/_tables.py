"""HTML tables for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table with its cells escaped.

    >>> html_table(["width", "MACs"], [[0.5, "<10"]])
    '<table><tr><th>width</th><th>MACs</th></tr><tr><td>0.5</td><td>&lt;10</td></tr></table>'
    """
    return f"<table>{_row('th', header)}{''.join(_row('td', row) for row in rows)}</table>"


def _row(tag: str, cells: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
