"""A new qcow2 file, written by ourselves: what QEMU's tools cannot say they cannot write.

A snapshot that ``qemu-img snapshot -c`` takes has today's date, the next free ID and no VM state.
So an image whose snapshots are to be those of another is written here, table by table (spec: "Host
cluster management", "Cluster mapping", "Snapshots").

The file only grows: data, L2 tables as they are complete, then all the rest.  Nothing is ever given
back, so no refcount is kept meanwhile.  :meth:`NewImage.finish` goes through the tables, counts the
paths to each cluster, sets COPIED where there is one alone, and writes the header last: before that
the file is no qcow2 image to anybody.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ..errors import StorageError, reason, shown
from ..format import ondisk as q
from ..format.snapshots import Snapshot
from .shape import Shape, header

_REFCOUNTS: Final = {4: "H", 5: "I", 6: "Q"}  # refcount_order: type; QEMU makes 16 bits as a rule


@contextmanager
def new_image(part: str, name: str, shape: Shape) -> Iterator[NewImage]:
    """One in the empty file at ``part``; ``name`` is what it is going to be called."""
    fd = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield NewImage(name, fd, shape)
    finally:
        os.close(fd)


class NewImage:
    """Writes one, from one thread.  All raise StorageError when the file cannot be written."""

    def __init__(self, path: str, fd: int, shape: Shape) -> None:
        """``fd`` is an empty file, open for reading and writing; ``path`` is for error lines."""
        self._path = path
        self._fd = fd
        self._shape = shape
        self._size = shape.cluster_size
        self._end = shape.cluster_size  # the first cluster is the header's
        # The next compressed cluster goes where the last one ended, as far as there is room.
        self._stream_end = self._stream_limit = 0
        # A snapshot may have one of 32 MiB: what they are is in the file alone.
        self._l1_tables: list[tuple[int, int]] = []  # host offset, entries
        self._entries: list[bytes] = []  # of the snapshot table
        self._offset_bits = 62 - (shape.cluster_bits - 8)

    # --- Data, and what leads to it ---

    def allocate(self, length: int) -> int:
        """The host offset of that many bytes, in whole new clusters one after the other."""
        offset = self._end
        self._end += -(-length // self._size) * self._size
        return offset

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        view = memoryview(data).cast("B")
        try:
            while view:
                n = os.pwrite(self._fd, view, offset)
                view, offset = view[n:], offset + n
        except OSError as e:
            raise self._failed(e) from e

    def compressed(self, stream: bytes) -> int:
        """Write the stream of a compressed cluster; returns its L2 entry (spec: "Compressed
        Clusters Descriptor")."""
        if len(stream) > self._stream_limit - self._stream_end and self._stream_limit != self._end:
            self._stream_end = self._stream_limit = self._end
        offset = self._stream_end
        self._stream_end += len(stream)
        if self._stream_end > self._stream_limit:
            self.allocate(self._stream_end - self._stream_limit)
            self._stream_limit = self._end
        self.write(stream, offset)
        more = (self._stream_end - 1) // q.SECTOR - offset // q.SECTOR
        return q.OFLAG_COMPRESSED | more << self._offset_bits | offset

    def l2_table(self, words: array[int]) -> int:
        """Write an L2 table, with COPIED nowhere; returns its host offset."""
        offset = self.allocate(self._size)
        self.write(_big_endian(words), offset)
        return offset

    def read_l2(self, offset: int) -> array[int]:
        """The words of an L2 table that was written."""
        return self._words(offset, self._size)

    # --- What is in the image ---

    def snapshot(self, entry: Snapshot, l1: array[int]) -> None:
        """Add a snapshot with the L2 tables at these host offsets, 0 where there is none, and with
        all that the entry says besides."""
        texts = [s.encode("utf-8", "surrogateescape") for s in (entry.id, entry.name)]
        icount = q.ICOUNT_NONE if entry.icount is None else entry.icount
        raw = struct.pack(
            ">" + "".join(q.SNAPSHOT_HEAD.codes.values()) + "QQQ",
            self._add_l1(l1),
            len(l1),
            len(texts[0]),
            len(texts[1]),
            entry.date_sec,
            entry.date_nsec,
            entry.vm_clock_nsec,
            entry.vm_state_size & 0xFFFF_FFFF,
            q.EXTRA_ICOUNT.stop,
            entry.vm_state_size,
            entry.disk_size,
            icount,
        )
        raw += b"".join(texts)
        self._entries.append(raw + bytes(-len(raw) % 8))

    def finish(self, size: int, l1: array[int]) -> None:
        """Write the active disk of that size, whatever else belongs to an image, and bring all of
        it to the disk."""
        active = self._add_l1(l1)
        snapshots = b"".join(self._entries)
        snapshots_offset = self.allocate(len(snapshots)) if snapshots else 0
        self.write(snapshots, snapshots_offset)
        tables = self._tables()
        counts = self._count(tables, snapshots_offset, len(snapshots))
        self._mark_copied(tables, counts)
        try:
            # To the disk before the header, so that there is no image of which parts are missing.
            order, table, clusters = self._add_refcounts(counts)
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
            self.write(
                header(
                    self._shape,
                    self._path,
                    size=size,
                    l1_size=len(l1),
                    l1_table_offset=active,
                    refcount_order=order,
                    refcount_table_offset=table,
                    refcount_table_clusters=clusters,
                    nb_snapshots=len(self._entries),
                    snapshots_offset=snapshots_offset,
                ),
                0,
            )
            os.fsync(self._fd)
        except OSError as e:
            raise self._failed(e) from e

    # --- Inside ---

    def _add_l1(self, l1: array[int]) -> int:
        """Write an L1 table, with COPIED nowhere; returns its host offset."""
        offset = self.allocate(max(1, len(l1)) * q.L1_ENTRY_SIZE)
        self.write(_big_endian(l1), offset)
        self._l1_tables.append((offset, len(l1)))
        return offset

    def _words(self, offset: int, length: int) -> array[int]:
        """Those of a table that was written."""
        try:
            return q.integers(os.pread(self._fd, length, offset))
        except OSError as e:
            raise self._failed(e) from e

    def _l1(self) -> Iterator[tuple[int, array[int]]]:
        """The L1 tables with their host offsets."""
        for offset, count in self._l1_tables:
            yield offset, self._words(offset, count * q.L1_ENTRY_SIZE)

    def _count(
        self, tables: Counter[int], snapshots_offset: int, snapshots_length: int
    ) -> array[int]:
        """How often each cluster is referred to (QEMU: qcow2_update_snapshot_refcount)."""
        counts = array("Q", bytes(8 * (self._end // self._size)))
        counts[0] = 1
        once = [(offset, count * q.L1_ENTRY_SIZE) for offset, count in self._l1_tables]
        for offset, length in [*once, (snapshots_offset, snapshots_length)]:
            for cluster in range(offset // self._size, -(-(offset + length) // self._size)):
                counts[cluster] = 1
        for table, times in tables.items():
            counts[table // self._size] = times
            for entry in self.read_l2(table)[:: self._shape.entry_words]:
                for cluster in self._clusters(entry):
                    counts[cluster] += times
        return counts

    def _tables(self) -> Counter[int]:
        """How often each L2 table is referred to."""
        found: Counter[int] = Counter()
        for _, l1 in self._l1():
            found.update(l1)
        del found[0]
        return found

    def _clusters(self, entry: int) -> range:
        """Those that an L2 entry leads to."""
        if entry & q.OFLAG_COMPRESSED:
            offset = entry & (1 << self._offset_bits) - 1
            more = (entry & ~q.OFLAG_COMPRESSED) >> self._offset_bits
            end = (offset // q.SECTOR + more + 1) * q.SECTOR
            return range(offset // self._size, -(-end // self._size))
        offset = entry & q.OFFSET_MASK
        return range(offset // self._size, offset // self._size + bool(offset))

    def _mark_copied(self, tables: Counter[int], counts: array[int]) -> None:
        """Write COPIED into all entries that alone lead to their cluster."""
        for table, times in tables.items():
            if times > 1:
                continue  # what it leads to is referred to as often
            words = self.read_l2(table)
            for i in range(0, len(words), self._shape.entry_words):
                entry = words[i]
                host = entry & q.OFFSET_MASK
                if host and not entry & q.OFLAG_COMPRESSED and counts[host // self._size] == 1:
                    words[i] = entry | q.OFLAG_COPIED
            self.write(_big_endian(words), table)
        for offset, l1 in self._l1():
            once = (e | q.OFLAG_COPIED if e and counts[e // self._size] == 1 else e for e in l1)
            self.write(_big_endian(array("Q", once)), offset)

    def _add_refcounts(self, counts: array[int]) -> tuple[int, int, int]:
        """Append the refcounts, their own included: refcount_order, host offset of the table, and
        how many clusters it has."""
        highest = max(counts)
        order = next(n for n in _REFCOUNTS if highest >> (1 << n) == 0)
        per_block = self._size * 8 >> order
        blocks = clusters = 0
        while True:
            need = -(-(len(counts) + blocks + clusters) // per_block)
            if need == blocks:
                break
            blocks, clusters = need, -(-need * 8 // self._size)
        counts.extend([1] * (blocks + clusters))
        table = self.allocate((blocks + clusters) * self._size)
        first = table + clusters * self._size
        self.write(_big_endian(array("Q", range(first, self._end, self._size))), table)
        for i in range(blocks):
            part = array(_REFCOUNTS[order], counts[i * per_block : (i + 1) * per_block])
            self.write(_big_endian(part), first + i * self._size)
        return order, table, clusters

    def _failed(self, e: OSError) -> StorageError:
        return StorageError(f"writing {shown(self._path)} failed: {reason(e)}")


def _big_endian(words: array[int]) -> bytes:
    if sys.byteorder == "little":
        words = words[:]
        words.byteswap()
    return words.tobytes()
