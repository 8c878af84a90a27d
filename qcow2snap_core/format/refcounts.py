"""The refcounts: how often each cluster of the file is in use, as the image says itself.

A table of 64-bit offsets leads to blocks, each a cluster of refcounts of 1 to 64 bits; where there
is no block the refcounts are 0 (spec: "Refcount structure").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ..errors import ImageError
from ..storage.local import Storage
from . import ondisk as q
from .header import Header

_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00  # bits 9 to 63 of an entry of the table
_MAX_TABLE_BYTES: Final = 8 << 20  # QCOW_MAX_REFTABLE_SIZE: memory to hold it
_TYPES: Final = {8: "B", 16: "H", 32: "I", 64: "Q"}


class Refcounts:
    """The refcounts of one image."""

    def __init__(self, storage: Storage, header: Header) -> None:
        """Reads the table.  Raises ImageError when it cannot be there."""
        self._storage = storage
        self._cluster = header.cluster_size
        self._width = header.refcount_bits
        offset = self.table_offset = header.refcount_table_offset
        size = self.table_bytes = header.refcount_table_clusters << header.cluster_bits
        if self._width > 64:
            raise ImageError(f"refcounts of {self._width} bits are impossible, 64 are the most")
        if not offset or offset % self._cluster or not 0 < size <= _MAX_TABLE_BYTES:
            raise ImageError(f"{size} bytes at host offset {offset:#x} can be no refcount table")
        raw = storage.read(size, offset)
        if len(raw) < size:
            raise ImageError(
                f"the refcount table at host offset {offset:#x} is past the file's end"
            )
        self._table = q.integers(raw)
        self.per_block = header.cluster_size * 8 // self._width
        self._empty = bytes(self.per_block)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(number, host offset) of each block that there is, as the table says."""
        for number, entry in enumerate(self._table):
            if entry:
                yield number, entry

    def block(self, number: int) -> Sequence[int]:
        """The refcounts of ``per_block`` clusters.  Raises ImageError where they cannot be had."""
        offset = self._table[number] if number < len(self._table) else 0
        if not offset:
            return self._empty
        if offset & ~_OFFSET_MASK or offset % self._cluster:
            raise ImageError(f"entry {number} of the refcount table is invalid: {offset:#018x}")
        raw = self._storage.read(self._cluster, offset)
        if len(raw) < self._cluster:
            raise ImageError(
                f"the refcount block at host offset {offset:#x} is past the file's end"
            )
        return (
            q.integers(raw, _TYPES[self._width]) if self._width >= 8 else _spread(raw, self._width)
        )


def _spread(raw: bytes, width: int) -> bytearray:
    """Refcounts of less than a byte; the first is in the lowest bits."""
    each = 8 // width
    mask = (1 << width) - 1
    counts = bytearray(len(raw) * each)
    for i in range(each):
        counts[i::each] = raw.translate(bytes(b >> i * width & mask for b in range(256)))
    return counts


def past_end(storage: Storage, cluster: int) -> int:
    """The first host offset that is past the file's last cluster."""
    return -(-storage.size() // cluster) * cluster
