"""A disk whose tables are damaged: what they still tell, and what is lost with them.

:meth:`.Disk.extents` ends at the first table that is unreadable or damaged.  ``copy --salvage``
continues after it, and so has to know how far the damage reaches.  With a bad entry of an L2 table
its cluster is lost; with an unreadable sector of an L2 table, the clusters of all entries in that
sector; with a missing L2 table, or a bad entry of the L1 table, everything that the L2 table maps.
To lose no more than that, tables must be read in sectors (``slice_bytes`` of :class:`.Options`).

Clusters that the tables put past the end of the file are lost as well, without an attempt to read
them.  Whether the others can be read and decoded, only a read will tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from ..errors import Error, ImageError, StorageError
from ..format import ondisk as q
from ..image.disk import Disk
from ..image.extents import ALLOCATED, HOLE_ZERO
from ..image.guard import confirmed
from ..image.layers import Layer
from ..image.mapping import COMPRESSED, DATA, ZERO, Mapping

LOST: Final = -1  # a type of range, beside ALLOCATED and HOLE_ZERO

_Run = tuple[int, int, int, int]  # of a mapping: guest offset, length, kind, location


class Range(NamedTuple):
    """A range of one type; neighbours may be of the same."""

    offset: int  # in the disk, bytes
    length: int
    type: int
    whole: bool = False  # of one compressed cluster, which is read or lost as a whole
    why: str = ""  # it is lost


def ranges(disk: Disk, offset: int, length: int) -> Iterator[Range]:
    """The range without gaps, whatever is damaged.

    Raises SnapshotGone when the snapshot was deleted, since all may be anything then, and
    StorageError when not even the header can be read any more: then it is the disk or its server
    that is gone.
    """
    yield from confirmed(_ranges(disk, offset, length), disk)


def ensure_there(disk: Disk) -> None:
    """Raises StorageError when the file of a disk cannot be read at all any more."""
    disk.tables.storage.read(1, 0)


def _ranges(disk: Disk, offset: int, length: int) -> Iterator[Range]:
    for run in _runs(disk, disk.base + offset, disk.base + offset + length):
        if isinstance(run, Range):
            yield run
            continue
        guest, n, kind, location = run
        start = guest - disk.base
        if kind == COMPRESSED:
            yield Range(start, n, ALLOCATED, whole=True)
        elif kind == DATA:
            there = disk.inside(location, n)
            if there:
                yield Range(start, there, ALLOCATED)
            if there < n:
                why = f"host offset {location + there:#x} lies past the end of the file"
                yield Range(start + there, n - there, LOST, why=f"{disk.name}: {why}")
        elif kind == ZERO or disk.below is None:
            yield Range(start, n, HOLE_ZERO)
        else:
            inside = max(0, min(n, disk.below.size - start))
            if inside:
                yield from _below(disk.below, start, inside)
            if inside < n:
                yield Range(start + inside, n - inside, HOLE_ZERO)


def _below(layer: Layer, offset: int, length: int) -> Iterator[Range]:
    if isinstance(layer, Disk):
        yield from _ranges(layer, offset, length)
        return
    at, end = offset, offset + length
    try:
        for mapped in layer.ranges(at, end - at):
            yield Range(*mapped[:3])
            at = mapped.offset + mapped.length
    except StorageError:  # its holes are not to be had: reads will tell
        yield Range(at, end - at, ALLOCATED)


def _runs(disk: Disk, at: int, end: int) -> Iterator[_Run | Range]:
    """The runs of a mapping, and in between what it cannot tell, as lost ranges of the disk."""
    while at < end:
        try:
            for run in disk.mapping.runs(at, end - at):
                yield run
                at = run[0] + run[1]
        except (ImageError, StorageError) as e:
            if isinstance(e, StorageError):
                ensure_there(disk)
            n = min(_reach(disk.mapping, at), end - at)
            yield Range(at - disk.base, n, LOST, why=f"{disk.name}: {e}")
            at += n


def _reach(mapping: Mapping, guest: int) -> int:
    """How many bytes from a guest offset on, which the mapping cannot look up, are lost with it."""
    tables = mapping.tables
    span = tables.bytes_per_l1_entry
    index, inside = divmod(guest, span)
    if index >= tables.l1_size:
        return q.MAX_DISK_SIZE
    per_slice = mapping.slice_bytes // q.L1_ENTRY_SIZE
    first = index - index % per_slice
    try:
        count = min(per_slice, tables.l1_size - first)
        entry = tables.l1_slice(first, count)[index - first]
    except Error:
        return (first + per_slice) * span - guest
    try:
        table = tables.l2_offset(index, entry)
    except ImageError:
        return span - inside
    number = inside // tables.cluster_size
    per_slice = min(tables.l2_entries, mapping.slice_bytes // tables.l2_entry_size)
    first = number - number % per_slice
    try:
        words = tables.l2_slice(table, first, per_slice)
        there = len(words) * 8 // tables.l2_entry_size
    except Error:
        there = 0
    if number - first >= there:
        return (first + per_slice) * tables.cluster_size - inside
    return tables.cluster_size - inside % tables.cluster_size
