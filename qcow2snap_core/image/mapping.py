"""From guest offsets to clusters: the L1 and L2 tables of one snapshot, or of an active disk.

A guest offset selects an L1 entry, which leads to an L2 table, whose entry describes the cluster.
Both tables are read in slices of at most 64 KiB at first use and kept in a bounded cache as
arrays of machine integers, so that a look-up is one dictionary access and one index.

A :class:`Mapping` answers in *runs*: the longest range from an offset on that is of one kind and,
where there is data, contiguous in the file.  Equal runs are found by comparing slices of the
array with the entries that they would have to hold, which the interpreter does in C.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator

from ..errors import Error, ImageError
from ..format import ondisk as q
from ..storage.local import Storage
from ..typed import Any, Final
from ..util.cache import BoundedCache
from .tablereader import Entries, Geometry, TableReader

# What a run is.
UNALLOCATED: Final = 0  # not in this layer; the one below, if any, has it
ZERO: Final = 1  # reads as zeros whatever lies below
DATA: Final = 2  # plain bytes
COMPRESSED: Final = 3  # one cluster

#: (length in bytes, kind, location).  The location is a host offset where there is data, and the
#: descriptor, which is the whole L2 entry, of a compressed cluster.
Run = tuple[int, int, int]

TableCache = BoundedCache[tuple[int, int], "Entries[int]"]


class Budget:
    """What a request may still cost over all layers, in look-ups of some 4 us.  Fetching a part
    of a table counts for several, and decoding a cluster for the CPU time that it takes: a stream
    can be made to take thirty times the usual."""

    __slots__ = ("remaining",)

    def __init__(self, remaining: int) -> None:
        self.remaining = remaining

    def spend_since(self, since: int) -> None:
        """Count the CPU time since then, of ``time.thread_time_ns()``."""
        self.remaining -= time.thread_time_ns() - since >> 12


_LOAD: Final = 4  # look-ups that reading a slice costs, besides its own
SLICE_BYTES: Final = 64 << 10
_STRIDE: Final = 64  # entries compared at a time; small, since most runs in a request are short


class Mapping:
    """The tables behind one L1; safe to use from several threads."""

    def __init__(
        self,
        storage: Storage,
        geometry: Geometry,
        l1_table_offset: int,
        l1_size: int,
        cache: TableCache,
        token: int,
        open_ended: bool = False,
        slice_bytes: int = SLICE_BYTES,
    ) -> None:
        """``token`` tells this mapping's slices in the shared cache from all others'; a cluster
        that was freed may hold another snapshot's table, so the host offset would not.
        ``open_ended``: past the L1 table nothing is allocated.  Otherwise who looks there gets an
        error, since QEMU makes every L1 table as large as its disk needs (size_to_l1).
        ``slice_bytes``: how much of a table is read at once, and lost if that cannot be."""
        bits = geometry.cluster_bits
        self.tables: Final = TableReader(storage, geometry, l1_table_offset, l1_size)
        self.cluster_size: Final = 1 << bits
        self.token: Final = token
        self.slice_bytes: Final = slice_bytes
        self._l1_size = l1_size
        self._bytes_per_l1_entry = self.tables.bytes_per_l1_entry
        self._open_ended = open_ended
        self._cache = cache
        self._bits = bits
        self._l2_bits = self.tables.l2_bits
        self._entry_bits = bits - self._l2_bits
        self._slice_bits = min(self._l2_bits, (slice_bytes.bit_length() - 1) - self._entry_bits)
        self._slice_mask = (1 << self._slice_bits) - 1
        self._data_file = geometry.data_file
        # A standard entry that is nothing but an offset has none of these bits.
        self._other_bits = ~(q.OFFSET_MASK & -self.cluster_size)
        self._zero_flag = q.OFLAG_ZERO if geometry.version >= 3 else 0

    def description(self) -> tuple[Any, ...]:
        """What the native engine has to know of the tables to look into the slices itself."""
        return (
            self._cache.items,
            self.token,
            self._bits,
            self._l2_bits,
            self._slice_bits,
            self._entry_bits == 4,
            self._data_file,
            bool(self._zero_flag),
        )

    @property
    def reach(self) -> int | None:
        """The first guest offset of which nothing can be told; None if there is none."""
        return None if self._open_ended else self.tables.l1_covers

    def runs(
        self, offset: int, length: int, budget: Budget | None = None
    ) -> Iterator[tuple[int, int, int, int]]:
        """The runs of a range, in order and merged: (guest offset, length, kind, location).

        It ends early, after at least one run, when the budget is spent.
        Raises ImageError or StorageError where the tables cannot be believed or read.
        """
        end = offset + length
        if budget is not None:
            budget.remaining -= 1
        n, kind, location = self.run(offset, length, budget)
        start, offset = offset, offset + n
        while offset < end:
            if budget is not None:
                budget.remaining -= 1
                if budget.remaining < 0:
                    break
            try:
                n, next_kind, next_location = self.run(offset, end - offset, budget)
            except Error:
                yield start, offset - start, kind, location  # so that it is known where it failed
                raise
            if (
                next_kind != kind
                or kind == COMPRESSED
                or (kind == DATA and next_location != location + offset - start)
            ):
                yield start, offset - start, kind, location
                start, kind, location = offset, next_kind, next_location
            offset += n
        yield start, offset - start, kind, location

    def run(self, offset: int, length: int, budget: Budget | None = None) -> Run:
        """What lies at guest ``offset``, and for how much of ``length`` it surely goes on.

        QEMU: qcow2_get_host_offset.  The caller counts the look-up itself.  Raises as :meth:`runs`.
        """
        index = offset >> self._bits
        table = self._cache.get((self.token, index >> self._slice_bits))
        if table is None:
            table = self._load(index >> self._slice_bits, budget)
        at = index & self._slice_mask
        within = offset & (self.cluster_size - 1)
        try:
            entry = table[at]
        except IndexError:
            return self._no_entry(table, offset, length, budget)
        if not entry & self._other_bits:
            step = self.cluster_size if entry else 0
            kind = DATA if entry else UNALLOCATED
            location = entry + within
        else:
            step, kind, location = self._classify(entry, within)
        have = self.cluster_size - within
        if have >= length:
            return length, kind, location
        if kind != COMPRESSED:
            more = -(-(length - have) >> self._bits)  # clusters, rounded up
            stop = min(at + 1 + more, len(table))
            have += count_continuing(table, at + 1, stop, entry, step) << self._bits
        return min(have, length), kind, location

    def _classify(self, entry: int, within: int) -> tuple[int, int, int]:
        """(step to an entry that continues it, kind, location) of one with more than an offset.

        QEMU: qcow2_get_cluster_type.
        """
        if entry & q.OFLAG_COPIED:  # kept for a data file only, where offset 0 may be in use
            entry ^= q.OFLAG_COPIED
            if not entry & self._other_bits:
                return self.cluster_size, DATA, entry + within
        if entry & q.OFLAG_COMPRESSED:
            self._no_compressed_in_data_file()
            return 0, COMPRESSED, entry
        host = entry & q.OFFSET_MASK
        if host & (self.cluster_size - 1):
            raise ImageError(f"an L2 entry holds the unaligned host offset {host:#x}")
        if entry & ~q.OFFSET_MASK & ~q.OFLAG_ZERO:
            raise ImageError(f"the L2 entry {entry:#018x} has reserved bits set")
        if not self._zero_flag:
            raise ImageError(f"the L2 entry {entry:#018x} is a zero cluster, unknown to version 2")
        return self.cluster_size if host else 0, ZERO, 0

    def _no_compressed_in_data_file(self) -> None:
        if self._data_file:
            raise ImageError("it is a compressed cluster, which cannot be in an external data file")

    # --- Loading ---

    def _no_entry(
        self, table: Entries[int], offset: int, length: int, budget: Budget | None
    ) -> Run:
        """Past what the slice holds: all of it when there is no L2 table, and more when there is
        none for what follows either, or a disk of exabytes would take hours to walk."""
        if table is _BEYOND:
            if length and not self._open_ended:
                raise ImageError(
                    f"its L1 table of {self._l1_size} entries "
                    f"covers only {self.tables.l1_covers} bytes"
                )
            return length, UNALLOCATED, 0
        if table is _ABSENT:
            first = offset // self._bytes_per_l1_entry
            last = (offset + length - 1) // self._bytes_per_l1_entry
            l1, at = self._l1_slice(first, budget)
            stop = min(at + 1 + last - first, len(l1))
            absent = 1 + count_continuing(l1, at + 1, stop, l1[at], 0)
            return min((first + absent) * self._bytes_per_l1_entry - offset, length), UNALLOCATED, 0
        raise ImageError("its L2 table lies past the end of the file")

    def _load(self, index: int, budget: Budget | None) -> Entries[int]:
        """Slice ``index`` of all the L2 tables, laid end to end."""
        l1_index, part = divmod(index, 1 << self._l2_bits - self._slice_bits)
        if l1_index >= self._l1_size:
            return _BEYOND
        l1, at = self._l1_slice(l1_index, budget)
        table_offset = self.tables.l2_offset(l1_index, l1[at])
        if not table_offset:
            return _ABSENT
        if budget is not None:
            budget.remaining -= _LOAD
        entries = 1 << self._slice_bits
        return self._cache.load(
            (self.token, index),
            lambda: self.tables.l2_slice(table_offset, part * entries, entries),
            entries << self._entry_bits,
        )

    def _l1_slice(self, index: int, budget: Budget | None) -> tuple[Entries[int], int]:
        """Where an L1 entry is; that table is read in slices as well: it may be 32 MiB."""
        per_slice = self.slice_bytes // q.L1_ENTRY_SIZE
        first = index - index % per_slice
        count = min(per_slice, self._l1_size - first)
        key = (self.token, ~first)  # L1 slices share the cache; their keys are negative
        table = self._cache.get(key)
        if table is None:
            if budget is not None:
                budget.remaining -= _LOAD
            table = self._cache.load(
                key, lambda: self.tables.l1_slice(first, count), count * q.L1_ENTRY_SIZE
            )
        return table, index - first


_ABSENT: Final[Entries[int]] = array("Q")  # there is no L2 table
_BEYOND: Final[Entries[int]] = array("Q")  # nor any further L1 entry


def count_continuing(table: Entries[int], at: int, stop: int, entry: int, step: int) -> int:
    """How many entries from ``at`` to ``stop`` go on after ``entry``, each larger by ``step``;
    with a step of 0, how many are equal to it."""
    first = at
    expected = entry + step
    while at + _STRIDE <= stop:
        if table[at : at + _STRIDE] != _expected(expected, step):
            break
        at += _STRIDE
        expected += _STRIDE * step
    while at < stop and table[at] == expected:
        at += 1
        expected += step
    return at - first


def _expected(entry: int, step: int) -> Entries[int]:
    if step:
        return array("Q", range(entry, entry + _STRIDE * step, step))
    return array("Q", (entry,)) * _STRIDE
