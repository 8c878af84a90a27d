"""What deleting snapshots would free, from the tables of all snapshots and the active disk.

A cluster is a snapshot's own when only that snapshot refers to it, and a set's own when only
snapshots of the set do.  References are compared where they can meet: QEMU never moves a cluster
from one guest offset to another, so tables that share a cluster share it at the same index.  An L2
table that two L1 tables lead to shares all that it holds, and is not even read.  So the cost grows
with what differs, and little memory is needed.

Compressed clusters are the exception: streams of different guest offsets lie in one cluster of
the file, which is freed when the last of them is.  Where a snapshot has compressed clusters in
tables of its own, all tables are walked once more to see who else is in those clusters.

A VM state lies behind the disk, from the next index of the L1 table on (QEMU:
qcow2_vm_state_offset), so its tables and data can be told apart from the disk's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import compress, count
from typing import Final, NamedTuple

from ..errors import ImageError
from ..format import ondisk as q
from ..format.refcounts import past_end
from ..format.snapshots import Identity, Snapshot
from ..image.image import Image
from ..image.tablereader import TableReader
from .compare import STRIDE, differing, streams_and_offsets
from .tally import SHARED, Owners

_L1_ENTRIES: Final = 1 << 20  # of all L1 tables together that are held at a time
_L2_ENTRIES: Final = 1 << 18  # of the L2 tables for one guest range; an entry takes 100 bytes


class Freed(NamedTuple):
    """Bytes of the file that go when something is deleted."""

    disk: int  # of data, tables and the entries of the snapshot table
    vm_state: int  # of the saved machines, their tables included

    @property
    def size(self) -> int:
        return self.disk + self.vm_state


def exclusive_sizes(image: Image, snapshots: Sequence[Snapshot]) -> list[Freed | None]:
    """What deleting each one alone would free; ``snapshots`` are all that the image has.  None
    where damage leaves it open.

    Raises SnapshotGone when one of them is deleted meanwhile: what was read of it, and so who
    shares with it, may have been anything.  Raises StorageError.
    """
    return _freed(image, snapshots, [{k} for k in range(len(snapshots))])


def freed_together(
    image: Image, snapshots: Sequence[Snapshot], chosen: Collection[Identity]
) -> Freed | None:
    """What deleting all the chosen ones would free: with what they share among each other more
    than the sum.  All else as :func:`exclusive_sizes`."""
    members = {k for k, s in enumerate(snapshots) if s.identity in chosen}
    if not members:
        return Freed(0, 0)
    (freed,) = _freed(image, snapshots, [members])
    return freed


def _freed(
    image: Image, snapshots: Sequence[Snapshot], sets: Sequence[set[int]]
) -> list[Freed | None]:
    """For each set of indexes of snapshots: either one set, or one for each snapshot."""
    guard = image.guard(snapshots)
    try:
        disks = [image.disk(s, guard=guard) for s in snapshots]
        mappings = [disk.tables for disk in disks]
        mappings.append(image.active_disk().tables)
    except ImageError:  # whoever is damaged may share anything
        guard.confirm()
        return [None] * len(sets)
    # The index of an L1 table from which on it leads to the VM state; the active disk has none.
    behind = [-(-disk.size // disk.tables.bytes_per_l1_entry) for disk in disks]
    members = None if len(sets) == len(snapshots) else sets[0]
    space = _Space(image, mappings, [*behind, q.MAX_L1_BYTES], members)
    space.count()
    cluster = image.header.cluster_size
    tables = zip(
        _l1_clusters(snapshots, sets, cluster),
        _table_clusters(snapshots, sets, cluster),
        strict=True,
    )
    answers = [
        None
        if k in space.unknown
        else Freed((space.own[2 * k] + l1 + table) * cluster, space.own[2 * k + 1] * cluster)
        for k, (l1, table) in enumerate(tables)
    ]
    guard.confirm()
    return answers


# {host offset of an L2 table: its account}, of one guest range.  Each set has two: 2 * k for the
# disk and 2 * k + 1 for the VM state, where k is the set's number.
_Column = dict[int, int]


class _Space:
    """Counts the clusters, tables and data, that each account has alone."""

    def __init__(
        self,
        image: Image,
        mappings: Sequence[TableReader],
        behind: Sequence[int],
        members: set[int] | None,
    ) -> None:
        """``members``: who belongs to the only set; None if each is a set of its own, the active
        disk as the last."""
        sets = len(mappings) if members is None else 1
        self.own = [0] * (2 * sets)
        self.unknown: set[int] = set()  # sets whose number cannot be told
        self._image = image
        self._mappings = mappings
        self._behind = behind
        self._members = sorted(members or ())
        self._others = [members is not None and k not in members for k in range(len(mappings))]
        self._asked = 2 * (len(mappings) - 1 if members is None else 1)  # accounts below this
        self._any = mappings[0]  # L2 tables are read alike whoever leads to them
        self._compressed = False
        self._end = past_end(image.storage, image.header.cluster_size)

    def count(self) -> None:
        for tables in self._columns():
            asked = {k >> 1 for k in tables.values() if 0 <= k < self._asked}
            try:
                if asked:
                    self._count_column(tables)
            except ImageError:
                self.unknown |= asked
        if self._compressed:
            self._count_streams()

    def _columns(self) -> Iterator[_Column]:
        """The L2 tables behind each L1 index, without those of nobody."""
        entries = max(m.l1_size for m in self._mappings)
        step = max(64, _L1_ENTRIES // len(self._mappings))
        for first in range(0, entries, step):
            parts = [m.l1_entries(first, min(step, entries - first)) for m in self._mappings]
            for index, column in enumerate(zip(*parts, strict=True), first):
                if not any(column):  # as most are of a disk that is large and sparse
                    continue
                tables: _Column = {}
                for table, owner in self._tables_of(column):
                    if table:
                        alone = owner != SHARED and table not in tables
                        tables[table] = self._account(owner, index) if alone else SHARED
                if tables:
                    yield tables

    def _tables_of(self, column: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """(L2 table, who alone leads to it), the latter as an index of the mappings."""
        if not self._members:
            owners = dict(zip(column, count(), strict=False))
            for entry, times in Counter(column).items():
                yield entry & q.OFFSET_MASK, owners[entry] if times == 1 else SHARED
            return
        others = {entry & q.OFFSET_MASK for entry in set(compress(column, self._others))}
        ours = {column[k] & q.OFFSET_MASK: k for k in self._members}
        yield from ((table, SHARED) for table in others)
        yield from ((table, k) for table, k in ours.items() if table not in others)

    def _account(self, owner: int, index: int) -> int:
        """The one that a table behind an index of the L1 table belongs to."""
        return 2 * (0 if self._members else owner) + (index >= self._behind[owner])

    def _count_column(self, tables: _Column) -> None:
        """Count the own tables behind one L1 index and the clusters that they alone lead to."""
        for account in tables.values():
            if account != SHARED:
                self.own[account] += 1
        for clusters in self._parts(tables):
            many: set[int] = set()
            once: set[int] = set()
            for offsets in clusters.values():
                if not once.isdisjoint(offsets):
                    many |= once & offsets
                once |= offsets
            for account, offsets in clusters.items():
                if account != SHARED:
                    self.own[account] += len(offsets - many if many else offsets)

    def _parts(self, tables: _Column) -> Iterator[dict[int, set[int]]]:
        """For one stretch of the tables after the other: {account: the data clusters there}, but
        for most of those that all tables have."""
        entries = self._any.l2_entries
        step = min(entries, max(STRIDE, _L2_ENTRIES // len(tables)))
        one_set = bool(self._members) and SHARED not in tables.values()
        for first in range(0, entries, step):
            n = min(step, entries - first)
            parts = [self._any.l2_part(table, first, n) for table in tables]
            if not one_set:  # else what all have in common is what is asked for
                parts, _ = differing(parts)
            clusters: dict[int, set[int]] = {}
            for part, account in zip(parts, tables.values(), strict=True):
                streams, offsets = streams_and_offsets(part)
                self._compressed |= bool(streams) and 0 <= account < self._asked
                if not self._image.header.has_data_file:
                    clusters.setdefault(account, set()).update(offsets)
                    if 0 <= account < self._asked and max(offsets, default=0) >= self._end:
                        self.unknown.add(account >> 1)  # nothing is there that could be freed
            yield clusters

    def _count_streams(self) -> None:
        """Count the clusters of the file in which one set alone has compressed clusters; there
        are none in VM states."""
        owners = Owners()
        bits = self._image.header.cluster_bits
        for tables in self._columns():
            for table, account in tables.items():
                try:
                    entries = self._any.l2_part(table, 0, self._any.l2_entries)
                except ImageError:
                    self.unknown.update(range(self._asked >> 1))
                    return
                for entry in streams_and_offsets(entries)[0]:
                    offset, length = self._image.stream(entry)
                    for cluster in range(offset >> bits, (offset + length - 1 >> bits) + 1):
                        owners.add(cluster, account if account == SHARED else account & ~1)
        for account, n in owners.counts().items():
            if account != SHARED:
                self.own[account] += n


def _l1_clusters(
    snapshots: Sequence[Snapshot], sets: Sequence[set[int]], cluster: int
) -> Iterator[int]:
    """The clusters of the L1 tables of each set, those that others share left out; no two
    snapshots share one in an image that QEMU made."""
    users = Counter(s.l1_table_offset for s in snapshots)
    for members in sets:
        ours = Counter(snapshots[k].l1_table_offset for k in members)
        sizes = {snapshots[k].l1_table_offset: snapshots[k].l1_size for k in members}
        yield sum(
            -(-size * q.L1_ENTRY_SIZE // cluster)
            for offset, size in sizes.items()
            if users[offset] == ours[offset]
        )


def _table_clusters(
    snapshots: Sequence[Snapshot], sets: Sequence[set[int]], cluster: int
) -> Iterator[int]:
    """The clusters by which the snapshot table shrinks when QEMU writes it without each set."""
    now = sum(_padded(s.entry_length) for s in snapshots)
    rewritten = [_padded(_rewritten(s)) for s in snapshots]
    rest = sum(rewritten)
    for members in sets:
        gone = sum(rewritten[k] for k in members)
        yield -(-now // cluster) - -(-(rest - gone) // cluster)


def _padded(length: int) -> int:
    """Entries begin at a multiple of eight bytes."""
    return -(-length // 8) * 8


def _rewritten(s: Snapshot) -> int:
    """How long QEMU makes an entry when it writes it again: with all the extra data it knows."""
    known: int = q.EXTRA_ICOUNT.stop
    return s.entry_length + max(0, known - s.extra_data_size)
