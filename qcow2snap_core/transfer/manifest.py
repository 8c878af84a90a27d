"""What a directory of qcow2 files says of itself: which snapshots they hold.

A chain of overlays has the snapshots' disks.  For their IDs, dates, clocks and VM states a chain
has no place; internal snapshots in the overlays would be one, but they would hold on to what is
committed or written over later, and who splits an image wants to be rid of them.  So these things
stand in a file beside the overlays, ``qcow2snap.json``, which QEMU never looks at.  The directory
of a split has one, for join; and a repository of backups, where what it does not name is not there.

It is one object of JSON, ASCII, with exactly these fields:

* ``version``: 1.
* ``active``: of a split the file with the active disk, of a repository null.
* ``snapshots``: an array of objects, each behind the one that it lies on.

A snapshot has the fields of ``qcow2snap list --json`` that its table's entry has, ``id``, ``name``
(a byte that is not UTF-8 as one of the surrogates U+DC80 to U+DCFF), ``date-sec``, ``date-nsec``,
``vm-clock-sec``, ``vm-clock-nsec``, ``icount`` (or null), ``disk-size``, ``vm-state-size``, and:

* ``disk``: its overlay, an object of ``file``, and of that ``size`` and ``sha256``.
* ``parent``: the file of the snapshot that it lies on, or null.
* ``vm-state``: null, or a raw file as ``disk`` describes one.
* ``digest``: by what backup knows the snapshot in the image again, or null.

Whoever may write the directory may write this: so names are those of files in it and nothing else,
and everything is checked for type and bounds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from ..errors import ImageError, UsageError, escaped, shown
from ..format import ondisk as q
from ..format.snapshots import Snapshot, date
from ..storage.local import DEVICE, Storage, open_storage
from . import strict

#: What the file is called.
NAME: Final = "qcow2snap.json"

_VERSION: Final = 1
_MOST: Final = 64 << 20  # bytes: of 65,536 snapshots with names of 255 bytes
_LONGEST_TEXT: Final = 0xFFFF  # bytes of an ID or a name, as an entry of a table has them
_LONGEST_FILE: Final = 255  # bytes
_SECOND: Final = 10**9  # nanoseconds


class Stored(NamedTuple):
    """A file in the directory."""

    file: str
    size: int  # bytes of the file itself
    sha256: str  # in hexadecimal


class Entry(NamedTuple):
    """A snapshot that is there."""

    snapshot: Snapshot  # where its tables were means nothing any more
    disk: Stored
    parent: str | None  # the file that it lies on
    vm_state: Stored | None = None
    digest: str | None = None

    def __str__(self) -> str:
        s = self.snapshot
        return f"snapshot {shown(s.name)} (ID {escaped(s.id)}, {date(s)})"


class Manifest(NamedTuple):
    """All that is there."""

    entries: tuple[Entry, ...] = ()
    active: str | None = None

    @property
    def by_file(self) -> dict[str, Entry]:
        return {entry.disk.file: entry for entry in self.entries}

    def down_from(self, entry: Entry) -> Iterator[Entry]:
        """It, what it lies on, and so on down to the base."""
        known = self.by_file
        at: Entry | None = entry
        while at is not None:
            yield at
            at = None if at.parent is None else known[at.parent]


def open_in(directory: str, name: str) -> Storage:
    """Open a file in the directory, and nothing that a symlink leads to.  Raises UsageError."""
    path = os.path.join(directory, name)

    def permit(real: str, which: tuple[int, int]) -> None:
        if which[0] == DEVICE or real != os.path.join(os.path.realpath(directory), name):
            raise UsageError(f"{shown(path)} is no regular file: put the file itself there")

    return open_storage(path, permit)


def read(directory: str) -> Manifest:
    """Raises UsageError when there is none, ImageError when it does not say what one says."""
    storage = open_in(directory, NAME)
    try:
        if storage.size() > _MOST:
            raise ImageError(f"{shown(storage.path)} has more than {_MOST >> 20} MiB")
        return parse(storage.read(_MOST, 0))
    except ValueError as e:
        raise ImageError(
            f"{shown(storage.path)} cannot be believed: {e}; qemu-img reads the qcow2 files beside "
            f"it as they are"
        ) from e
    finally:
        storage.close()


def parse(raw: bytes) -> Manifest:
    """What the bytes of a manifest say.  Raises ValueError."""
    found = strict.loads(raw)
    if not isinstance(found, dict) or type(found.get("version")) is not int:
        raise ValueError("it has no version")
    if found["version"] != _VERSION:
        raise ValueError(f"its version is {str(found['version'])[:20]}, not {_VERSION}")
    strict.fields(found, {"version", "active", "snapshots"}, "manifest")
    snapshots = found["snapshots"]
    if not isinstance(snapshots, list) or len(snapshots) > q.MAX_SNAPSHOTS:
        raise ValueError(f"its snapshots are no array of up to {q.MAX_SNAPSHOTS}")
    active = None if found["active"] is None else _file(found["active"])
    entries: list[Entry] = []
    files = {NAME, active}
    disks: set[str] = set()
    for each in snapshots:
        entry = _entry(each)
        if entry.parent is not None and entry.parent not in disks:
            raise ValueError(f"{shown(entry.disk.file)} lies on what is not listed before it")
        for stored in (entry.disk, entry.vm_state):
            if stored is not None:
                if stored.file in files:
                    raise ValueError(f"{shown(stored.file)} is there twice")
                files.add(stored.file)
        disks.add(entry.disk.file)
        entries.append(entry)
    return Manifest(tuple(entries), active)


def text(manifest: Manifest) -> bytes:
    """The bytes of a manifest; people may have to read it."""
    fields = {
        "version": _VERSION,
        "active": manifest.active,
        "snapshots": [described(entry) for entry in manifest.entries],
    }
    return json.dumps(fields, indent=1).encode() + b"\n"


def described(entry: Entry) -> dict[str, Any]:
    """A snapshot's fields."""
    s = entry.snapshot
    return {
        "id": s.id,
        "name": s.name,
        "date-sec": s.date_sec,
        "date-nsec": s.date_nsec,
        "vm-clock-sec": s.vm_clock_nsec // _SECOND,
        "vm-clock-nsec": s.vm_clock_nsec % _SECOND,
        "icount": s.icount,
        "disk-size": s.disk_size,
        "vm-state-size": s.vm_state_size,
        "disk": entry.disk._asdict(),
        "parent": entry.parent,
        "vm-state": None if entry.vm_state is None else entry.vm_state._asdict(),
        "digest": entry.digest,
    }


