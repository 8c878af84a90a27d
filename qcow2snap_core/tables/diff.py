"""What differs between two snapshots of one image, from their L1 and L2 tables alone.

A cluster that two snapshots share is one that neither has written since, so equal entries mean
equal data, and where two L1 entries are equal the L2 table behind them need not be read.  What
remains is compared as bytes first, and only the entries that differ are looked at: the cost grows
with the change, not with the disk.

Bit 63 (COPIED) says nothing about content and is never compared.  Entries that differ in other
bits may yet mean the same, zeros by two spellings, which is not listed; a cluster that was written
again with the same data is, since no data is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Final

from ..errors import ImageError
from ..image.disk import Disk
from ..image.extents import HOLE_ZERO, Extent, MappedRange, merged
from ..image.guard import confirmed
from ..image.mapping import COMPRESSED, DATA
from ..image.tablereader import TableReader
from .compare import STRIDE

_L1_ENTRIES: Final = 8192  # read at a time
_L2_ENTRIES: Final = 8192

_Range = tuple[int, int]  # guest offset, length


def changes(old: Disk, new: Disk) -> Iterator[Extent]:
    """The ranges of ``new`` that may differ from ``old``, in order and merged; both disks are of
    one image.  Type ALLOCATED is data to copy, HOLE_ZERO what is zero now.

    What lies past the end of ``old`` is all listed.  Raises as :meth:`.Disk.pread_into`.
    """
    return confirmed(merged(_changes(old, new)), old, new)


def unchanged(old: Disk, new: Disk) -> Iterator[Extent]:
    """The other ranges of ``new``, those that both disks have alike, with what they are there."""
    common = min(old.size, new.size)
    at = 0
    for change in chain(changes(old, new), [Extent(common, 0, HOLE_ZERO)]):
        stop = min(change.offset, common)
        while at < stop:
            for extent in new.extents(at, stop - at):
                yield extent
                at = extent.offset + extent.length
        at = change.offset + change.length


def _changes(old: Disk, new: Disk) -> Iterator[Extent]:
    common = min(old.size, new.size)
    tables = max(old.tables.l1_covers, new.tables.l1_covers)
    told = min(common, old.reach, new.reach, tables)
    for offset, length in _candidates(old.tables, new.tables, told):
        yield from _compare(old, new, offset, length)
    if told < common:  # past both tables, or past one that should not end there
        yield from _compare(old, new, told, common - told)
    for piece in new.ranges(common, new.size - common):
        yield Extent(*piece[:3])


def _candidates(old: TableReader, new: TableReader, size: int) -> Iterator[_Range]:
    """The ranges below ``size`` whose entries are not equal."""
    span = old.bytes_per_l1_entry
    entries = -(-size // span)
    for first in range(0, entries, _L1_ENTRIES):
        count = min(_L1_ENTRIES, entries - first)
        ours, theirs = old.l1_entries(first, count), new.l1_entries(first, count)
        if ours == theirs:
            continue
        for index, pair in enumerate(zip(ours, theirs, strict=True), first):
            if pair[0] != pair[1]:
                start = index * span
                length = min(span, size - start)
                yield from _candidates_behind(old, new, index, pair, start, length)


def _candidates_behind(
    old: TableReader, new: TableReader, index: int, pair: tuple[int, int], start: int, length: int
) -> Iterator[_Range]:
    """The ranges behind one index of both L1 tables, whose entries there are ``pair``."""
    cluster = old.cluster_size
    entries = -(-length // cluster)
    done = 0
    try:
        tables = old.l2_offset(index, pair[0]), new.l2_offset(index, pair[1])
        if all(tables):
            for first in range(0, entries, _L2_ENTRIES):
                count = min(_L2_ENTRIES, entries - first)
                ours, theirs = (old.l2_raw(table, first, count) for table in tables)
                for at, n in _unequal(ours, theirs, old.l2_entry_size):
                    offset = (first + at) * cluster
                    yield start + offset, min(n * cluster, length - offset)
                done = (first + count) * cluster
            return
    except ImageError:
        pass  # whoever walks the range will find the damage again and say where it is
    yield start + done, length - done


def _unequal(ours: bytearray, theirs: bytearray, size: int) -> Iterator[_Range]:
    """(first, count) of the entries, of ``size`` bytes each, that are not equal."""
    if ours == theirs:
        return
    begun = None
    for stride in range(0, len(ours), STRIDE * size):
        end = min(stride + STRIDE * size, len(ours))
        if begun is None and ours[stride:end] == theirs[stride:end]:
            continue
        for at in range(stride, end, size):
            same = ours[at : at + size] == theirs[at : at + size]
            if same and begun is not None:
                yield begun // size, (at - begun) // size
                begun = None
            elif not same and begun is None:
                begun = at
    if begun is not None:
        yield begun // size, (len(ours) - begun) // size


def _compare(old: Disk, new: Disk, offset: int, length: int) -> Iterator[Extent]:
    """What of a range is listed, both disks walked in step."""
    olds, news = old.ranges(offset, length), new.ranges(offset, length)
    end = offset + length
    ours = theirs = None
    while offset < end:
        ours = _at(ours, olds, offset)
        theirs = _at(theirs, news, offset)
        until = min(ours[0] + ours[1], theirs[0] + theirs[1])
        if not _same(ours, theirs):
            yield Extent(offset, until - offset, theirs[2])
        offset = until


def _at(cell: MappedRange | None, following: Iterator[MappedRange], offset: int) -> MappedRange:
    return next(following) if cell is None or cell[0] + cell[1] <= offset else cell


def _same(ours: MappedRange, theirs: MappedRange) -> bool:
    """Whether both say the same of the range where they overlap."""
    kind, entry = ours[4:]
    if kind != theirs[4]:
        return ours[2] == theirs[2] == HOLE_ZERO
    if kind == DATA:
        return entry - ours[0] == theirs[5] - theirs[0]
    return kind != COMPRESSED or entry == theirs[5]
