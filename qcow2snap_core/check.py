"""Whether an image's metadata holds together: all of it read, nothing changed.

First everything that is metadata claims its clusters; two claims of one cluster are damage.  Then
each L2 table is read once, however many L1 tables lead to it, and what it leads to is judged and
counted.  At the end the counts are held against the image's own refcounts.  A cluster that is in
use and counted less often will be given away and overwritten: a snapshot can be lost that way
while it still reads well.  Clusters that are counted and not used (leaks) cost space alone and are
not reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import reduce
from operator import gt, or_

from . import ondisk as q
from .claims import Claims
from .disk import Disk
from .errors import ImageError
from .findings import (
    ACTIVE,
    BAD_ENTRY,
    BAD_TABLE,
    IN_PLACE,
    MOST,
    NOT_COUNTED,
    OVERLAP,
    Finding,
    Findings,
    Owner,
    TooManyError,
)
from .image import Image
from .mapping import COMPRESSED
from .refcounts import Refcounts, Uses
from .snapshots import Snapshot


def check(image: Image, chosen: Snapshot | None = None) -> list[Finding]:
    """What is wrong with the metadata of all snapshots and the active disk, or with what one
    snapshot needs; at most MOST findings.

    Raises StorageError when the disk fails, SnapshotGone when a snapshot is deleted meanwhile.
    """
    findings = Findings()
    run = _Check(image, chosen, findings)
    with suppress(TooManyError):
        run.all()
    for owner in run.owners:
        owner.disk.check()
    return findings.all


class _Check:
    def __init__(self, image: Image, chosen: Snapshot | None, findings: Findings) -> None:
        self._findings = findings
        self.owners: list[Owner] = []  # who is checked
        self._others: list[Owner] = []  # whose tables others' data must not lie on
        self._image = image
        self._chosen = chosen
        self._bits = image.header.cluster_bits
        self._data_file = image.header.has_data_file
        self._uses = Uses()
        self._claims = Claims(image, self._uses, self._findings)
        # {host offset of an L2 table: (L1 index, owners)}
        self._tables: dict[int, tuple[int, list[Owner]]] = {}

    def all(self) -> None:
        refcounts = self._claims.claim_refcounts()
        self._claims.claim_header()
        self._claim_snapshots()
        for owner in self.owners:
            self._claim_l2_tables(owner)
        for owner in self._others:
            self._note_l2_tables(owner)
        for table, (index, owners) in self._tables.items():
            self._walk(table, index, owners)
        self._check_copied()
        if refcounts is not None and not self._image.header.dirty:
            self._compare(refcounts)

    # --- Metadata ---

    def _claim_snapshots(self) -> None:
        table = self._image.table()
        if table.damage:
            self._findings.add(BAD_TABLE, f"the snapshot table is damaged: {table.damage}")
        if table.snapshots:
            first = table.snapshots[0].entry_offset
            last = table.snapshots[-1]
            end = last.entry_offset + last.entry_length
            self._claims.claim("the snapshot table", first, end - first)
        for snapshot in table.snapshots:
            try:
                owner = Owner(snapshot.id, self._image.disk(snapshot))
            except ImageError as e:
                if self._chosen in (None, snapshot):
                    self._findings.add(BAD_TABLE, str(e))
                continue
            if self._chosen is None or snapshot.identity == self._chosen.identity:
                self.owners.append(owner)
            else:
                self._others.append(owner)
            self._claim_l1(owner, snapshot.l1_table_offset, snapshot.l1_size)
            if snapshot.vm_state_size and owner in self.owners:
                self._check_reach(owner, self._image.disk(snapshot, vm_state=True))
        try:
            active = Owner(ACTIVE, self._image.active_disk())
        except ImageError as e:
            if self._chosen is None:
                self._findings.add(BAD_TABLE, str(e))
            return
        (self.owners if self._chosen is None else self._others).append(active)
        header = self._image.header
        self._claim_l1(active, header.l1_table_offset, header.l1_size)

    def _claim_l1(self, owner: Owner, offset: int, entries: int) -> None:
        if entries:
            what = f"the L1 table of {owner.disk.name}"
            self._claims.claim(what, offset, entries * q.L1_ENTRY_SIZE, [owner])
        if owner in self.owners:
            self._check_reach(owner, owner.disk)

    def _check_reach(self, owner: Owner, disk: Disk) -> None:
        """QEMU makes every L1 table large enough, and opens no image whose own is not."""
        if disk.reach < disk.size:
            message = f"{disk.name}: its L1 table covers only {disk.reach} of {disk.size} bytes"
            self._findings.add(BAD_TABLE, message, [owner])

    def _claim_l2_tables(self, owner: Owner) -> None:
        mapping = owner.disk.mapping
        for index, entry in enumerate(mapping.l1_entries(0, mapping.l1_size)):
            try:
                table = mapping.l2_offset(index, entry)
            except ImageError as e:
                self._findings.add(BAD_ENTRY, f"{owner.disk.name}: {e}", [owner])
                continue
            if not table:
                continue
            before = self._tables.get(table)
            if before is not None and before[0] == index:
                before[1].append(owner)
                if table < self._claims.end:
                    self._uses.add(table >> self._bits, 1)
                continue
            what = f"L2 table {index} of {owner.disk.name}"
            self._claims.claim(what, table, self._image.header.cluster_size, [owner])
            if before is None and table < self._claims.end:
                self._tables[table] = index, [owner]

    def _note_l2_tables(self, owner: Owner) -> None:
        """The same of a snapshot that is not checked: no judgement, no counting."""
        mapping = owner.disk.mapping
        for index, entry in enumerate(mapping.l1_entries(0, mapping.l1_size)):
            table = entry & q.OFFSET_MASK
            if table:
                what = f"L2 table {index} of {owner.disk.name}"
                self._claims.clusters.setdefault(table >> self._bits, what)

    # --- What the L2 tables lead to ---

    def _walk(self, table: int, index: int, owners: list[Owner]) -> None:
        mapping = owners[0].disk.mapping
        try:
            entries = mapping.l2_part(table, 0, mapping.l2_entries)
        except ImageError as e:
            self._findings.add(BAD_TABLE, f"{owners[0].disk.name}: {e}", owners, table)
            return
        if self._looks_odd(entries):
            self._judge(index, owners)
        clusters = list(self._clusters(entries))
        self._uses.add_all(clusters, len(owners))
        if self._claims.clusters.keys().isdisjoint(clusters):
            return
        for cluster in clusters:
            if cluster in self._claims.clusters:
                host = cluster << self._bits
                self._findings.add(
                    OVERLAP,
                    f"data behind L2 table {index} of {owners[0].disk.name} overlaps "
                    f"{self._claims.clusters[cluster]} at host offset {host:#x}",
                    owners,
                    host,
                )

    def _looks_odd(self, entries: Sequence[int]) -> bool:
        """Whether any entry may be one that cannot be believed."""
        header = self._image.header
        if header.extended_l2 or header.has_data_file:
            return True
        flags = q.OFLAG_ZERO if header.version >= 3 else 0
        used = reduce(or_, entries, 0)
        return bool(
            used & ~(q.OFFSET_MASK & -header.cluster_size | flags)
            or max(entries) >= self._claims.end - header.cluster_size  # it may be cut off
        )

    def _judge(self, index: int, owners: list[Owner]) -> None:
        """Look at each cluster as a reader does, and report what it cannot read."""
        disk = owners[0].disk
        span, cluster = disk.mapping.bytes_per_l1_entry, disk.cluster_size
        seen = max(owner.disk.size for owner in owners)  # nobody sees more of a disk's last cluster
        for guest in range(index * span, (index + 1) * span, cluster):
            length = min(cluster, seen - guest) if guest < seen else cluster
            try:
                if self._data_file:  # it is not open: whether it is long enough is not judged
                    _exhaust(disk.mapping.runs(guest, length))
                    continue
                for *_, kind, entry in disk.cells(guest, length):
                    if kind == COMPRESSED:
                        self._judge_stream(f"{disk.name}: guest offset {guest:#x}", entry)
            except ImageError as e:
                where = f"{disk.name}: guest offset {guest:#x}: " if self._data_file else ""
                self._findings.add(BAD_ENTRY, f"{where}{e}", owners)

    def _judge_stream(self, where: str, entry: int) -> None:
        """It may decode all the same, but QEMU says of no stream that it has more sectors than
        the file."""
        offset, length = self._image.stream(entry)
        end = self._image.storage.size()
        if offset + length > -(-end // q.SECTOR) * q.SECTOR:
            raise ImageError(
                f"{where}: the compressed cluster at host offset {offset:#x} "
                f"is cut off at the end of the file ({end} bytes)"
            )

    def _clusters(self, entries: Sequence[int]) -> Iterator[int]:
        """The clusters of the file that the entries refer to, each as often as they do."""
        bits, end = self._bits, self._claims.end
        for entry in entries:
            offset = entry & q.OFFSET_MASK
            if entry & q.OFLAG_COMPRESSED:
                offset, length = self._image.stream(entry)
                if offset < end:
                    yield from range(offset >> bits, (min(offset + length, end) - 1 >> bits) + 1)
            elif 0 < offset < end and not self._data_file:
                yield offset >> bits

    def _check_copied(self) -> None:
        """COPIED lets QEMU write in place; on the active disk it must mean that nobody shares."""
        active = self.owners[-1] if self.owners and self.owners[-1].id == ACTIVE else None
        if active is None or self._image.header.has_data_file:
            return
        header, read = self._image.header, self._image.storage.read
        size = header.cluster_size
        l1 = read(header.l1_size * q.L1_ENTRY_SIZE, header.l1_table_offset)
        entries = q.integers(l1)
        for table, (index, owners) in self._tables.items():
            if active not in owners:
                continue
            shared = [entries[index]]
            shared += q.integers(read(size, table))[:: 2 if header.extended_l2 else 1]
            for entry in shared:
                if not entry & q.OFLAG_COPIED or entry & q.OFLAG_COMPRESSED:
                    continue
                host = entry & q.OFFSET_MASK
                if host < self._claims.end and self._uses.of(host >> self._bits) > 1:
                    self._findings.add(
                        IN_PLACE,
                        f"L1 entry {index} of the active disk, or an entry behind it, lets QEMU "
                        f"write in place to host offset {host:#x}, which others share",
                        [active],
                        host,
                    )

    # --- Refcounts ---

    def _compare(self, refcounts: Refcounts) -> None:
        """Report what is in use more often than it is counted."""
        bad: dict[int, tuple[int, int]] = {}
        for first, uses in self._uses.stretches(refcounts.per_block):
            number, at = divmod(first, refcounts.per_block)
            try:
                counts = refcounts.block(number)[at : at + len(uses)]
            except ImageError:  # reported already
                continue
            if any(map(gt, uses, counts)):
                for cluster, (used, counted) in enumerate(zip(uses, counts, strict=True), first):
                    if counted < used:
                        bad[cluster] = used, counted
            if len(bad) >= MOST:
                break
        users = self._users(bad)
        for cluster, (used, counted) in bad.items():
            host = cluster << self._bits
            what = self._claims.clusters.get(cluster, "data")
            self._findings.add(
                NOT_COUNTED,
                f"the cluster at host offset {host:#x} ({what}) is in use {used} times and "
                f"counted {counted}: it can be overwritten",
                users.get(cluster, []),
                host,
            )

    def _users(self, clusters: dict[int, tuple[int, int]]) -> dict[int, list[Owner]]:
        """Whose data or L2 tables lie in these clusters."""
        found: dict[int, list[Owner]] = {}
        if not clusters:
            return found
        for table, (_, owners) in self._tables.items():
            mapping = owners[0].disk.mapping
            try:
                entries = mapping.l2_part(table, 0, mapping.l2_entries)
            except ImageError:
                continue
            for cluster in (table >> self._bits, *self._clusters(entries)):
                if cluster in clusters:
                    known = found.setdefault(cluster, [])
                    known += [owner for owner in owners if owner not in known]
        return found


def _exhaust(found: Iterator[object]) -> None:
    for _ in found:
        pass
