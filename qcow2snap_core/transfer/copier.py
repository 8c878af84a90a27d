"""The states of one image in a new one: each cluster once, however many states share it.

The tables are gone through state by state, so what a state has on its own lies together and in the
guest's order.  An L2 table or a cluster that was met before is the one that was written then: it is
known by its host offset, since nobody changes what a snapshot has.

Two entries may lead to one cluster and not show all of it alike, as a disk ends inside it or by the
bitmaps of their subclusters.  So of a cluster that was not seen whole it is kept in mind which
parts were copied, in 32nds, and the others are copied when another entry shows them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from ..errors import ImageError
from ..format import ondisk as q
from ..image.disk import Disk
from ..image.image import Image
from ..image.mapping import COMPRESSED, UNALLOCATED, ZERO
from ..util.interrupts import raise_if_interrupted
from ..util.progress import Advance
from .compressors import Compressor, compressor
from .mover import THREADS
from .newimage import NewImage
from .shape import Shape

_BATCH: Final = 2 << 20  # bytes that are read at once, or a cluster
_PARTS: Final = q.SUBCLUSTERS
_ALL: Final = (1 << _PARTS) - 1


class _Shown(NamedTuple):
    """What an L2 entry shows of a cluster of the old image."""

    slot: int  # in the words of the new table
    old: int  # host offset of the cluster
    guest: int
    length: int


class Copier:
    """Writes L1 tables and all that they lead to."""

    def __init__(
        self, image: Image, new: NewImage, shape: Shape, compress: bool, advance: Advance
    ) -> None:
        """``compress``: the clusters too that are not compressed in the image.  ``advance`` hears
        of the guest's bytes behind each L2 table that was written."""
        self._image = image
        self._new = new
        self._shape = shape
        self._size = shape.cluster_size
        self._zeros = bytes(self._size)
        self._compressor: Compressor = compressor(shape.compression)
        self._pool = ThreadPoolExecutor(THREADS) if compress else None
        self._advance = advance
        self._tables: dict[tuple[int, int], int] = {}  # (old, bytes of the guest in it): new
        self._clusters: dict[int, int] = {}  # old offset, or entry of a compressed one: new entry
        self._copied: dict[int, int] = {}  # the parts, of clusters that are not copied whole

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def l1_table(self, disks: list[Disk]) -> array[int]:
        """Write what the L2 tables of a state's disk and of its VM state lead to, and these tables;
        returns their offsets.

        Raises as :meth:`.Disk.pread_into`.
        """
        span = self._shape.bytes_per_l1_entry
        end = max(disk.base + disk.size for disk in disks)
        l1 = array("Q", bytes(q.L1_ENTRY_SIZE * max(1, -(-end // span))))
        for disk in disks:
            if disk.reach < disk.size:
                raise ImageError(f"{disk.name}: its L1 table ends before its disk does")
            first, stop = disk.base // span, -(-(disk.base + disk.size) // span)
            have = max(0, min(stop, disk.tables.l1_size) - first)
            for index, entry in enumerate(disk.tables.l1_entries(first, have), first):
                raise_if_interrupted()
                old = disk.tables.l2_offset(index, entry)
                if old:
                    inside = min(span, disk.base + disk.size - index * span)
                    l1[index] = self._table(disk, old, index * span, inside)
            disk.confirm()
        return l1

    def _table(self, disk: Disk, old: int, guest: int, inside: int) -> int:
        key = old, inside
        if key not in self._tables:
            words = self._l2_words(disk, guest, inside)
            self._tables[key] = self._new.l2_table(words) if any(words) else 0
            self._advance(inside)
        return self._tables[key]

    def _l2_words(self, disk: Disk, first: int, inside: int) -> array[int]:
        """The new L2 table for the guest offsets from ``first`` on, its clusters written."""
        step = self._shape.entry_words
        words = array("Q", bytes(q.L2_ENTRY_SIZE * step * self._shape.l2_entries))
        whole: list[_Shown] = []  # neighbours, to be copied in one go
        for start, length, kind, host in disk.mapping.runs(first, inside):
            if kind == UNALLOCATED:
                continue
            for guest, n in _by_cluster(start, length, self._size):
                slot = (guest - first) // self._size * step
                within = guest % self._size
                if kind == ZERO:
                    self._zero(words, slot, within, n)
                elif kind == COMPRESSED:
                    entry = self._compressed(disk, host, guest, n)
                    self._show(words, _Shown(slot, host, guest, n), entry)
                elif n < self._size:
                    self._copy_part(
                        disk, _Shown(slot, host + guest - start - within, guest, n), words
                    )
                else:
                    shown = _Shown(slot, host + guest - start, guest, n)
                    if shown.old in self._clusters and shown.old not in self._copied:
                        self._show(words, shown, self._clusters[shown.old])
                        continue
                    if whole and not self._goes_on(whole, guest):
                        self._copy(disk, whole, words)
                        whole = []
                    whole.append(shown)
        self._copy(disk, whole, words)
        return words

    def _goes_on(self, whole: list[_Shown], guest: int) -> bool:
        return guest == whole[-1].guest + self._size and len(whole) * self._size < _BATCH

    def _zero(self, words: array[int], slot: int, within: int, n: int) -> None:
        if self._shape.extended_l2:
            words[slot + 1] |= self._touched(within, n) << q.SUBCLUSTERS
        else:
            words[slot] = q.OFLAG_ZERO

    def _show(self, words: array[int], shown: _Shown, entry: int) -> None:
        words[shown.slot] = entry
        if self._shape.extended_l2 and not entry & q.OFLAG_COMPRESSED:
            words[shown.slot + 1] |= self._touched(shown.guest % self._size, shown.length)

    def _touched(self, within: int, n: int) -> int:
        """The parts of a cluster of which a range has something."""
        return (1 << -(-(within + n) * _PARTS // self._size)) - (1 << within * _PARTS // self._size)

    def _covered(self, within: int, n: int) -> int:
        """The parts of a cluster of which a range has everything."""
        first, stop = -(-within * _PARTS // self._size), (within + n) * _PARTS // self._size
        return max(0, (1 << stop) - (1 << first))

    # --- Clusters ---

    def _read(self, disk: Disk, guest: int, length: int) -> memoryview:
        data = memoryview(bytearray(length))
        disk.pread_into(data, guest - disk.base)
        return data

    def _copy(self, disk: Disk, whole: list[_Shown], words: array[int]) -> None:
        """Write whole clusters that lie one after the other in the guest."""
        if not whole:
            return
        size = self._size
        data = self._read(disk, whole[0].guest, len(whole) * size)
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        streams: Iterator[bytes] = iter([self._zeros] * len(whole))  # nothing is saved
        if self._pool:
            streams = self._pool.map(self._compressor.compress, pieces)
        plain: list[tuple[int, memoryview]] = []  # host offset, content
        for shown, piece, stream in zip(whole, pieces, streams, strict=True):
            if self._copied.pop(shown.old, None) is not None:
                entry = self._clusters[shown.old]  # where some of it is already
                plain.append((entry, piece))
            elif piece == self._zeros and not self._shape.extended_l2:
                entry = q.OFLAG_ZERO
            elif len(stream) < size:
                entry = self._new.compressed(stream)
            else:
                entry = self._new.allocate(size)
                plain.append((entry, piece))
            self._clusters[shown.old] = entry
            self._show(words, shown, entry)
        together = [plain[0][0] + i * size for i in range(len(whole))] if plain else []
        if plain and [host for host, _ in plain] == together:
            self._new.write(data, plain[0][0])
            return
        for host, piece in plain:
            self._new.write(piece, host)

    def _copy_part(self, disk: Disk, shown: _Shown, words: array[int]) -> None:
        """Write what is shown of a cluster, unless it was written before."""
        key, entry = shown.old, self._clusters.get(shown.old)
        if entry is not None and entry & q.OFLAG_COMPRESSED and self._shape.extended_l2:
            key = ~shown.old  # a compressed cluster has no bitmap, and would show all of it
            entry = self._clusters.get(key)
        if entry is None:
            entry = self._clusters[key] = self._new.allocate(self._size)
            self._copied[key] = 0
        within, n = shown.guest % self._size, shown.length
        done = self._copied.get(key, _ALL)
        if self._touched(within, n) & ~done:
            self._new.write(self._read(disk, shown.guest, n), entry + within)
            self._copied[key] = done | self._covered(within, n)
            if self._copied[key] == _ALL:
                del self._copied[key]
        self._show(words, shown, entry)

    def _compressed(self, disk: Disk, entry: int, guest: int, n: int) -> int:
        """The new entry of a compressed cluster, of which the guest sees ``n`` bytes."""
        if entry in self._clusters:
            return self._clusters[entry]
        same = self._image.header.compression == self._shape.compression
        stream = self._stream(disk, entry, guest) if same else b""
        if 0 < len(stream) < self._size:
            new = self._new.compressed(stream)
        else:
            cluster = memoryview(bytearray(self._size))
            disk.pread_into(cluster[:n], guest - disk.base)
            stream = self._compressor.compress(cluster)
            if len(stream) < self._size:
                new = self._new.compressed(stream)
            else:
                new = self._new.allocate(self._size)
                self._new.write(cluster, new)
            if n < self._size:
                return new  # another state may see more of it
        self._clusters[entry] = new
        return new

    def _stream(self, disk: Disk, entry: int, guest: int) -> bytes:
        offset, length = self._image.stream(entry)
        stream = self._image.storage.read(length, offset)
        try:
            return stream[: self._compressor.length(stream, self._size)]
        except ImageError as e:
            raise ImageError(
                f"{disk.name}: guest offset {guest - disk.base:#x}: the compressed "
                f"cluster at host offset {offset:#x}: {e}"
            ) from e


def _by_cluster(guest: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    """A range of the guest, cluster by cluster: (offset, length)."""
    end = guest + length
    while guest < end:
        n = min(size - guest % size, end - guest)
        yield guest, n
        guest += n
