"""The refcounts: how often each cluster of the file is in use, as the image says itself.

A table of 64-bit offsets leads to blocks, each a cluster of refcounts of 1 to 64 bits; where there
is no block the refcounts are 0 (spec: "Refcount structure").
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
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


class Uses:
    """How often each cluster is in use, in pages of machine integers.

    A page has 32 bits for each until one of its clusters needs more.  64 bits are always enough:
    65,536 snapshots, 2^22 entries of an L1 table and 2^18 of an L2 table make 2^56.
    """

    _PAGE_BITS: Final = 12
    _PAGE: Final = 1 << _PAGE_BITS

    def __init__(self) -> None:
        self._pages: dict[int, array[int]] = {}
        self._empty = array("I", (0,)) * self._PAGE

    def add(self, cluster: int, times: int) -> None:
        number, at = cluster >> self._PAGE_BITS, cluster & self._PAGE - 1
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = self._empty[:]
        try:
            page[at] += times
        except OverflowError:
            page = self._pages[number] = array("Q", page)
            page[at] += times

    def of(self, cluster: int) -> int:
        page = self._pages.get(cluster >> self._PAGE_BITS)
        return page[cluster & self._PAGE - 1] if page is not None else 0

    def add_all(self, clusters: Iterable[int], times: int) -> None:
        """:meth:`add` for many, which are mostly neighbours."""
        last, mask = -1, self._PAGE - 1
        page = self._empty
        for cluster in clusters:
            number = cluster >> self._PAGE_BITS
            if number != last:
                self.add(cluster, 0)
                page, last = self._pages[number], number
            try:
                page[cluster & mask] += times
            except OverflowError:
                self.add(cluster, times)
                page = self._pages[number]

    def stretches(self, most: int) -> Iterator[tuple[int, Sequence[int]]]:
        """(first cluster, how often each is in use), in order, ``most`` clusters or less."""
        step = min(most, self._PAGE)
        for number in sorted(self._pages):
            for at in range(0, self._PAGE, step):
                yield (number << self._PAGE_BITS) + at, self._pages[number][at : at + step]


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
