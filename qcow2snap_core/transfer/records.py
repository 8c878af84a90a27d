"""What a copy knows of itself: which snapshot it holds.  :mod:`.updates` keeps and asks it.

``copy --since OLD NEW`` writes only what changed, so on anything but a copy of OLD it makes a disk
that never was.  Therefore a file that was copied carries a record, and an update asks it first, as
``zfs receive`` asks a filesystem.  The record is the file's extended attribute
``user.qcow2snap.copy``; where there can be none it is a file beside it, ``TARGET.qcow2snap``.
Devices and NBD exports have room for neither.

It is one object of JSON, ASCII, of at most 4,096 bytes, with exactly these fields:

* ``version``: 1.
* ``state``: ``whole``; or ``between``, while an update in place goes on or when it has failed.
* ``holds``: the snapshot, or null for an active disk, which nobody can find again.
* ``since``: of ``between`` the snapshot that was there before, else null.
* ``size``, ``mtime-ns``: the file's own, when the record was written.

A snapshot is an object of ``id`` and ``name``, cut to 64 characters, ``date-sec``, ``date-nsec``,
``vm-clock-nsec``, and ``digest``: 32 bytes of BLAKE2b in hexadecimal of its whole identity
(:class:`.Identity`), its L1 table and the first of its L2 tables, and the first and last 128 KiB of
its content.  An image has no name of its own that outlives a move; tables and content tell two
disks of one machine apart whose snapshots were taken at the same instant under the same name and
ID.  Tables alone do not, where both were preallocated or come from one template: then what differs
are the IDs that partition tables, RAIDs, volume groups and filesystems keep at the ends of a disk.
QEMU changes none of it while the snapshot exists, but for the COPIED bits, which are left out.

A file whose size or time of modification is not that of the record was written by somebody else,
or copied without its times: then the record says nothing.  What this cannot see is a write that
puts the old time back.  The record of ``between`` has no times to compare, since a kill comes at
any moment; it lets only the same update be repeated, which writes all its ranges again, and what
that will not write is compared first.

Whoever may write the file may write its record: it protects from mistakes, not from forgery, and
so it is read as anything from outside is, strictly and up to a limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import time
from contextlib import suppress
from typing import Any, Final, NamedTuple

from ..errors import ImageError, StorageError, escaped, shown
from ..format.snapshots import Identity
from ..image.disk import Disk
from . import strict

_VERSION: Final = 1
MOST: Final = 4096  # bytes of a record
_MOST_TEXT: Final = 64  # characters: two snapshots have to fit into a record
_L1_ENTRIES: Final = 8192  # read at a time
_L2_BYTES: Final = 256 << 10  # of L2 tables that are part of a digest
_ENDS: Final = 128 << 10  # bytes: beyond Btrfs's first superblock at 64 KiB


class Held(NamedTuple):
    """A snapshot, as a record knows it."""

    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    digest: str

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.date_sec))
        return f"snapshot {shown(self.name)} (ID {escaped(self.id)}, {when})"


class Record(NamedTuple):
    """What a file holds; ``None`` stands for an active disk."""

    holds: Held | None
    since: Held | None = None
    between: bool = False  # the file is somewhere on the way from ``since`` to ``holds``
    size: int = 0
    mtime_ns: int = 0

    def of(self, status: os.stat_result) -> Record:
        """The same for a file as it is now."""
        return self._replace(size=status.st_size, mtime_ns=status.st_mtime_ns)


def held(disk: Disk, identity: Identity | None = None) -> Held | None:
    """What a record says of a snapshot; None for an active disk.  A disk whose guard watches others
    as well does not know whose it is."""
    identity = identity or disk.identity
    if identity is None:
        return None
    digest = hashlib.blake2b(digest_size=32)
    for field in identity:
        text = str(field).encode("utf-8", "surrogateescape")
        digest.update(struct.pack(">Q", len(text)) + text)
    _add_tables(digest, disk)
    _add_ends(digest, disk)
    disk.confirm()
    return Held(
        identity.id[:_MOST_TEXT],
        identity.name[:_MOST_TEXT],
        identity.date_sec,
        identity.date_nsec,
        identity.vm_clock_nsec,
        digest.hexdigest(),
    )


def _add_tables(digest: Any, disk: Disk) -> None:
    mapping = disk.tables
    left = _L2_BYTES // mapping.l2_entry_size
    for first in range(0, mapping.l1_size, _L1_ENTRIES):
        entries = mapping.l1_entries(first, min(_L1_ENTRIES, mapping.l1_size - first))
        digest.update(struct.pack(f">{len(entries)}Q", *entries))
        for index, entry in enumerate(entries, first):
            if not left:
                break
            with suppress(ImageError):  # damage: whoever needs the table will say so
                if table := mapping.l2_offset(index, entry):
                    count = min(left, mapping.l2_entries)
                    digest.update(mapping.l2_raw(table, 0, count))
                    left -= count


def _add_ends(digest: Any, disk: Disk) -> None:
    length = min(_ENDS, disk.size)
    for offset in (0, disk.size - length):
        with suppress(ImageError, StorageError):  # likewise
            digest.update(disk.pread(length, offset))


def parse(raw: bytes) -> Record:
    """What the bytes of a record say.  Raises ValueError."""
    if len(raw) > MOST:
        raise ValueError(f"it has more than {MOST} bytes")
    fields = strict.loads(raw)
    if not isinstance(fields, dict) or type(fields.get("version")) is not int:
        raise ValueError("it has no version")
    if fields["version"] != _VERSION:
        raise ValueError(f"its version is {str(fields['version'])[:20]}, not {_VERSION}")
    strict.fields(fields, {"version", "state", "holds", "since", "size", "mtime-ns"}, "record")
    if fields["state"] not in ("whole", "between"):
        raise ValueError("its state is unknown")
    between = fields["state"] == "between"
    holds, since = _snapshot(fields["holds"]), _snapshot(fields["since"])
    if since is not None and not between:
        raise ValueError("it is whole and between")
    size, mtime = strict.integer(fields["size"], 0), strict.integer(fields["mtime-ns"], -(1 << 63))
    return Record(holds, since, between, size, mtime)


def _snapshot(fields: Any) -> Held | None:
    if fields is None:
        return None
    names = {"id", "name", "date-sec", "date-nsec", "vm-clock-nsec", "digest"}
    strict.fields(fields, names, "snapshot")
    for key in ("id", "name", "digest"):
        if not isinstance(fields[key], str) or len(fields[key]) > _MOST_TEXT:
            raise ValueError(f"{key} is no short text")
    if not re.fullmatch("[0-9a-f]{64}", fields["digest"]):
        raise ValueError("its digest is none")
    return Held(
        fields["id"],
        fields["name"],
        strict.integer(fields["date-sec"], 0, 1 << 32),
        strict.integer(fields["date-nsec"], 0, 1 << 32),
        strict.integer(fields["vm-clock-nsec"], 0, 1 << 64),
        fields["digest"],
    )


def text(record: Record) -> bytes:
    """The bytes of a record."""
    fields = {
        "version": _VERSION,
        "state": "between" if record.between else "whole",
        "holds": _fields(record.holds),
        "since": _fields(record.since),
        "size": record.size,
        "mtime-ns": record.mtime_ns,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def _fields(snapshot: Held | None) -> dict[str, Any] | None:
    if snapshot is None:
        return None
    return {key.replace("_", "-"): value for key, value in snapshot._asdict().items()}
