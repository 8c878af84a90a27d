"""Extended L2 entries: a cluster in 32 subclusters, each allocated, zero or neither.

An entry is two integers: the first as in a standard table but without the zero flag, the second
a bitmap.  Bit x of its lower half says that subcluster x is allocated, of its upper half that it
reads as zeros; both at once is damage (spec: "Extended L2 Entries"; QEMU:
qcow2_get_subcluster_type).
"""

from __future__ import annotations

from typing import Final

from ..errors import ImageError
from ..format import ondisk as q
from .mapping import COMPRESSED, DATA, UNALLOCATED, ZERO, Budget, Mapping, Run, count_continuing

_ALL: Final = (1 << q.SUBCLUSTERS) - 1
_UNIFORM: Final = {DATA: _ALL, ZERO: _ALL << q.SUBCLUSTERS, UNALLOCATED: 0}

# Following clusters that one look-up compares; a longer run is put together by Mapping.runs.
_AHEAD: Final = 512


class SubclusterMapping(Mapping):
    """The tables of an image with extended L2 entries."""

    def run(self, offset: int, length: int, budget: Budget | None = None) -> Run:
        """As :meth:`.Mapping.run`, by subclusters."""
        index = offset >> self._bits
        table = self._cache.get((self.token, index >> self._slice_bits))
        if table is None:
            table = self._load(index >> self._slice_bits, budget)
        at = index & self._slice_mask
        within = offset & (self.cluster_size - 1)
        try:
            entry, bitmap = table[2 * at], table[2 * at + 1]
        except IndexError:
            return self._no_entry(table, offset, length, budget)
        host, allocated = self._offset(entry)
        if allocated is None:
            return min(self.cluster_size - within, length), COMPRESSED, entry
        kind, have = self._subclusters(bitmap, within, allocated)
        if have < length and within + have == self.cluster_size:
            ahead = -(-(length - have) >> self._bits)
            stop = min(at + 1 + min(ahead, _AHEAD), len(table) // 2)
            entries = table[2 * at + 2 : 2 * stop : 2]
            bitmaps = table[2 * at + 3 : 2 * stop : 2]
            step = self.cluster_size if allocated else 0
            more = count_continuing(entries, 0, len(entries), entry, step)
            uniform = _UNIFORM[kind]
            have += count_continuing(bitmaps, 0, more, uniform, 0) << self._bits
        return min(have, length), kind, host + within if kind == DATA else 0

    def _offset(self, entry: int) -> tuple[int, bool | None]:
        """(host offset, whether there is one) of an entry; None for a compressed cluster."""
        copied = entry & q.OFLAG_COPIED  # kept for a data file only, where offset 0 may be in use
        entry ^= copied
        if entry & q.OFLAG_COMPRESSED:
            self._no_compressed_in_data_file()
            return 0, None
        if entry & self._other_bits:
            if entry & ~q.OFFSET_MASK:
                raise ImageError(f"the L2 entry {entry:#018x} has reserved bits set")
            raise ImageError(f"an L2 entry holds the unaligned host offset {entry:#x}")
        return entry, bool(entry or copied)

    def _subclusters(self, bitmap: int, within: int, allocated: bool) -> tuple[int, int]:
        """The kind of the subcluster at ``within``, and how many bytes of the cluster from there
        on are of that kind."""
        alloc, zero = bitmap & _ALL, bitmap >> q.SUBCLUSTERS
        if alloc & zero:
            raise ImageError(f"the L2 bitmap {bitmap:#018x} has subclusters both data and zero")
        if alloc and not allocated:
            raise ImageError(f"the L2 bitmap {bitmap:#018x} has data without a host offset")
        size = self.cluster_size // q.SUBCLUSTERS
        first = within // size
        for kind, bits in ((DATA, alloc), (ZERO, zero), (UNALLOCATED, _ALL & ~(alloc | zero))):
            if bits >> first & 1:
                others = ~(bits >> first)
                run = (others & -others).bit_length() - 1  # ones at the low end
                return kind, (first + run) * size - within
        raise AssertionError("every subcluster is of one kind")
