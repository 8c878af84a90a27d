"""The snapshot table: its entries, how to read it from a live image, how to choose one.

QEMU never changes the table in place.  It writes a whole new one elsewhere, flushes it, points
the header at it (count and offset, twelve bytes) and only then frees the old one.  A reader
beside it can therefore meet three odd things: a header half old and half new, a table that is
already zeros or other data because it was freed after the header was read, and the same offset
with another content.  So a table counts only when the header's twelve bytes were the same before
and after it was read, and one that does not parse is read again for a moment before it is
believed to be damaged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from . import ondisk as q
from .errors import ImageError, UsageError, shown
from .storage import Storage


class Identity(NamedTuple):
    """What makes a snapshot this one and no other: all of its entry that never changes.

    Extra data is left out: QEMU adds some to old entries whenever it rewrites the table.
    """

    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    l1_table_offset: int
    l1_size: int


class Sighting(NamedTuple):
    """Where in the file an entry was seen, and what exactly was there."""

    fields: bytes  # the header's twelve bytes that led to its table
    offset: int  # host offset of the table
    start: int  # of the entry in the table
    end: int  # without the padding
    table: bytearray  # shared by all its entries; goes on growing while it is parsed

    @property
    def entry(self) -> bytes:
        return bytes(self.table[self.start : self.end])

    @property
    def table_so_far(self) -> bytes:
        """The table up to the entry's end: what proves that the entry is one of its entries."""
        return bytes(self.table[: self.end])


@dataclass(frozen=True)
class Snapshot:
    """One entry of the table; sizes in bytes."""

    id: str
    name: str  # not UTF-8: surrogateescape
    date_sec: int  # seconds since the epoch
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int  # of an old entry that does not record it: the active disk's
    icount: int | None
    l1_table_offset: int
    l1_size: int  # entries
    sighting: Sighting = field(repr=False)

    @property
    def identity(self) -> Identity:
        return Identity(
            self.id,
            self.name,
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            self.l1_table_offset,
            self.l1_size,
        )


@dataclass(frozen=True)
class Table:
    """The snapshot table at one moment."""

    snapshots: tuple[Snapshot, ...]
    damage: str | None  # why the entries after these could not be read
    torn: bool = False  # the header changed meanwhile: do not believe it
    note: str = ""  # why there are none


# A live table is settled within a write and a flush; a damaged one costs this much once.
_ATTEMPTS: Final = 20
_PAUSE: Final = 0.005


def read_table(storage: Storage) -> Table:
    """The table as the file has it now, read again while QEMU is changing it.

    A table that stays damaged is returned with the entries before the damage.
    Raises StorageError when the disk fails, ImageError when the header never settles.
    """
    for _ in range(_ATTEMPTS):
        table = read_table_once(storage)
        if not table.torn and table.damage is None:
            return table
        time.sleep(_PAUSE)
    if table.torn:
        raise ImageError(f"{shown(storage.path)}: the snapshot table changes too fast to be read")
    return table


def read_table_once(storage: Storage) -> Table:
    """One try; the caller looks at ``torn`` and ``damage``."""
    before = read_fields(storage)
    snapshots, damage = _parse(storage, before)
    return Table(snapshots, damage, torn=read_fields(storage) != before)


def read_fields(storage: Storage) -> bytes:
    """The header's count and offset of the table, as bytes."""
    return storage.read(q.SNAPSHOT_FIELDS_LENGTH, q.SNAPSHOT_FIELDS_OFFSET)


def _parse(storage: Storage, fields: bytes) -> tuple[tuple[Snapshot, ...], str | None]:
    """The entries that can be parsed, and what is wrong with the next one."""
    if len(fields) < q.SNAPSHOT_FIELDS_LENGTH:
        return (), "the file ends inside the header"
    where = q.parse_snapshot_fields(fields)
    if not where.nb_snapshots:
        return (), None
    if where.nb_snapshots > q.MAX_SNAPSHOTS:
        return (), f"it has {where.nb_snapshots} entries, more than {q.MAX_SNAPSHOTS}"
    if where.snapshots_offset < q.HEADER_V2_LENGTH or where.snapshots_offset % q.SECTOR:
        return (), f"its offset {where.snapshots_offset:#x} is not one of a cluster"
    if where.snapshots_offset >= storage.size():
        return (), f"its offset {where.snapshots_offset:#x} lies past the end of the file"
    reader = _Reader(storage, fields, where.snapshots_offset)
    found: list[Snapshot] = []
    for number in range(where.nb_snapshots):
        try:
            found.append(reader.entry())
        except ImageError as e:
            return tuple(found), f"entry {number + 1} of {where.nb_snapshots} {e}"
    return tuple(found), None


