"""The snapshot table, and how to read it from a live image.

QEMU never changes the table in place.  It writes a whole new one elsewhere, flushes it, points
the header at it (count and offset, twelve bytes) and only then frees the old one.  A reader
beside it can therefore meet three odd things: a header half old and half new, a table that is
already zeros or other data because it was freed after the header was read, and the same offset
with another content.  So a table counts only when the header's twelve bytes were the same before
and after it was read, and one that does not parse is read again for a moment before it is
believed to be damaged.
"""

from __future__ import annotations

import sys
import time

from ..errors import ImageError, StorageError, shown
from ..storage.local import ExpectedBytes, Storage
from ..typed import TYPE_CHECKING, Final, NamedTuple
from . import ondisk as q
from .snapshots import Identity, Snapshot

if TYPE_CHECKING:
    from hashlib import blake2b


_PIECE: Final = 64 << 10  # of a table: its length is nowhere written
_KEPT_WHOLE: Final = 16 << 10  # a longer start of a table is known by its hash


class TableFingerprint(NamedTuple):
    """What a table was from its start to the end of one entry: while that is still there and
    the header points to it, the entry is one of its entries."""

    #: the header's twelve bytes that led to the table; the table itself; the header again
    expected: ExpectedBytes
    digest: bytes | None  # the hash of a table that is too long to be kept for every reader
    offset: int  # host offset of the table
    length: int

    def holds(self, storage: Storage) -> bool:
        """Whether the file still says so; the header is read first, and last."""
        if not storage.holds(self.expected):
            return False
        if self.digest is None:
            return True
        present = _hash()
        for at in range(0, self.length, _PIECE):
            present.update(storage.read(min(_PIECE, self.length - at), self.offset + at))
        return present.digest() == self.digest and storage.holds(self.expected)


def _hash() -> blake2b:
    # All of OpenSSL comes with this module, and few tables are long enough to need it.
    from hashlib import blake2b

    return blake2b()


class Table(NamedTuple):
    """The snapshot table at one moment."""

    snapshots: tuple[Snapshot, ...]
    damage: str | None  # why the entries after these could not be read
    changed_during_read: bool = False  # the header changed meanwhile: do not believe it
    note: str = ""  # why there are none
    fields: bytes = b""  # that led to it
    fingerprint: TableFingerprint | None = None  # of those that were looked for, if all are there


# A live table is settled within a write and a flush; a damaged one costs this much once.
_ATTEMPTS: Final = 20
_PAUSE: Final = 0.005


def read_table(storage: Storage, known: tuple[bytes, str | None] | None = None) -> Table:
    """The table as the file has it now, read again while QEMU is changing it.

    A table that stays damaged is returned with the entries before the damage; at once if fields
    and damage are the ``known`` ones.
    Raises StorageError when the disk fails, ImageError when the header never settles.
    """
    stop = time.thread_time() + q.MAX_TABLE_SECONDS
    for _ in range(_ATTEMPTS):
        table = read_table_once(storage)
        if not table.changed_during_read and (
            table.damage is None or (table.fields, table.damage) == known
        ):
            return table
        if time.thread_time() > stop:
            break
        time.sleep(_PAUSE)
    if table.changed_during_read:
        raise ImageError(f"{shown(storage.path)}: the snapshot table changes too fast to be read")
    return table


def read_table_once(storage: Storage, wanted: frozenset[Identity] | None = None) -> Table:
    """One try; the caller looks at ``changed_during_read`` and ``damage``.

    With wanted snapshots the table has no others and goes no further than the last of them.
    """
    before = read_fields(storage)
    table = _parse(storage, before, wanted)
    return table._replace(fields=before, changed_during_read=read_fields(storage) != before)


def read_fields(storage: Storage) -> bytes:
    """The header's count and offset of the table, as bytes."""
    return storage.read(q.SNAPSHOT_FIELDS_LENGTH, q.SNAPSHOT_FIELDS_OFFSET)


def _parse(storage: Storage, fields: bytes, wanted: frozenset[Identity] | None) -> Table:
    """The entries that can be parsed, and what is wrong with the next one."""
    if len(fields) < q.SNAPSHOT_FIELDS_LENGTH:
        return Table((), "the file ends inside the header")
    where = q.SNAPSHOT_FIELDS.parse(fields)
    count, offset = where.nb_snapshots, where.snapshots_offset
    if not count:
        return Table((), None)
    if count > q.MAX_SNAPSHOTS:
        return Table((), f"it has {count} entries, more than {q.MAX_SNAPSHOTS}")
    active = storage.read(q.ACTIVE_LENGTH, q.ACTIVE_OFFSET)
    bits = int.from_bytes(active[:4], "big")
    if not offset or offset % (1 << max(q.MIN_CLUSTER_BITS, min(bits, q.MAX_CLUSTER_BITS))):
        return Table((), f"its offset {offset:#x} is not one of a cluster")
    if not storage.read(1, offset):  # a remote file's size may be that of a moment ago
        return Table((), f"its offset {offset:#x} lies past the end of the file")
    reader = _Reader(storage, offset, int.from_bytes(active[4:], "big"))
    snapshots: list[Snapshot] = []
    missing = set(wanted or ())
    for number in range(count):
        try:
            snapshot = reader.entry()
        except ImageError as e:
            return Table(tuple(snapshots), f"entry {number + 1} of {count} {e}")
        if wanted is None:
            snapshots.append(snapshot)
        elif snapshot.identity in missing:
            snapshots.append(snapshot)
            missing.remove(snapshot.identity)
            if not missing:
                return Table(tuple(snapshots), None, fingerprint=reader.fingerprint(fields))
    return Table(tuple(snapshots), None)