_FIELDS: Final = {
    *("id", "name", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"),
    *("icount", "disk-size", "vm-state-size", "disk", "parent", "vm-state", "digest"),
}


def _entry(value: Any) -> Entry:
    found = strict.fields(value, _FIELDS, "snapshot")
    clock = strict.integer(found["vm-clock-sec"], 0, 1 << 64) * _SECOND
    clock += strict.integer(found["vm-clock-nsec"], 0, _SECOND)
    snapshot = Snapshot(
        _text(found["id"]),
        _text(found["name"]),
        strict.integer(found["date-sec"], 0, 1 << 32),
        strict.integer(found["date-nsec"], 0, 1 << 32),
        strict.integer(clock, 0, 1 << 64),
        strict.integer(found["vm-state-size"], 0, q.MAX_DISK_SIZE),
        strict.integer(found["disk-size"], 0, q.MAX_DISK_SIZE),
        None if found["icount"] is None else strict.integer(found["icount"], 0, q.ICOUNT_NONE),
        *(0, 0, 0, 0, q.EXTRA_ICOUNT.stop),
    )
    vm_state = None if found["vm-state"] is None else _stored(found["vm-state"])
    if (vm_state.size if vm_state else 0) != snapshot.vm_state_size:
        raise ValueError("the size of a VM state is not that of its file")
    parent = None if found["parent"] is None else _file(found["parent"])
    digest = None if found["digest"] is None else _hexadecimal(found["digest"])
    return Entry(snapshot, _stored(found["disk"]), parent, vm_state, digest)


def _stored(value: Any) -> Stored:
    found = strict.fields(value, {"file", "size", "sha256"}, "file")
    size = strict.integer(found["size"], 0)
    return Stored(_file(found["file"]), size, _hexadecimal(found["sha256"]))


def _file(value: Any) -> str:
    """The name of a file in the directory itself that neither is hidden nor means anything."""
    if not isinstance(value, str) or not value.isprintable() or "/" in value:
        raise ValueError("a file's name is none")
    if not value or value[0] in ".-" or len(os.fsencode(value)) > _LONGEST_FILE:
        raise ValueError("a file's name is none")
    return value


def _hexadecimal(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError("a digest is none")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("an ID or a name is no text")
    try:
        raw = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        raise ValueError("an ID or a name is no text") from None
    if len(raw) > _LONGEST_TEXT:
        raise ValueError("an ID or a name is too long")
    return value