class _Reader:
    """Walks the entries, reading ahead a piece at a time: the table's length is nowhere written."""

    _PIECE: Final = 64 << 10

    def __init__(self, storage: Storage, fields: bytes, offset: int) -> None:
        self._storage = storage
        self._fields = fields
        self._active_size = int.from_bytes(storage.read(8, q.SIZE_OFFSET), "big")
        self._offset = offset
        self._table = bytearray()
        self._at = 0

    def entry(self) -> Snapshot:
        start = self._at
        head = self._take(q.SNAPSHOT_HEAD_LENGTH)
        h = q.parse_snapshot_head(head)
        extra = self._take(h.extra_data_size)
        id_str = self._take(h.id_str_size)
        name = self._take(h.name_size)
        end = self._at
        # The next entry is aligned to eight bytes; the last one's padding may be missing.
        self._at += -end % 8
        icount = _number(extra[q.EXTRA_ICOUNT])
        vm_state_size = _number(extra[q.EXTRA_VM_STATE_SIZE])
        disk_size = _number(extra[q.EXTRA_DISK_SIZE])
        return Snapshot(
            id=_text(id_str),
            name=_text(name),
            date_sec=h.date_sec,
            date_nsec=h.date_nsec,
            vm_clock_nsec=h.vm_clock_nsec,
            vm_state_size=h.vm_state_size if vm_state_size is None else vm_state_size,
            disk_size=self._active_size if disk_size is None else disk_size,
            icount=None if icount == q.ICOUNT_NONE else icount,
            l1_table_offset=h.l1_table_offset,
            l1_size=h.l1_size,
            sighting=Sighting(self._fields, self._offset, start, end, self._table),
        )

    def _take(self, length: int) -> bytes:
        start, self._at = self._at, self._at + length
        if self._at > q.MAX_SNAPSHOT_TABLE_BYTES:
            raise ImageError("lies past the 64 MiB that a snapshot table may take")
        have = len(self._table)
        if have < self._at:
            self._table += self._storage.read(
                max(self._PIECE, self._at - have), self._offset + have
            )
            if len(self._table) < self._at:
                where = self._offset + start
                raise ImageError(f"at host offset {where:#x} lies past the end of the file")
        return bytes(self._table[start : self._at])


def _number(field: bytes) -> int | None:
    return int.from_bytes(field, "big") if len(field) == 8 else None


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


class Choice(NamedTuple):
    """Which snapshot a user means: every part that is given must match."""

    either: str | None = None  # an ID, else a name
    id: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        parts = {"": self.either, "with the ID ": self.id, "named ": self.name}
        return " and ".join(f"{how}{shown(x)}" for how, x in parts.items() if x is not None)


def choose(table: Table, choice: Choice, path: str) -> Snapshot:
    """The first snapshot that matches (QEMU: bdrv_snapshot_find, find_snapshot_by_id_or_name).

    Raises UsageError that lists what there is.
    """
    matching = [
        s for s in table.snapshots if choice.id in (None, s.id) and choice.name in (None, s.name)
    ]
    if choice.either is not None:
        matching = [s for s in matching if s.id == choice.either] or [
            s for s in matching if s.name == choice.either
        ]
    if matching:
        return matching[0]
    damaged = f" (its snapshot table is damaged: {table.damage})" if table.damage else ""
    note = f" ({table.note})" if table.note else ""
    raise UsageError(
        f"no snapshot {choice} in {shown(path)}{damaged}: {summary(table.snapshots)}{note}"
    )


def summary(snapshots: Sequence[Snapshot], most: int = 50) -> str:
    """The snapshots there are, in half a line."""
    if not snapshots:
        return "it has none"
    each = [f"{s.id} {shown(s.name)}" for s in snapshots[:most]]
    more = f" and {len(snapshots) - most} more" if len(snapshots) > most else ""
    return "it has " + ", ".join(each) + more


def date(snapshot: Snapshot) -> str:
    """When it was taken, in local time as ``qemu-img snapshot -l`` shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_sec))
