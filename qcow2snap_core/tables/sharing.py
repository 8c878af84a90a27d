"""Which parts of the disk a snapshot shares with older and newer ones, and which it has alone.

The disk is cut into cells of equal size; for each cell and owner (a snapshot, or the active disk)
four questions are answered, from the tables alone.  As in :mod:`.space`, a cluster of the file
stands at one guest offset only, so sharing can be seen by comparing the tables at equal indexes.
An L2 table that all owners share is not read, unless a cell is smaller than what it maps: then the
number of cells bounds the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Flag, auto
from typing import Final, NamedTuple

from ..errors import ImageError
from ..format import ondisk as q
from ..format.snapshots import Snapshot
from ..image.disk import Disk
from ..image.guard import Guard
from ..image.image import Image
from ..image.tablereader import Entries, TableReader
from .compare import STRIDE, differing, streams_and_offsets

_L1_ENTRIES: Final = 1 << 16  # of one table that are held at a time
_L2_ENTRIES: Final = 1 << 18  # of the L2 tables of one cell; an entry takes 100 bytes
_COMMON: Final = -1  # stands for all entries that are equal in all tables

_Entries = set[int]  # host offsets, and whole entries of compressed clusters


class Holds(Flag):
    """What an owner has in a cell, in this image file."""

    NOTHING = 0
    OWN = auto()  # something that nobody else has
    OLDER = auto()  # something that an older snapshot has as well
    NEWER = auto()  # something that a newer snapshot, or the active disk, has as well
    UNKNOWN = auto()  # its tables are damaged


class Strip(NamedTuple):
    """One owner's cells, as far as its disk reaches."""

    snapshot: Snapshot | None  # None: the active disk
    cells: list[Holds]


class Picture(NamedTuple):
    """The strips of all snapshots in the table's order, the active disk's last."""

    cell: int  # bytes
    strips: list[Strip]


def picture(image: Image, snapshots: Sequence[Snapshot], most: int) -> Picture:
    """At most ``most`` cells, each a power of two of clusters; ``snapshots`` are all there are.

    Raises SnapshotGone when one of them is deleted meanwhile.
    """
    guard = image.guard(snapshots)
    disks = [_disk(image, owner, guard) for owner in (*snapshots, None)]
    largest = max(disk.size if disk else 0 for disk in disks)
    cell = image.header.cluster_size
    while cell * most < largest:
        cell *= 2
    count = -(-largest // cell)
    cells = [
        [Holds.NOTHING] * -(-disk.size // cell) if disk else [Holds.UNKNOWN] * count
        for disk in disks
    ]
    for at, held in _cells(disks, cell, count):
        for own, holds in zip(cells, held, strict=True):
            if at < len(own):
                own[at] |= holds
    for own, disk in zip(cells, disks, strict=True):
        if disk and disk.reach < disk.size:
            first = disk.reach // cell
            own[first:] = [holds | Holds.UNKNOWN for holds in own[first:]]
    guard.confirm()
    owners = [*snapshots, None]
    return Picture(cell, [Strip(s, own) for s, own in zip(owners, cells, strict=True)])


def _disk(image: Image, owner: Snapshot | None, guard: Guard) -> Disk | None:
    """None if it is damaged."""
    try:
        return image.active_disk() if owner is None else image.disk(owner, guard=guard)
    except ImageError:
        return None


def _cells(
    disks: Sequence[Disk | None], cell: int, count: int
) -> Iterator[tuple[int, list[Holds]]]:
    """(number of a cell, what each owner has in some part of it)."""
    mappings = [disk.tables if disk else None for disk in disks]
    known = next((m for m in mappings if m), None)
    if known is None:
        return
    span = known.bytes_per_l1_entry
    longest = max(mapping.l1_size for mapping in mappings if mapping)
    entries = min(-(-count * cell // span), longest)
    step = max(64, _L1_ENTRIES // len(mappings))
    for first in range(0, entries, step):
        parts = [_tables(disk, first, min(step, entries - first)) for disk in disks]
        for index, tables in enumerate(zip(*parts, strict=True), first):
            if any(tables):
                for at, held in _behind(known, tables, cell, count * cell - index * span):
                    yield index * span // cell + at, held


def _tables(disk: Disk | None, first: int, count: int) -> Sequence[int | None]:
    """The host offsets of L2 tables, 0 where there is none, None where that is unknown."""
    if disk is not None:
        with suppress(ImageError):
            tables: list[int | None] = [
                e & q.OFFSET_MASK for e in disk.tables.l1_entries(first, count)
            ]
            span = disk.tables.bytes_per_l1_entry
            lost = range(-(-disk.reach // span), -(-disk.size // span))
            for index in range(max(first, lost.start), min(first + count, lost.stop)):
                tables[index - first] = None
            return tables
    return [None] * count


def _behind(
    mapping: TableReader, tables: Sequence[int | None], cell: int, length: int
) -> Iterator[tuple[int, list[Holds]]]:
    """The same behind one L1 index, cells counted from there, of ``length`` bytes of the disk;
    ``mapping`` is any, since L2 tables are read alike whoever leads to them."""
    distinct = {table for table in tables if table}
    entries = min(mapping.l2_entries, -(-length // mapping.cluster_size))
    per_cell = min(mapping.l2_entries, cell // mapping.cluster_size)
    if per_cell == mapping.l2_entries and len(distinct) == 1:
        yield 0, _compared([None if table is None else {table} - {0} for table in tables])
        return
    # Powers of two: a cell is a number of steps or a step a number of cells.
    step = 1 << max(STRIDE, _L2_ENTRIES // len(distinct)).bit_length() - 1
    for first in range(0, entries, step):
        count = min(step, entries - first)
        parts: dict[int, Entries[int]] = {}
        for table in distinct:
            with suppress(ImageError):
                parts[table] = mapping.l2_part(table, first, count)
        for at in range(0, count, per_cell):
            ranges = [part[at : at + per_cell] for part in parts.values()]
            stored = dict(zip(parts, _stored(ranges), strict=True))
            sets = [set() if table == 0 else stored.get(table or 0) for table in tables]
            yield (first + at) // per_cell, _compared(sets)


def _stored(parts: Sequence[Entries[int]]) -> list[_Entries]:
    """What each part of a table leads to; all that is common to all parts may be one entry."""
    kept, common = differing(parts)
    shared = {_COMMON} if any(any(streams_and_offsets(part)) for part in common) else set()
    return [shared.union(*streams_and_offsets(part)) for part in kept]


def _compared(owners: Sequence[_Entries | None]) -> list[Holds]:
    """What each owner has, from the oldest on; None if that is unknown."""
    own = Holds.UNKNOWN if None in owners else Holds.OWN
    held = [Holds.UNKNOWN if entries is None else Holds.NOTHING for entries in owners]
    fresh: list[_Entries] = []
    met: _Entries = set()
    for k, entries in enumerate(owners):
        fresh.append((entries or set()) - met)
        if entries and not entries.isdisjoint(met):
            held[k] |= Holds.OLDER
        met |= entries or set()
    met = set()
    for k, entries in reversed(list(enumerate(owners))):
        if fresh[k] - met:
            held[k] |= own
        if entries and not entries.isdisjoint(met):
            held[k] |= Holds.NEWER
        met |= entries or set()
    return held
