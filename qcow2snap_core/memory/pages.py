"""The pages in a section of the RAM: each with its place in a block, and whether it is zero.

There is a word before each page, its offset in the block with flags in the low bits; the block's
name follows unless it is that of the page before (QEMU: ram_load_precopy in migration/ram.c).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Final

from ..errors import ImageError
from .blocks import PAGE, Block, Run
from .stream import Stream

# RAM_SAVE_FLAG_…, in the low bits of a page's offset
_ZERO_FLAG: Final = 0x02
MEM_SIZE: Final = 0x04
_PAGE_FLAG: Final = 0x08
_EOS: Final = 0x10
_CONTINUE: Final = 0x20
_XBZRLE: Final = 0x40
_COMPRESSED: Final = 0x100
_MULTIFD: Final = 0x200
FLAGS: Final = PAGE - 1

_COMPRESS_BOUND: Final = PAGE + (PAGE >> 12) + (PAGE >> 14) + 13  # zlib's for a page
_MOST: Final = 8 + 1 + 255 + 4 + _COMPRESS_BOUND  # a page with all that belongs to it
_RUN: Final = 1 << 20  # bytes that are handed on at once

_CANNOT: Final = {
    _XBZRLE: "pages as differences to older ones (XBZRLE)",
    _MULTIFD: "pages that were sent over other connections (multifd)",
}

_be64 = struct.Struct(">Q").unpack_from


class Pages:
    """The pages of all sections, one section after the other."""

    def __init__(self, stream: Stream, blocks: Sequence[Block]) -> None:
        self._stream = stream
        self._blocks = blocks
        self._numbers = {block.name.encode(): n for n, block in enumerate(blocks)}
        self._block: int | None = None  # of the page before

    def runs(self) -> Iterator[Run]:
        """Up to the section's end.  This is done for each of a million pages: so it looks into the
        window itself."""
        stream = self._stream
        first = end = 0  # of the pages gathered
        gathered: list[bytes] | None = None  # None: zeros
        while True:
            stream.ensure(_MOST)
            window, at = stream.window, stream.at
            # Fewer at the stream's end alone; what then is missing is noticed page by page.
            last = max(at, len(window) - _MOST)
            while at <= last:
                before = self._block
                at, offset, data, over = self._page(window, at)
                if at > len(window):
                    raise stream.ends_early()
                same = offset == end and self._block == before and end - first < _RUN
                if over or not same or (data is None) != (gathered is None):
                    if end > first:
                        assert before is not None
                        content = None if gathered is None else b"".join(gathered)
                        yield Run(before, first, end - first, content)
                    if over:
                        stream.at = at
                        return
                    first = offset
                    gathered = None if data is None else []
                end = offset + PAGE
                if data is not None and gathered is not None:
                    gathered.append(data)
            stream.at = at

    def _page(self, window: bytes, at: int) -> tuple[int, int, bytes | None, bool]:
        """(where the next begins, its offset in the block, its bytes if it is not zero, whether it
        was no page but the section's end)."""
        stream = self._stream
        try:
            (word,) = _be64(window, at)
            at += 8
            flags = word & FLAGS
            if flags == _EOS:
                return at, 0, None, True
            if not flags & _CONTINUE:
                length = window[at]
                name = window[at + 1 : at + 1 + length]
                at += 1 + length
                if at > len(window):
                    raise stream.ends_early()
            kind = flags & ~_CONTINUE
            if kind not in (_PAGE_FLAG, _ZERO_FLAG, _COMPRESSED):
                stream.at = at
                raise self._not_read(kind)
            if not flags & _CONTINUE:
                self._block = self._numbers.get(name)
            offset = word - flags
            if self._block is None or offset >= self._blocks[self._block].size:
                stream.at = at
                raise stream.damaged(f"a page at {offset:#x} that is in no RAM block")
            if kind == _PAGE_FLAG:
                return at + PAGE, offset, window[at : at + PAGE], False
            if kind == _ZERO_FLAG:  # all its bytes are this one
                fill = window[at]
                return at + 1, offset, bytes((fill,)) * PAGE if fill else None, False
            length = int.from_bytes(window[at : at + 4], "big")
            packed = window[at + 4 : at + 4 + length]
            if len(window) < at + 4 + length <= at + 4 + _COMPRESS_BOUND:
                raise stream.ends_early()
            return at + 4 + length, offset, self._unpacked(packed, length), False
        except (struct.error, IndexError):
            raise stream.ends_early() from None

    def _unpacked(self, packed: bytes, length: int) -> bytes:
        decoder = zlib.decompressobj()
        try:
            if length <= _COMPRESS_BOUND:
                data = decoder.decompress(packed, PAGE)
                more = decoder.decompress(decoder.unconsumed_tail, 1)
                if len(data) == PAGE and not more and decoder.eof:
                    return data
        except zlib.error:
            pass
        raise self._stream.damaged("a compressed page that is none")

    def _not_read(self, kind: int) -> ImageError:
        for flag, what in _CANNOT.items():
            if kind & flag:
                return ImageError(f"{self._stream.name} has {what}: that is not read")
        return self._stream.damaged(f"a page with the flags {kind:#x}")
