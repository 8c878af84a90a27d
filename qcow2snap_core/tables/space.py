"""What deleting each snapshot would free, from the tables of all snapshots and the active disk.

A cluster is a snapshot's own when only that snapshot refers to it.  References are compared where
they can meet: QEMU never moves a cluster from one guest offset to another, so tables that share a
cluster share it at the same index.  An L2 table that two L1 tables lead to shares all that it
holds, and is not even read.  So the cost grows with what differs, and little memory is needed.

Compressed clusters are the exception: streams of different guest offsets lie in one cluster of
the file, which is freed when the last of them is.  Where a snapshot has compressed clusters in
tables of its own, all tables are walked once more to see who else is in those clusters.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Final

from ..errors import ImageError
from ..format import ondisk as q
from ..format.snapshots import Snapshot
from ..image.image import Image
from ..image.tablereader import Entries, TableReader

_SHARED: Final = -1  # in place of an owner: more than one
_L1_ENTRIES: Final = 1 << 20  # of all L1 tables together that are held at a time
STRIDE: Final = 64  # entries compared at a time
_L2_ENTRIES: Final = 1 << 18  # of the L2 tables for one guest range; an entry takes 100 bytes

# {host offset of an L2 table: its owner}, of one guest range; owners are indexes of mappings
_Column = dict[int, int]


def exclusive_sizes(image: Image, snapshots: Sequence[Snapshot]) -> list[int | None]:
    """The bytes that deleting each one would free, its tables included; ``snapshots`` are all
    that the image has.  None where damage leaves it open.

    Raises SnapshotGone when one of them is deleted meanwhile: what was read of it, and so who
    shares with it, may have been anything.  Raises StorageError.
    """
    guard = image.guard(snapshots)
    try:
        mappings = [image.disk(s, guard=guard).tables for s in snapshots]
        mappings.append(image.active_disk().tables)
    except ImageError:  # whoever is damaged may share anything
        guard.confirm()
        return [None] * len(snapshots)
    space = _Space(image, mappings)
    space.count()
    clusters = [
        None if k in space.unknown else own + l1 + table
        for k, (own, l1, table) in enumerate(
            zip(
                space.own,
                _l1_clusters(snapshots, image.header.cluster_size),
                _table_clusters(snapshots, image.header.cluster_size),
                strict=False,  # the active disk is not asked about
            )
        )
    ]
    guard.confirm()
    return [None if n is None else n * image.header.cluster_size for n in clusters]


class _Space:
    """Counts each owner's own clusters, tables and data."""

    def __init__(self, image: Image, mappings: Sequence[TableReader]) -> None:
        self.own = [0] * len(mappings)
        self.unknown: set[int] = set()  # owners whose number cannot be told
        self._image = image
        self._mappings = mappings
        self._active = len(mappings) - 1
        self._any = mappings[0]  # L2 tables are read alike whoever leads to them
        self._compressed = False

    def count(self) -> None:
        for tables in self._columns():
            owners = {k for k in tables.values() if k not in (_SHARED, self._active)}
            try:
                if owners:
                    self._count_column(tables)
            except ImageError:
                self.unknown |= owners
        if self._compressed:
            self._count_streams()

    def _columns(self) -> Iterator[_Column]:
        """The L2 tables behind each L1 index, without those of nobody."""
        entries = max(m.l1_size for m in self._mappings)
        step = max(64, _L1_ENTRIES // len(self._mappings))
        for first in range(0, entries, step):
            parts = [m.l1_entries(first, min(step, entries - first)) for m in self._mappings]
            for column in zip(*parts, strict=True):
                owners = dict(zip(column, count(), strict=False))
                tables: _Column = {}
                for entry, times in Counter(column).items():
                    table = entry & q.OFFSET_MASK
                    if table:
                        alone = times == 1 and table not in tables
                        tables[table] = owners[entry] if alone else _SHARED
                if tables:
                    yield tables

    def _count_column(self, tables: _Column) -> None:
        """Count the own tables behind one L1 index and the clusters that they alone lead to."""
        for owner in tables.values():
            if owner != _SHARED:
                self.own[owner] += 1
        for found in self._parts(tables):
            many: set[int] = set()
            once: set[int] = set()
            for _, offsets in found:
                if not once.isdisjoint(offsets):
                    many |= once & offsets
                once |= offsets
            for owner, offsets in found:
                if owner != _SHARED:
                    self.own[owner] += len(offsets - many if many else offsets)

    def _parts(self, tables: _Column) -> Iterator[list[tuple[int, set[int]]]]:
        """For one stretch of the tables after the other: (owner, the data clusters there that not
        all tables have)."""
        entries = self._any.l2_entries
        step = min(entries, max(STRIDE, _L2_ENTRIES // len(tables)))
        for first in range(0, entries, step):
            count = min(step, entries - first)
            parts = _differing([self._any.l2_part(table, first, count) for table in tables])
            found = []
            for part, owner in zip(parts, tables.values(), strict=True):
                streams, offsets = sorted_out(part)
                self._compressed |= bool(streams) and owner not in (_SHARED, self._active)
                found.append((owner, set() if self._image.header.has_data_file else offsets))
            yield found

    def _count_streams(self) -> None:
        """Count the clusters of the file in which one owner alone has compressed clusters."""
        owners = _Owners()
        bits = self._image.header.cluster_bits
        for tables in self._columns():
            for table, owner in tables.items():
                try:
                    streams, _ = sorted_out(self._any.l2_part(table, 0, self._any.l2_entries))
                except ImageError:
                    self.unknown.update(range(self._active))
                    return
                for entry in streams:
                    offset, length = self._image.stream(entry)
                    for cluster in range(offset >> bits, (offset + length - 1 >> bits) + 1):
                        owners.add(cluster, owner)
        for owner, n in owners.counts().items():
            if owner != _SHARED:
                self.own[owner] += n


class _Owners:
    """Who has something in each cluster of the file, in pages of machine integers."""

    _PAGE_BITS: Final = 12
    _NOBODY: Final = -2

    def __init__(self) -> None:
        self._pages: dict[int, array[int]] = {}
        self._empty = array("i", (self._NOBODY,)) * (1 << self._PAGE_BITS)

    def add(self, cluster: int, owner: int) -> None:
        number, at = divmod(cluster, 1 << self._PAGE_BITS)
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = self._empty[:]
        if page[at] != owner:
            page[at] = owner if page[at] == self._NOBODY else _SHARED

    def counts(self) -> Counter[int]:
        total: Counter[int] = Counter()
        for page in self._pages.values():
            total.update(page)
        del total[self._NOBODY]
        return total


def _differing(parts: list[Entries[int]]) -> list[Entries[int]]:
    """The same without most of what all have in common."""
    if len(parts) == 1:
        return parts
    kept: list[Entries[int]] = [array("Q") for _ in parts]
    for pieces, alike in strides(parts):
        if not alike:
            for part, piece in zip(kept, pieces, strict=True):
                part.extend(piece)
    return kept


def strides(parts: Sequence[Entries[int]]) -> Iterator[tuple[list[Entries[int]], bool]]:
    """The parts a few entries at a time, and whether these are alike in all."""
    for at in range(0, len(parts[0]) if parts else 0, STRIDE):
        pieces = [part[at : at + STRIDE] for part in parts]
        yield pieces, pieces.count(pieces[0]) == len(pieces)


_LOW_BYTE, _HIGH_BYTE = (0, 7) if sys.byteorder == "little" else (7, 0)
_NOT_COMPRESSED: Final = bytes(range(q.OFLAG_COMPRESSED >> 56))  # high bytes of such entries


def sorted_out(entries: Entries[int]) -> tuple[list[int], set[int]]:
    """The compressed clusters' entries, and the host offsets of the others."""
    raw = entries.tobytes()
    streams: list[int] = []
    offsets = set(entries)
    if raw[_HIGH_BYTE::8].translate(None, _NOT_COMPRESSED):
        streams = [e for e in entries if e & q.OFLAG_COMPRESSED]
        offsets.difference_update(streams)
    if raw[_LOW_BYTE::8].translate(None, b"\0"):  # zero clusters may have an allocation
        offsets = {e & q.OFFSET_MASK for e in offsets}
    offsets.discard(0)
    return streams, offsets


def _l1_clusters(snapshots: Sequence[Snapshot], cluster: int) -> list[int]:
    """The clusters of each L1 table, which no two snapshots share in an image that QEMU made."""
    users = Counter(s.l1_table_offset for s in snapshots)
    return [
        -(-s.l1_size * q.L1_ENTRY_SIZE // cluster) if users[s.l1_table_offset] == 1 else 0
        for s in snapshots
    ]


def _table_clusters(snapshots: Sequence[Snapshot], cluster: int) -> list[int]:
    """The clusters by which the snapshot table shrinks when QEMU writes it without each one."""
    now = sum(_padded(s.entry_length) for s in snapshots)
    rewritten = [_padded(_rewritten(s)) for s in snapshots]
    rest = sum(rewritten)
    return [-(-now // cluster) - -(-(rest - gone) // cluster) for gone in rewritten]


def _padded(length: int) -> int:
    """Entries begin at a multiple of eight bytes."""
    return -(-length // 8) * 8


def _rewritten(s: Snapshot) -> int:
    """How long QEMU makes an entry when it writes it again: with all the extra data it knows."""
    known: int = q.EXTRA_ICOUNT.stop
    return s.entry_length + max(0, known - s.extra_data_size)
