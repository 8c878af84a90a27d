"""From guest offsets to clusters: the L1 and L2 tables of one snapshot, or of an active disk.

A guest offset selects an L1 entry, which leads to an L2 table, whose entry describes the cluster.
Both tables are read in slices of at most 64 KiB at first use and kept in a bounded cache as
arrays of machine integers, so that a look-up is one dictionary access and one index.

A :class:`Mapping` answers in *runs*: the longest range from an offset on that is of one kind and,
where there is data, contiguous in the file.  Equal runs are found by comparing slices of the
array with the entries that they would have to hold, which the interpreter does in C.

Bit 63 (COPIED) is cleared when a slice is loaded: it says only whether QEMU may write in place,
and it is the one thing that QEMU changes in the tables of a living snapshot.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator

from ..errors import Error, ImageError
from ..format import ondisk as q
from ..storage.local import Storage
from ..typed import Any, Final, NamedTuple
from ..util.cache import BoundedCache

# What a run is.
UNALLOCATED: Final = 0  # not in this layer; the one below, if any, has it
ZERO: Final = 1  # reads as zeros whatever lies below
DATA: Final = 2  # plain bytes at the host offset
COMPRESSED: Final = 3  # one cluster; host is the whole L2 entry, not an offset

#: (kind, host offset, length in bytes)
Run = tuple[int, int, int]

Slice = array  # of unsigned 64-bit integers
TableCache = BoundedCache[tuple[int, int], "Slice[int]"]


class Geometry(NamedTuple):
    """What the tables' layout follows from."""

    cluster_bits: int
    version: int
    extended_l2: bool = False
    data_file: bool = False


