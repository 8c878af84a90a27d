"""Is this snapshot still this snapshot?  Asked after every read, before its bytes are returned.

While a snapshot is in the table, QEMU changes none of its clusters: they are shared, or its own,
and writes of the guest go elsewhere.  When it deletes a snapshot it first writes a table without
it, then the header that points to that table, and only then frees the clusters.  So if the
snapshot is still listed *after* the data was read, the data was the snapshot's.

"Still listed" has to mean this one: a snapshot that was deleted and taken again can get the same
count and offset in the header, the same place in the table, ID, name and even L1 offset.  Its
time to the nanosecond and its VM clock differ.  Hence the small reads of the usual case, the
header's twelve bytes and then the table from its start to the entry's end, both compared as
bytes.  The header comes first: if it was still the old one, the old table was still in force
when the data was read, whatever the table's place holds by now; and if it is a new one that looks
the same, the table read after it is the new one.  Not the entry alone: QEMU clears nothing behind
a table, so a shorter one with as many entries, put where the old one was, leaves old entries
standing behind its end.

Nor is it enough to read the header once.  Its twelve bytes are not written at once, so a read can
see the count of one header with the offset of the next.  Together these may be equal to the header
that is remembered, while the table at that offset is a shorter one, put where the old one was.  So
the header is read once more after the table.

When any of it differs, the table is read again and the snapshot looked up by its identity.
docs/live.md has the whole argument.

Code that reads the tables of many snapshots asks once for all of them: the fingerprint then reaches
to the end of the last entry.  One guard for each would read the table as often as it has entries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from threading import Lock

from ..errors import Error, ImageError, SnapshotGone, StorageError, escaped, shown
from ..format import ondisk as q
from ..format.snapshot_table import Table, TableFingerprint, read_table_once
from ..format.snapshots import Identity, Snapshot, date
from ..storage.local import ExpectedBytes, Storage, ensure_open
from ..typed import TYPE_CHECKING, Final, Protocol, TypeVar

if TYPE_CHECKING:
    from .disk import Disk

# A table that is being changed settles within a write and a flush; one that stays damaged must
# not hold up its readers for long, since each of them asks again.
_ATTEMPTS: Final = 200
_ATTEMPTS_DAMAGED: Final = 20
_PAUSE: Final = 0.005
# A header that is half old and half new can look whole twice in a row if the writer was
# interrupted between the halves; so a snapshot is gone only when it is missing for this long.
_MISSING_FOR: Final = 4  # consistent tables in a row
# What is confirmed at a time: little at first, for who asks for one extent, and always more, since
# for a hostile image it may cost a tenth of a second.
_FIRST_BATCH: Final = 16
_LARGE_BATCH: Final = 4096


#: Is told what the file holds while the snapshot is there, or None when it has to be asked.
Expect = Callable[[ExpectedBytes | None], object]


class Guard(Protocol):
    """Tells whether what was just read may be returned."""

    @property
    def identity(self) -> Identity | None:
        """Of the snapshot; None for an active disk, which has none that lasts."""

    @property
    def plain_fd(self) -> int | None:
        """Where a native reader can compare; None where it cannot."""

    def tell(self, expect: Expect) -> None:
        """Keep a native reader informed, which then compares by itself."""

    def confirm(self) -> None:
        """Raises SnapshotGone when what was read does not hold, ImageError when that cannot be
        told."""


class Unguarded:
    """For what has no snapshot to lose: an active disk."""

    identity = None
    plain_fd = None

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def tell(self, expect: Expect) -> None:
        """Never called: there is nothing to compare."""

    def confirm(self) -> None:
        """Raises ValueError when the file was closed: zeros are read without a look at it."""
        ensure_open(self._storage)


class SnapshotGuard:
    """Watches snapshots of one file, mostly one; shared by all their readers."""

    def __init__(self, storage: Storage, *snapshots: Snapshot) -> None:
        self._storage = storage
        self._snapshots = snapshots
        self._wanted = frozenset(s.identity for s in snapshots)
        self.identity: Final = snapshots[0].identity if len(snapshots) == 1 else None
        self.plain_fd = storage.plain_fd if len(snapshots) == 1 else None
        self._lock = Lock()
        self._gone: str | None = None
        # Replaced as a whole, since other threads compare with it meanwhile.
        self._fingerprint: TableFingerprint | None = None
        # The header's fields and the damage that were waited for in vain.
        self._lasting: tuple[bytes, str | None] | None = None
        self._expect: Expect | None = None

    def tell(self, expect: Expect) -> None:
        self._expect = expect
        self._believe(self._fingerprint)

    def _believe(self, fingerprint: TableFingerprint | None) -> None:
        self._fingerprint = fingerprint
        if self._expect is not None:
            self._expect(
                fingerprint.expected
                if fingerprint is not None and fingerprint.digest is None
                else None
            )

    def confirm(self) -> None:
        """Raises SnapshotGone when one of them is, ImageError when it cannot be told."""
        fingerprint = self._fingerprint
        if self._gone is None and fingerprint is not None and fingerprint.holds(self._storage):
            return
        if self._wanted:
            self._look_again()

    def _look_again(self) -> None:
        """Find the snapshots where they are now, or make sure that one is nowhere."""
        with self._lock:
            lasting, self._lasting = self._lasting, None
            missing = damaged = 0
            stop = time.thread_time() + q.MAX_TABLE_SECONDS
            for _ in range(_ATTEMPTS):
                if self._gone is not None:
                    raise SnapshotGone(self._gone)
                table = read_table_once(self._storage, self._wanted)
                if not table.changed_during_read:
                    if table.fingerprint is not None:
                        self._believe(table.fingerprint)
                        return
                    missing = 0 if table.damage else missing + 1
                    damaged = damaged + 1 if table.damage else 0
                    if missing == _MISSING_FOR:
                        self._gone = (
                            f"{self._first_but(table)} was deleted from "
                            f"{shown(self._storage.path)}: nothing of it can be read any more"
                        )
                        self._believe(None)
                        continue
                    if damaged == _ATTEMPTS_DAMAGED or lasting == (table.fields, table.damage):
                        self._lasting = table.fields, table.damage
                        break
                if time.thread_time() > stop and not missing:
                    break
                time.sleep(_PAUSE)
            why = f"the table is damaged, {table.damage}" if damaged else "the table never settles"
            raise ImageError(
                f"cannot tell whether {self._first_but(table)} is still in "
                f"{shown(self._storage.path)}: {why}"
            )

    def _first_but(self, table: Table) -> str:
        """The first snapshot that is not in the table."""
        there = {s.identity for s in table.snapshots}
        missing = (s for s in self._snapshots if s.identity not in there)
        s = next(missing, self._snapshots[0])
        return f"snapshot {escaped(s.id)} {shown(s.name)} of {date(s)}"


_T = TypeVar("_T")


def confirmed(items: Iterator[_T], *disks: Disk) -> Iterator[_T]:
    """The same items, none of them handed out before all disks were asked if they still exist.

    Those before a damaged table are handed out first, then its error is raised.
    """
    size = _FIRST_BATCH
    files = {disk.tables.storage for disk in disks}
    while True:
        damage: Error | None = None
        batch: list[_T] = []
        try:
            batch.extend(islice(items, size))
        except (ImageError, StorageError) as e:
            damage = e
        for disk in disks:
            disk.confirm()  # if one is gone, that is the reason for anything
        for item in batch:
            for file in files:
                if file.closed:
                    ensure_open(file)
            yield item
        if damage is not None:
            raise damage
        if len(batch) < size:
            return
        size *= 8 if size < _LARGE_BATCH else 2
