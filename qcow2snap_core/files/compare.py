"""Which files changed from one snapshot to another: by their metadata, then by their content.

A guest's kernel sets a file's change time, which no program can set, whenever content or metadata
changes.  So what has all metadata alike is not read; what has not is, unless its size says it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Final, NamedTuple

from ..util.interrupts import raise_if_interrupted
from ..util.progress import Advance, progress
from .tree import MOST_ENTRIES, Filesystem, Kind, Node, walk

_BLOCK: Final = 1 << 20
_FIELDS: Final = ("kind", "size", "mode", "uid", "gid", "mtime", "ctime")
_DIRECTORY_FIELDS: Final = ("kind", "mode", "uid", "gid")  # what is in it is listed itself


class Change(NamedTuple):
    """A path whose entry is another one."""

    path: bytes
    change: str  #: ``added``, ``removed``, ``content`` or ``metadata``
    kind: Kind  #: of the new one, or of what was removed
    fields: tuple[str, ...]  #: what of the metadata differs


def compare(
    old: tuple[Filesystem, Node],
    new: tuple[Filesystem, Node],
    *,
    content: bool = False,
    most: int = MOST_ENTRIES,
) -> Iterator[Change]:
    """The changes below two directories, by path; ``content`` compares every file by content.

    Raises what reading raises.
    """
    before, after = (dict(walk(fs, top, most)) for fs, top in (old, new))
    doubtful = [
        path
        for path in before.keys() & after.keys()
        if _wants_reading(before[path], after[path], content)
    ]
    with progress("compare", sum(after[path].size for path in doubtful)) as advance:
        for path in sorted(before.keys() | after.keys()):
            a, b = before.get(path), after.get(path)
            whole = b"/".join(path)
            if a is None or b is None:
                there = a or b
                assert there is not None
                yield Change(whole, "added" if a is None else "removed", there.kind, ())
                continue
            fields = _differing(a, b)
            if _is_other(old[0], a, new[0], b, content, advance):
                yield Change(whole, "content", b.kind, fields)
            elif fields:
                yield Change(whole, "metadata", b.kind, fields)


def _differing(a: Node, b: Node) -> tuple[str, ...]:
    names = _DIRECTORY_FIELDS if a.kind is b.kind is Kind.DIRECTORY else _FIELDS
    return tuple(name for name in names if getattr(a, name) != getattr(b, name))


def _wants_reading(a: Node, b: Node, content: bool) -> bool:
    if a.kind is not b.kind or a.kind is not Kind.FILE or a.size != b.size:
        return False
    return content or bool(_differing(a, b))


def _is_other(
    old: Filesystem, a: Node, new: Filesystem, b: Node, content: bool, advance: Advance
) -> bool:
    if a.kind is not b.kind:
        return True
    if a.kind is Kind.LINK:
        return old.link(a) != new.link(b)
    if not _wants_reading(a, b, content):
        return a.kind is Kind.FILE and a.size != b.size
    for x, y in zip_longest(_blocks(old, a), _blocks(new, b)):
        raise_if_interrupted()
        advance(_BLOCK)
        if x != y:
            return True
    return False


def _blocks(fs: Filesystem, node: Node) -> Iterator[bytes]:
    """Whole mebibytes that are not zeros alone, each with its number before it: two files may have
    their holes in different places."""
    size = _BLOCK
    buffer, number = bytearray(size), 0
    for offset, piece in fs.chunks(node):
        at = 0
        while at < len(piece):
            here, within = divmod(offset + at, size)
            if here != number:
                if any(buffer):
                    yield number.to_bytes(8, "big") + bytes(buffer)
                buffer, number = bytearray(size), here
            n = min(size - within, len(piece) - at)
            buffer[within : within + n] = piece[at : at + n]
            at += n
    if any(buffer):
        yield number.to_bytes(8, "big") + bytes(buffer)
