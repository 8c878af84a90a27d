"""The L2 tables of everybody whose metadata is checked, and what they lead to.

Each table is read once, however many L1 tables lead to it: what is wrong behind it is wrong for
all of them, and what it leads to is in use as often as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import reduce
from itertools import groupby
from operator import itemgetter, or_

from ..errors import ImageError
from ..format import ondisk as q
from ..image.image import Image
from ..image.mapping import COMPRESSED
from .claims import Claims
from .findings import BAD_ENTRY, BAD_TABLE, Findings, Owner, union
from .tally import Uses


class Tables:
    """Claims, reads and judges them."""

    def __init__(self, image: Image, claims: Claims, uses: Uses, findings: Findings) -> None:
        self._image = image
        self._claims = claims
        self._uses = uses
        self._findings = findings
        self._bits = image.header.cluster_bits
        self._data_file = image.header.has_data_file
        # {host offset of an L2 table: (L1 index, owners in the order of their coming)}
        self._tables: dict[int, tuple[int, list[Owner]]] = {}

    def add(self, owner: Owner) -> None:
        """Claim the tables that an owner's L1 table leads to."""
        mapping = owner.disk.tables
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
                self._uses.add(table >> self._bits, 1)
                continue
            what = f"L2 table {index} of {owner.disk.name}"
            owners = [owner]
            self._claims.claim(what, table, self._image.header.cluster_size, owners)
            if before is None and table < self._claims.end:
                self._tables[table] = index, owners

    def walk(self) -> None:
        """Judge what is behind each table, and count the clusters that it leads to."""
        for table, (index, owners) in self._tables.items():
            try:
                entries = self._read(table, owners)
            except ImageError as e:
                self._findings.add(BAD_TABLE, f"{owners[0].disk.name}: {e}", owners, table)
                continue
            if self._looks_odd(entries) and self._findings.concern(owners):
                self._judge(index, owners)
            clusters = list(self._clusters(entries))
            self._uses.add_all(clusters, len(owners))
            for cluster in sorted(self._claims.clusters.keys() & clusters):
                what = f"data behind L2 table {index} of {owners[0].disk.name}"
                self._claims.overlap(what, owners, cluster)

    def led_to(self, owner: Owner | None = None) -> Iterator[tuple[list[int], Sequence[Owner]]]:
        """(the clusters of a table and of all that it leads to, owners) of each table, or of those
        of one owner."""
        for table, (_, owners) in self._tables.items():
            if owner is None or any(o is owner for o in owners):
                with suppress(ImageError):  # reported already
                    entries = self._read(table, owners)
                    yield [table >> self._bits, *self._clusters(entries)], owners

    def by_index(self) -> Iterator[tuple[int, list[tuple[int, Sequence[Owner]]]]]:
        """(L1 index, its tables: host offset and owners, in the order of their coming)."""
        by_index = sorted((index, n, t) for n, (t, (index, _)) in enumerate(self._tables.items()))
        for index, tables in groupby(by_index, key=itemgetter(0)):
            yield index, [(table, self._tables[table][1]) for *_, table in tables]

    def users(self, clusters: Collection[int]) -> dict[int, Sequence[Owner]]:
        """Whose tables or data lie in each of these clusters."""
        claimed = self._claims.clusters
        lists_of = {
            cluster: [claimed[cluster].owners] for cluster in clusters if cluster in claimed
        }
        for there, owners in self.led_to() if clusters else ():
            for cluster in set(there):
                if cluster in clusters:
                    lists_of.setdefault(cluster, []).append(owners)
        return {cluster: union(*lists) for cluster, lists in lists_of.items()}

    def of_last(self, owner: Owner) -> Iterator[tuple[int, int]]:
        """(L1 index, host offset) of the tables of the owner who was added last."""
        for table, (index, owners) in self._tables.items():
            if owners[-1] is owner:
                yield index, table

    # --- One table ---

    def _read(self, table: int, owners: Sequence[Owner]) -> Sequence[int]:
        mapping = owners[0].disk.tables
        return mapping.l2_part(table, 0, mapping.l2_entries)

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
        span, cluster = disk.tables.bytes_per_l1_entry, disk.cluster_size
        seen = max(owner.disk.size for owner in owners)  # nobody sees more of a disk's last cluster
        for guest in range(index * span, (index + 1) * span, cluster):
            length = min(cluster, seen - guest) if guest < seen else cluster
            try:
                if self._data_file:  # it is not open: whether it is long enough is not judged
                    _exhaust(disk.mapping.runs(guest, length))
                    continue
                for *_, kind, entry in disk.ranges(guest, length):
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


def _exhaust(runs: Iterator[object]) -> None:
    for _ in runs:
        pass
