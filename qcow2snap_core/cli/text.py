"""Text for people: tables in aligned columns, cut to the width of a terminal where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

_SHORTEST: Final = 8  # characters of a name, however narrow the terminal is


def terminal_width() -> int:
    """Columns of the terminal that standard output is, unless COLUMNS says another number; 80 where
    it is none.  (shutil's function asks sys.__stdout__, which has been replaced.)"""
    asked = os.environ.get("COLUMNS", "")
    if asked.isascii() and asked.isdigit() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


def can_print(characters: str) -> bool:
    """Whether standard output can show them as they are."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def cut(word: str, length: int) -> str:
    """The word, or its beginning and a sign that there is more."""
    more = "…" if can_print("…") else "..."
    return word if len(word) <= length else word[: max(0, length - len(more))] + more


def fitted(
    rows: Sequence[Sequence[str]], shown: Sequence[int], names: Sequence[int], width: int
) -> list[list[str]]:
    """The rows with what stands in the columns ``names`` cut so that the columns ``shown`` fit the
    width; the first of ``names`` is cut first."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    excess = sum(widths[i] for i in shown) + 2 * (len(shown) - 1) - width
    for name in names:
        if excess <= 0:
            break
        room = max(min(widths[name], _SHORTEST), widths[name] - excess)
        excess -= widths[name] - room
        for row in cells[1:]:
            row[name] = cut(row[name], room)
    return cells


def filled(items: Sequence[str], width: int) -> list[str]:
    """Lines with as many of the items as fit."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 2 + len(item) <= width:
            lines[-1] += f"  {item}"
        else:
            lines.append(item)
    return lines


def print_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Rows in aligned columns, the first being the titles; ``right`` are columns of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
