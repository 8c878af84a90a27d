"""Reading the L1 table of one snapshot, or of an active disk, and the L2 tables behind it.

Bit 63 (COPIED) is cleared: it says only whether QEMU may write in place, and it is the one thing
that QEMU changes in the tables of an existing snapshot.  In an image with an external data file
that bit distinguishes a cluster at offset 0 from none, so there it is kept.

Code that walks whole tables reads them here, without the cache; :mod:`.mapping` has the cache.
"""

from __future__ import annotations

from array import array

from ..errors import ImageError
from ..format import ondisk as q
from ..storage.local import Storage
from ..typed import Final, NamedTuple

Entries = array  # of unsigned 64-bit integers

_CLEAR_COPIED: Final = bytes(b & 0x7F for b in range(256))


class Geometry(NamedTuple):
    """What the tables' layout follows from."""

    cluster_bits: int
    version: int
    extended_l2: bool = False
    data_file: bool = False


class TableReader:
    """The tables behind one L1."""

    def __init__(
        self, storage: Storage, geometry: Geometry, l1_table_offset: int, l1_size: int
    ) -> None:
        entry_bits = 4 if geometry.extended_l2 else 3
        self.storage: Final = storage
        self.cluster_size: Final = 1 << geometry.cluster_bits
        self.l1_size: Final = l1_size  #: entries
        self.l2_entry_size: Final = 1 << entry_bits  #: bytes
        self.l2_bits: Final = geometry.cluster_bits - entry_bits
        self.l2_entries: Final = 1 << self.l2_bits
        #: guest bytes behind one L1 entry
        self.bytes_per_l1_entry: Final = self.cluster_size << self.l2_bits
        #: the first guest offset that the L1 table says nothing of
        self.l1_covers: Final = l1_size * self.bytes_per_l1_entry
        self._l1_table_offset = l1_table_offset
        self._data_file = geometry.data_file

    def l1_entries(self, first: int, count: int) -> Entries[int]:
        """L1 entries, to compare; zeros past the table's end, whether or not that is damage."""
        have = max(0, min(count, self.l1_size - first))
        raw = bytearray(self._l1_raw(first, have) if have else b"")
        raw[::8] = raw[::8].translate(_CLEAR_COPIED)
        return q.integers(raw + bytes((count - have) * q.L1_ENTRY_SIZE))

    def l1_slice(self, first: int, count: int) -> Entries[int]:
        """L1 entries as they stand, COPIED too; there must be that many."""
        return q.integers(self._l1_raw(first, count))

    def _l1_raw(self, first: int, count: int) -> bytes:
        offset = self._l1_table_offset + first * q.L1_ENTRY_SIZE
        raw = self.storage.read(count * q.L1_ENTRY_SIZE, offset)
        if len(raw) < count * q.L1_ENTRY_SIZE:
            raise ImageError(f"the L1 table at host offset {offset:#x} is past the file's end")
        return raw

    def l2_offset(self, index: int, entry: int) -> int:
        """Where the L2 table of L1 entry ``index`` is; 0 if there is none."""
        offset = entry & q.OFFSET_MASK
        if entry & ~q.OFFSET_MASK & ~q.OFLAG_COPIED or offset & (self.cluster_size - 1):
            raise ImageError(f"L1 entry {index} is invalid: {entry:#018x}")
        return offset

    def l2_raw(self, offset: int, first: int, count: int) -> bytearray:
        """Entries of the L2 table at host ``offset``, as bytes."""
        raw = self._l2_up_to_the_end(offset, first, count)
        if len(raw) < count * self.l2_entry_size:
            raise _past_end(offset)
        return raw

    def l2_part(self, offset: int, first: int, count: int) -> Entries[int]:
        """The same as integers, of extended entries the first word alone."""
        words = q.integers(self.l2_raw(offset, first, count))
        return words[:: self.l2_entry_size // 8]

    def l2_slice(self, offset: int, first: int, count: int) -> Entries[int]:
        """All words of the entries, as integers; fewer where the file ends."""
        raw = self._l2_up_to_the_end(offset, first, count)
        if not raw:
            raise _past_end(offset + first * self.l2_entry_size)
        return q.integers(raw)

    def _l2_up_to_the_end(self, offset: int, first: int, count: int) -> bytearray:
        size = self.l2_entry_size
        raw = bytearray(self.storage.read(count * size, offset + first * size))
        del raw[len(raw) & -size :]
        if not self._data_file:
            raw[::size] = raw[::size].translate(_CLEAR_COPIED)
        return raw


def _past_end(offset: int) -> ImageError:
    return ImageError(f"its L2 table at host offset {offset:#x} is past the end of the file")
