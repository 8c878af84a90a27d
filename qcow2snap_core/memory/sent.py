"""Which pages of a block have been sent, and which of them were zero when they last were.

Two bits for each page: a byte would be 2 GiB for the largest memory that is read.
"""

from __future__ import annotations

from .blocks import PAGE, Block, Run


class Sent:
    """The notes on a block."""

    def __init__(self, block: Block) -> None:
        self._pages = block.size // PAGE
        self._sent = bytearray(-(-self._pages // 8))
        self._data = bytearray(len(self._sent))
        self._count = 0  # of pages that were sent
        #: bytes in pages that were not zero when they were last sent
        self.data = 0

    def note(self, run: Run) -> bool:
        """Whether something of it had been sent before that was not zero."""
        first, count = run.offset // PAGE, run.length // PAGE
        had_data = _set(self._data, first, count, run.data is not None)
        self.data += (count * (run.data is not None) - had_data) * PAGE
        self._count += count - _set(self._sent, first, count, True)
        return had_data > 0

    def missing(self) -> tuple[int, int] | None:
        """(how many pages never came, the offset of the first); None if all did."""
        if self._count == self._pages:
            return None
        at = next(n for n, bits in enumerate(self._sent) if bits != 0xFF)
        bit = (~self._sent[at] & self._sent[at] + 1).bit_length() - 1  # the lowest that is clear
        return self._pages - self._count, (8 * at + bit) * PAGE


def _set(bitmap: bytearray, first: int, count: int, value: bool) -> int:
    """Set so many bits to the value; returns how many of them were set."""
    start, end = first // 8, -(-(first + count) // 8)
    mask = (1 << count) - 1 << first % 8
    before = int.from_bytes(bitmap[start:end], "little")
    after = before | mask if value else before & ~mask
    bitmap[start:end] = after.to_bytes(end - start, "little")
    return (before & mask).bit_count()