class Work:
    """What a request may still cost over all layers, in look-ups of some 4 us.  Fetching a part
    of a table counts for several, and decoding a cluster for the CPU time that it takes: a stream
    can be made to take thirty times the usual."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def took(self, since: int) -> None:
        """Count the CPU time since then, of ``time.thread_time_ns()``."""
        self.left -= time.thread_time_ns() - since >> 12


_LOAD: Final = 4  # look-ups that reading a slice costs, besides its own
_SLICE_BYTES: Final = 64 << 10
_CLEAR_COPIED: Final = bytes(b & 0x7F for b in range(256))
_STRIDE: Final = 64  # entries compared at a time; small, since most runs in a request are short


class Mapping:
    """The tables behind one L1; safe to use from several threads."""

    _entry_bits = 3  # an L2 entry is 8 bytes

    def __init__(
        self,
        storage: Storage,
        geometry: Geometry,
        l1_table_offset: int,
        l1_size: int,
        cache: TableCache,
        token: int,
        open_ended: bool = False,
    ) -> None:
        """``token`` tells this mapping's slices in the shared cache from all others'; a cluster
        that was freed may hold another snapshot's table, so the host offset would not.
        ``open_ended``: past the L1 table nothing is allocated.  Otherwise who looks there gets an
        error, since QEMU makes every L1 table as large as its disk needs (size_to_l1)."""
        bits = geometry.cluster_bits
        self.cluster_size = 1 << bits
        self._storage = storage
        self._l1_table_offset = l1_table_offset
        self._l1_size = l1_size
        self._open_ended = open_ended
        self._cache = cache
        self.token = token
        self._bits = bits
        self._l2_bits = bits - self._entry_bits  # entries of an L2 table
        #: guest bytes behind one L1 entry
        self.bytes_per_l1_entry = self.cluster_size << self._l2_bits
        self._slice_bits = min(self._l2_bits, (_SLICE_BYTES.bit_length() - 1) - self._entry_bits)
        self._slice_mask = (1 << self._slice_bits) - 1
        self._data_file = geometry.data_file
        # A standard entry that is nothing but an offset has none of these bits.
        self._odd = ~(q.OFFSET_MASK & -self.cluster_size)
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

    @staticmethod
    def of(geometry: Geometry) -> type[Mapping]:
        """The class for tables of this geometry."""
        if geometry.extended_l2:
            from .subclusters import SubclusterMapping

            return SubclusterMapping
        return Mapping

    @property
    def storage(self) -> Storage:
        """The file that they are in."""
        return self._storage

    def runs(
        self, offset: int, length: int, work: Work | None = None
    ) -> Iterator[tuple[int, int, int, int]]:
        """The runs of a range, in order and merged: (kind, host offset, guest offset, length).

        It ends early, after at least one run, when the work that was allowed is done.
        Raises ImageError or StorageError where the tables cannot be believed or read.
        """
        end = offset + length
        if work is not None:
            work.left -= 1
        kind, host, n = self.run(offset, length, work)
        start, offset = offset, offset + n
        while offset < end:
            if work is not None:
                work.left -= 1
                if work.left < 0:
                    break
            try:
                next_kind, next_host, n = self.run(offset, end - offset, work)
            except Error:
                yield kind, host, start, offset - start  # so that it is known where it failed
                raise
            if (
                next_kind != kind
                or kind == COMPRESSED
                or (kind == DATA and next_host != host + offset - start)
            ):
                yield kind, host, start, offset - start
                kind, host, start = next_kind, next_host, offset
            offset += n
        yield kind, host, start, offset - start

    def run(self, offset: int, length: int, work: Work | None = None) -> Run:
        """What lies at guest ``offset``, and for how much of ``length`` it surely goes on.

        QEMU: qcow2_get_host_offset.  The caller counts the look-up itself.  Raises as :meth:`runs`.
        """
        index = offset >> self._bits
        table = self._cache.get((self.token, index >> self._slice_bits))
        if table is None:
            table = self._load(index >> self._slice_bits, work)
        at = index & self._slice_mask
        within = offset & (self.cluster_size - 1)
        try:
            entry = table[at]
        except IndexError:
            return self._no_entry(table, offset, length, work)
        if not entry & self._odd:
            step = self.cluster_size if entry else 0
            kind = DATA if entry else UNALLOCATED
            host = entry + within
        else:
            kind, host, step = self._classify(entry, within)
        have = self.cluster_size - within
        if have >= length:
            return kind, host, length
        if kind != COMPRESSED:
            more = -(-(length - have) >> self._bits)  # clusters, rounded up
            stop = min(at + 1 + more, len(table))
            have += alike(table, at + 1, stop, entry, step) << self._bits
        return kind, host, min(have, length)

    def _classify(self, entry: int, within: int) -> Run:
        """(kind, host offset, step to an entry that continues it) of an entry with odd bits.

        QEMU: qcow2_get_cluster_type.
        """
        if entry & q.OFLAG_COPIED:  # kept for a data file only, where offset 0 may be in use
            entry ^= q.OFLAG_COPIED
            if not entry & self._odd:
                return DATA, entry + within, self.cluster_size
        if entry & q.OFLAG_COMPRESSED:
            self._no_compressed_in_data_file()
            return COMPRESSED, entry, 0
        host = entry & q.OFFSET_MASK
        if host & (self.cluster_size - 1):
            raise ImageError(f"an L2 entry holds the unaligned host offset {host:#x}")
        if entry & ~q.OFFSET_MASK & ~q.OFLAG_ZERO:
            raise ImageError(f"the L2 entry {entry:#018x} has reserved bits set")
        if not self._zero_flag:
            raise ImageError(f"the L2 entry {entry:#018x} is a zero cluster, unknown to version 2")
        return ZERO, 0, self.cluster_size if host else 0

    def _no_compressed_in_data_file(self) -> None:
        if self._data_file:
            raise ImageError("it is a compressed cluster, which cannot be in an external data file")

    # --- Whole tables, for those who walk them once: past the cache, with COPIED cleared ---

    @property
    def l1_size(self) -> int:
        """Entries of the L1 table."""
        return self._l1_size

    @property
    def l1_covers(self) -> int:
        """The first guest offset that the L1 table says nothing of."""
        return self._l1_size * self.bytes_per_l1_entry

    @property
    def reach(self) -> int | None:
        """The first guest offset of which nothing can be told; None if there is none."""
        return None if self._open_ended else self.l1_covers

    def l1_entries(self, first: int, count: int) -> Slice[int]:
        """L1 entries as they stand; zeros past the table's end, whether or not that is damage."""
        have = max(0, min(count, self._l1_size - first))
        offset = self._l1_table_offset + first * q.L1_ENTRY_SIZE
        raw = bytearray(self._storage.read(have * q.L1_ENTRY_SIZE, offset) if have else b"")
        if len(raw) < have * q.L1_ENTRY_SIZE:
            raise ImageError(f"the L1 table at host offset {offset:#x} is past the file's end")
        raw[::8] = raw[::8].translate(_CLEAR_COPIED)
        return q.integers(raw + bytes((count - have) * q.L1_ENTRY_SIZE))

    def l2_offset(self, index: int, entry: int) -> int:
        """Where the L2 table of L1 entry ``index`` is; 0 if there is none."""
        offset = entry & q.OFFSET_MASK
        if entry & ~q.OFFSET_MASK & ~q.OFLAG_COPIED or offset & (self.cluster_size - 1):
            raise ImageError(f"L1 entry {index} is invalid: {entry:#018x}")
        return offset

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 1 << self._entry_bits

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return 1 << self._l2_bits

    def l2_raw(self, offset: int, first: int, count: int) -> bytearray:
        """Entries of the L2 table at host ``offset``, as bytes."""
        size = count << self._entry_bits
        at = offset + (first << self._entry_bits)
        raw = bytearray(self._storage.read(size, at))
        if len(raw) < size:
            raise ImageError(f"its L2 table at host offset {offset:#x} is past the end of the file")
        self._clear_copied(raw)
        return raw

    def l2_part(self, offset: int, first: int, count: int) -> Slice[int]:
        """The same as integers, of extended entries the first word alone."""
        words = q.integers(self.l2_raw(offset, first, count))
        return words[:: 1 << self._entry_bits - 3]

    # --- Loading ---

    def _no_entry(self, table: Slice[int], offset: int, length: int, work: Work | None) -> Run:
        """Past what the slice holds: all of it when there is no L2 table, and more when there is
        none for what follows either, or a disk of exabytes would take hours to walk."""
        if table is _BEYOND:
            if length and not self._open_ended:
                raise ImageError(
                    f"its L1 table of {self._l1_size} entries covers only {self.l1_covers} bytes"
                )
            return UNALLOCATED, 0, length
        if table is _ABSENT:
            first = offset // self.bytes_per_l1_entry
            last = (offset + length - 1) // self.bytes_per_l1_entry
            l1, at = self._l1_slice(first, work)
            stop = min(at + 1 + last - first, len(l1))
            absent = 1 + alike(l1, at + 1, stop, l1[at], 0)
            return UNALLOCATED, 0, min((first + absent) * self.bytes_per_l1_entry - offset, length)
        raise ImageError("its L2 table lies past the end of the file")

    def _load(self, index: int, work: Work | None) -> Slice[int]:
        """Slice ``index`` of all the L2 tables, laid end to end."""
        l1_index, part = divmod(index, 1 << self._l2_bits - self._slice_bits)
        if l1_index >= self._l1_size:
            return _BEYOND
        l1, at = self._l1_slice(l1_index, work)
        table_offset = self.l2_offset(l1_index, l1[at])
        if not table_offset:
            return _ABSENT
        if work is not None:
            work.left -= _LOAD
        size = 1 << self._slice_bits + self._entry_bits
        return self._cache.load(
            (self.token, index), lambda: self._read(table_offset + part * size, size), size
        )

    def _read(self, offset: int, size: int) -> Slice[int]:
        """A slice of an L2 table; shorter where the file ends."""
        raw = bytearray(self._storage.read(size, offset))
        del raw[len(raw) & -(1 << self._entry_bits) :]
        if not raw:
            raise ImageError(f"its L2 table at host offset {offset:#x} is past the end of the file")
        self._clear_copied(raw)
        return q.integers(raw)

    def _clear_copied(self, raw: bytearray) -> None:
        """Of L2 entries, unless it tells offset 0 from nothing."""
        if not self._data_file:
            stride = 1 << self._entry_bits
            raw[::stride] = raw[::stride].translate(_CLEAR_COPIED)

    def _l1_slice(self, index: int, work: Work | None) -> tuple[Slice[int], int]:
        """Where an L1 entry is; that table is read in slices as well: it may be 32 MiB."""
        per_slice = _SLICE_BYTES // q.L1_ENTRY_SIZE
        first = index - index % per_slice
        count = min(per_slice, self._l1_size - first)
        offset = self._l1_table_offset + first * q.L1_ENTRY_SIZE

        def read() -> Slice[int]:
            raw = self._storage.read(count * q.L1_ENTRY_SIZE, offset)
            if len(raw) < count * q.L1_ENTRY_SIZE:
                raise ImageError(f"the L1 table at host offset {offset:#x} is past the file's end")
            return q.integers(raw)

        key = (self.token, ~first)  # L1 slices share the cache; their keys are negative
        table = self._cache.get(key)
        if table is None:
            if work is not None:
                work.left -= _LOAD
            table = self._cache.load(key, read, count * q.L1_ENTRY_SIZE)
        return table, index - first


_ABSENT: Final[Slice[int]] = array("Q")  # there is no L2 table
_BEYOND: Final[Slice[int]] = array("Q")  # nor any further L1 entry


def alike(table: Slice[int], at: int, stop: int, entry: int, step: int) -> int:
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


def _expected(entry: int, step: int) -> Slice[int]:
    if step:
        return array("Q", range(entry, entry + _STRIDE * step, step))
    return array("Q", (entry,)) * _STRIDE
