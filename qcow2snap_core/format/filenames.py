"""File names for snapshots, whose own names are any bytes at all and need not be unique.

What ``split`` calls its overlays and ``mount`` its directories.  It is the name that ``serve``
exports the snapshot by, as far as a file can have that: the snapshot's, else its ID.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Final

from .snapshots import Snapshot

_LONGEST: Final = 255  # bytes, of every Linux filesystem


def file_names(
    snapshots: Sequence[Snapshot], ending: str = "", taken: Collection[str] = ()
) -> list[str]:
    """What the file or directory of each snapshot is called, without the ending; none is one of
    those that are ``taken``.

    The name where that is one of its own and fits, else the ID; a number makes it unique when
    that is another's too, which no image made by QEMU needs.
    """
    names = Counter(s.name for s in snapshots)
    ids = {encoded(s.id) for s in snapshots}
    used = set(taken)
    numbers: Counter[str] = Counter()  # the last one tried; in a hostile table all may be alike
    found: list[str] = []
    for s in snapshots:
        name = encoded(s.name)
        own = name and names[s.name] == 1 and (name not in ids or s.name == s.id)
        if not own or name in taken or not _fits(name + ending):
            name = encoded(s.id) or "unnamed"
        free = name
        while free in used or not _fits(free + ending):
            numbers[name] += 1
            free = f"{name[:50]}.{numbers[name] + 1}"
        used.add(free)
        found.append(free)
    return found


def encoded(name: str) -> str:
    """A name as a file's.  Percent-encoded is what no file name can hold, what hides a file or
    makes an option of it, and what does not show as what it is: control characters, those that
    turn the direction of writing, bytes that are not UTF-8."""
    bare = name.lstrip(".")
    leading = len(name) - len(bare) or name.startswith("-")
    return "".join(
        c if i >= leading and c.isprintable() and c not in "/%" else _percent(c)
        for i, c in enumerate(name)
    )


def _fits(name: str) -> bool:
    return len(os.fsencode(name)) <= _LONGEST


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
