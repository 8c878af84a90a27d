"""The form mapped-ram: each page has a place of its own in the state.

With that capability QEMU (savevm: from 11 on) writes no pages into the RAM's sections.  Behind the
name and length of each block follow a header, a bitmap of the pages that were written, and room for
all pages of the block; then comes the next block (mapped_ram_setup_ramblock in migration/ram.c).  A
page whose bit is clear is zero, whatever is in its place.

The bitmap is of the host's unsigned longs.  They are taken for those of a little-endian host, on
which x86 guests run.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Final, NamedTuple

from .blocks import PAGE, Block, Run
from .stream import Stream

_VERSION: Final = 1
_AT_ONCE: Final = 256  # pages
_BITMAP_AT_ONCE: Final = 1 << 20  # bytes: of 32 GiB


class Mapped(NamedTuple):
    """Where a block has what, in the state."""

    bitmap: int
    pages: int


def read_header(stream: Stream, block: Block) -> Mapped:
    """Of a block whose name and length have just been read; the next block is next.  Raises
    ImageError."""
    version, page, found = (
        stream.number(4),
        stream.number(8),
        Mapped(stream.number(8), stream.number(8)),
    )
    if version != _VERSION or page != PAGE:
        raise stream.damaged(f"mapped-ram of version {version} with pages of {page} bytes")
    if found.bitmap < stream.offset or found.pages < found.bitmap + _bitmap_size(block):
        raise stream.damaged(f"pages at {found.pages:#x}, which lie over something else")
    stream.seek(found.pages + block.size)
    return found


def mapped_runs(stream: Stream, blocks: tuple[Block, ...], where: list[Mapped]) -> Iterator[Run]:
    """All pages of all blocks."""
    for n, (block, at) in enumerate(zip(blocks, where, strict=True)):
        size = _bitmap_size(block)
        for start in range(0, size, _BITMAP_AT_ONCE):
            stream.seek(at.bitmap + start)
            bitmap = stream.take(min(_BITMAP_AT_ONCE, size - start))
            stream.seek(at.pages + start * 8 * PAGE)
            yield from _runs(stream, n, block, bitmap, start * 8)


def _runs(stream: Stream, n: int, block: Block, bitmap: bytes, before: int) -> Iterator[Run]:
    """The block's pages of which this is the bitmap; so many are before them."""
    unread = 0  # bytes of zero pages, which are passed over when there is one behind them
    for at in range(0, min(len(bitmap) * 8, block.size // PAGE - before), _AT_ONCE):
        first = before + at
        count = min(_AT_ONCE, block.size // PAGE - first)
        bits = int.from_bytes(bitmap[at // 8 : at // 8 + _AT_ONCE // 8], "little")
        for page, pages, written in _same(bits, count):
            offset, length = (first + page) * PAGE, pages * PAGE
            if written:
                stream.skip(unread)
                yield Run(n, offset, length, stream.take(length))
                unread = 0
            else:
                unread += length
                yield Run(n, offset, length, None)


def _same(bits: int, count: int) -> Iterator[tuple[int, int, bool]]:
    """(number of the first, how many there are, their value) of equal ones among so many bits."""
    at = 0
    for value, group in groupby(range(count), lambda bit: bits >> bit & 1):
        length = len(list(group))
        yield at, length, bool(value)
        at += length


def _bitmap_size(block: Block) -> int:
    return -(-(block.size // PAGE) // 64) * 8
