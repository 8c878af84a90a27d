"""Is this snapshot still this snapshot?  Asked after every read, before its bytes are returned.

While a snapshot is in the table, QEMU changes none of its clusters: they are shared, or its own,
and writes of the guest go elsewhere.  When it deletes a snapshot it first writes a table without
it, then the header that points to that table, and only then frees the clusters.  So if the
snapshot is still listed *after* the data was read, the data was the snapshot's.

"Still listed" has to mean this one: a snapshot that was deleted and taken again can get the same
count and offset in the header, the same place in the table, ID, name and even L1 offset.  Its
time to the nanosecond and its VM clock differ.  Hence the two small reads of the usual case, the
header's twelve bytes and then the table from its start to the entry's end, both compared as
bytes.  The header comes first: if it was still the old one, the old table was still in force
when the data was read, whatever the table's place holds by now; and if it is a new one that looks
the same, the table read after it is the new one.  Not the entry alone: QEMU clears nothing behind
a table, so a shorter one with as many entries, put where the old one was, leaves old entries
standing behind its end.

When either differs, the table is read again and the snapshot looked up by its identity.
docs/live.md has the whole argument.
"""

from __future__ import annotations

import time
from threading import Lock
from typing import Final, Protocol

from . import ondisk as q
from .errors import ImageError, SnapshotGone, escaped, shown
from .snapshots import Proof, Snapshot, date, read_table_once
from .storage import Storage, check_open

# A table that is being changed settles within a write and a flush; one that stays damaged must
# not hold up its readers for long, since each of them asks again.
_ATTEMPTS: Final = 200
_ATTEMPTS_DAMAGED: Final = 20
_PAUSE: Final = 0.005
# A header that is half old and half new can look whole twice in a row if the writer was
# interrupted between the halves; so a snapshot is gone only when it is missing for this long.
_MISSING_FOR: Final = 4  # consistent tables in a row


class Guard(Protocol):
    """Tells whether what was just read may be returned."""

    def check(self) -> None:
        """Raises SnapshotGone, or ImageError when it cannot be told."""


class Unguarded:
    """For what has no snapshot to lose: the active disk of a backing file."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def check(self) -> None:
        check_open(self._storage)


class SnapshotGuard:
    """Watches one snapshot in one file; shared by all its readers."""

    def __init__(self, storage: Storage, snapshot: Snapshot) -> None:
        self._storage = storage
        self._identity = snapshot.identity
        self._lock = Lock()
        self._gone: str | None = None
        # Replaced as a whole, since other threads compare with it meanwhile.
        self._proof: Proof | None = None
        who = f"{escaped(snapshot.id)} {shown(snapshot.name)}"
        self._described = f"snapshot {who} of {date(snapshot)}"

    def check(self) -> None:
        proof = self._proof
        if self._gone is None and proof is not None and proof.holds(self._storage):
            return
        self._look_again()

    def _look_again(self) -> None:
        """Find the snapshot where it is now, or make sure that it is nowhere."""
        with self._lock:
            missing = damaged = 0
            stop = time.thread_time() + q.MAX_TABLE_SECONDS
            for _ in range(_ATTEMPTS):
                if self._gone is not None:
                    raise SnapshotGone(self._gone)
                table = read_table_once(self._storage, self._identity)
                if not table.torn:
                    if table.proof is not None:
                        self._proof = table.proof
                        return
                    missing = 0 if table.damage else missing + 1
                    damaged = damaged + 1 if table.damage else 0
                    if missing == _MISSING_FOR:
                        self._gone = (
                            f"{self._described} was deleted from {shown(self._storage.path)}: "
                            f"nothing of it can be read any more"
                        )
                        continue
                    if damaged == _ATTEMPTS_DAMAGED:
                        break
                if time.thread_time() > stop and not missing:
                    break
                time.sleep(_PAUSE)
            why = f"the table is damaged, {table.damage}" if damaged else "the table never settles"
            raise ImageError(
                f"cannot tell whether {self._described} is still in {shown(self._storage.path)}: "
                f"{why}"
            )
