"""Strips that show what snapshots share, as text for terminals and as an SVG picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Final, NamedTuple

from ..errors import escaped
from ..tables.findings import ACTIVE
from ..tables.sharing import Holds, Picture, Strip
from ..util.units import binary
from .text import can_print, filled


class _Look(NamedTuple):
    """How a cell is drawn, and what that means."""

    line: str
    ascii: str
    color: str
    meaning: str


# A line goes up to those that have it as well, and down to those; so what lives on is one line.
_OWN: Final = _Look("█", "#", "#d95f02", "its own")
_BOTH: Final = _Look("│", "|", "#7f9fbf", "with older and newer")
_OLDER: Final = _Look("╵", "'", "#9fb3c8", "with older")
_NEWER: Final = _Look("╷", ",", "#4a7aa8", "with newer")
_UNKNOWN: Final = _Look("?", "?", "#c00000", "damaged")
_NOTHING: Final = _Look("·", ".", "#eeeeee", "nothing stored")
_LOOKS: Final = (_OWN, _BOTH, _OLDER, _NEWER, _NOTHING, _UNKNOWN)


def _look(holds: Holds) -> _Look:
    """What is its own is what deleting frees: it must not be hidden by what lies beside it."""
    if Holds.UNKNOWN in holds:
        return _UNKNOWN
    if Holds.OWN in holds:
        return _OWN
    if Holds.OLDER in holds:
        return _BOTH if Holds.NEWER in holds else _OLDER
    return _NEWER if Holds.NEWER in holds else _NOTHING


def text(picture: Picture, rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Lines: of each row its columns and its strip, and what the characters mean, in lines of
    ``width`` columns."""
    encodable = can_print("".join(look.line for look in _LOOKS))
    used = set()
    for row, strip in zip(rows, picture.strips, strict=True):
        looks = [_look(holds) for holds in strip.cells]
        used.update(looks)
        drawn = "".join(look.line if encodable else look.ascii for look in looks)
        yield "  ".join([*row, drawn])
    signs = [look for look in _LOOKS if look in used]
    yield f"each character is {binary(picture.cell)}:"
    yield from filled([f"{x.line if encodable else x.ascii} {x.meaning}" for x in signs], width)


_HEIGHT: Final = 18
_GAP: Final = 6
_LABELS: Final = 180
_WIDTH: Final = 1024


def svg(picture: Picture, title: str) -> Iterator[str]:
    """The lines of an SVG picture of all strips."""
    cells = max(len(strip.cells) for strip in picture.strips)
    step = _WIDTH / max(1, cells)
    rows = len(picture.strips)
    legend = 30 + rows * (_HEIGHT + _GAP) + 14
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABELS + _WIDTH + 10}" '
        f'height="{legend + 20}" font-family="sans-serif" font-size="12">'
    )
    yield f"<title>{escape(escaped(title))}</title>"
    yield '<rect width="100%" height="100%" fill="white"/>'
    size = binary(cells * picture.cell)
    yield f'<text x="{_LABELS}" y="18">0</text>'
    yield f'<text x="{_LABELS + _WIDTH}" y="18" text-anchor="end">{size}</text>'
    for number, strip in enumerate(picture.strips):
        yield from _strip_svg(strip, picture.cell, step, 26 + number * (_HEIGHT + _GAP))
    at = _LABELS
    for look in _LOOKS[:-1]:
        yield f'<rect x="{at}" y="{legend - 10}" width="12" height="12" fill="{look.color}"/>'
        yield f'<text x="{at + 17}" y="{legend}">{look.meaning}</text>'
        at += 40 + 7 * len(look.meaning)
    yield "</svg>"


def _strip_svg(strip: Strip, cell: int, step: float, y: int) -> Iterator[str]:
    """One strip: a rectangle for each range that looks alike, which says what it is."""
    name = label(strip)
    shown = name if len(name) <= 24 else name[:23] + "…"
    yield f'<text x="{_LABELS - 8}" y="{y + 13}" text-anchor="end">{escape(shown)}</text>'
    at = 0
    for look, run in groupby(map(_look, strip.cells)):
        n = len(list(run))
        where = f"{binary(at * cell)} to {binary((at + n) * cell)}"
        yield (
            f'<rect x="{_LABELS + at * step:.6g}" y="{y}" width="{n * step:.6g}" '
            f'height="{_HEIGHT}" fill="{look.color}">'
            f"<title>{escape(name)}, {where}: {look.meaning}</title></rect>"
        )
        at += n


def label(strip: Strip) -> str:
    """What a strip's owner is called: the name, else the ID."""
    if strip.snapshot is None:
        return ACTIVE
    return escaped(strip.snapshot.name or strip.snapshot.id)