class _Reader:
    """Walks the entries, reading ahead a piece at a time and keeping none of it."""

    def __init__(self, storage: Storage, offset: int, active_size: int) -> None:
        self._storage = storage
        self._active_size = active_size
        self._offset = offset
        self._gone = 0  # bytes of the table that were dropped,
        self._digest: blake2b | None = None  # and their hash
        self._data = b""  # what follows them
        self._at = 0  # in the data
        self._first = b""
        self._end = 0  # of the last entry, in the table
        self._text = 0  # bytes of memory that IDs and names take

    def entry(self) -> Snapshot:
        start = self._gone + self._at
        (
            l1_table_offset,
            l1_size,
            id_size,
            name_size,
            date_sec,
            date_nsec,
            vm_clock_nsec,
            vm_state_size,
            extra_size,
        ) = q.SNAPSHOT_HEAD.unpack(self._take(q.SNAPSHOT_HEAD_LENGTH))
        if extra_size > q.MAX_EXTRA_DATA_BYTES:
            raise ImageError(
                f"has {extra_size} bytes of extra data, more than {q.MAX_EXTRA_DATA_BYTES}"
            )
        extra = self._take(extra_size)
        id_str = self._take(id_size).decode("utf-8", "surrogateescape")
        name = self._take(name_size).decode("utf-8", "surrogateescape")
        self._text += sys.getsizeof(id_str) + sys.getsizeof(name)
        if self._text > q.MAX_SNAPSHOT_TEXT_BYTES:
            raise ImageError("has an ID and a name that are too long, with those before it")
        self._end = self._gone + self._at
        # The next entry is aligned to eight bytes; the last one's padding may be missing.
        self._at += (start - self._end) % 8
        icount = _number(extra[q.EXTRA_ICOUNT])
        large_vm_state_size = _number(extra[q.EXTRA_VM_STATE_SIZE])
        disk_size = _number(extra[q.EXTRA_DISK_SIZE])
        return Snapshot(
            id_str,
            name,
            date_sec,
            date_nsec,
            vm_clock_nsec,
            vm_state_size if large_vm_state_size is None else large_vm_state_size,
            self._active_size if disk_size is None else disk_size,
            None if icount == q.ICOUNT_NONE else icount,
            l1_table_offset,
            l1_size,
            self._offset + start,
            self._end - start,
            extra_size,
        )

    def fingerprint(self, fields: bytes) -> TableFingerprint:
        """Of the table up to the last entry's end."""
        header = fields, q.SNAPSHOT_FIELDS_OFFSET
        if self._end <= len(self._first):
            table = self._first[: self._end], self._offset
            return TableFingerprint((header, table, header), None, self._offset, self._end)
        digest = self._digest.copy() if self._digest else _hash()
        digest.update(self._data[: self._end - self._gone])
        return TableFingerprint((header,), digest.digest(), self._offset, self._end)

    def _take(self, length: int) -> bytes:
        if self._at + length > len(self._data):
            self._read_on(length)
        self._at += length
        return self._data[self._at - length : self._at]

    def _read_on(self, length: int) -> None:
        start = self._gone + self._at
        if start + length > q.MAX_SNAPSHOT_TABLE_BYTES:
            raise ImageError("lies past the 64 MiB that a snapshot table may take")
        used = min(self._at, len(self._data))  # less where an entry's padding is still to come
        if used:
            self._digest = self._digest or _hash()
            self._digest.update(self._data[:used])
        rest = self._data[used:]
        self._gone += used
        self._at -= used
        self._data = rest + self._read_ahead(
            self._at + length - len(rest), self._offset + self._gone + len(rest)
        )
        self._first = self._first or self._data[:_KEPT_WHOLE]
        if len(self._data) < self._at + length:
            raise ImageError(
                f"at host offset {self._offset + start:#x} lies past the end of the file"
            )

    def _read_ahead(self, length: int, offset: int) -> bytes:
        """That much, and more where that can be read: what is behind it may be no part of the
        table."""
        try:
            return self._storage.read(max(_PIECE, length), offset)
        except StorageError:
            return self._storage.read(length, offset)


def _number(field: bytes) -> int | None:
    return int.from_bytes(field, "big") if len(field) == 8 else None
