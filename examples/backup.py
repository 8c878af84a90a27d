"""Keep a raw file up to date with an image's snapshots, writing only what changed.

usage: backup.py IMAGE SNAPSHOT BACKUP

The first run copies all of the snapshot.  BACKUP.json then says which one that was, and the next
run, with a newer snapshot, writes what differs between the two.  It is removed while the backup is
being written: whatever ends a run, the next one does not take a mixture for a snapshot.

(`qcow2snap copy --since` does this with more care: it is here to show how `changes` is used.)
"""

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress

import qcow2snap_core
from qcow2snap_core import Disk, Extent, Image, Snapshot

PIECE = 1 << 20


def label(snapshot: Snapshot) -> dict[str, str]:
    """What tells it from another one that was given the same name later."""
    return {"id": snapshot.id, "name": snapshot.name, "date": snapshot.date.isoformat()}


def held(image: Image, backup: str) -> Snapshot | None:
    """The snapshot that the backup holds, if there is one and the image still has it."""
    if not os.path.exists(backup) or not os.path.exists(f"{backup}.json"):
        return None
    with open(f"{backup}.json") as file:
        wanted = json.load(file)
    return next((s for s in image.snapshots if label(s) == wanted), None)


def write(disk: Disk, extents: Iterable[Extent], fd: int) -> int:
    """Write the extents of the disk; returns how many bytes of data that were."""
    data = 0
    for extent in extents:
        for offset in range(extent.offset, extent.offset + extent.length, PIECE):
            length = min(PIECE, extent.offset + extent.length - offset)
            os.pwrite(fd, bytes(length) if extent.is_zero else disk.pread(length, offset), offset)
        data += 0 if extent.is_zero else extent.length
    return data


def main(path: str, name: str, backup: str) -> None:
    note = f"{backup}.json"
    with qcow2snap_core.open(path) as image:
        snapshot = image.find(name)
        new = image.open(snapshot)
        old = held(image, backup)
        extents: Iterable[Extent]
        if old is None:  # zeros need not be written into an empty file
            extents = filter(lambda extent: not extent.is_zero, new.extents())
        else:
            extents = qcow2snap_core.changes(image.open(old), new)
        with suppress(FileNotFoundError):
            os.unlink(note)
        fd = os.open(backup, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if old is None else 0), 0o600)
        try:
            data = write(new, extents, fd)
            os.ftruncate(fd, new.size)
            os.fsync(fd)
        finally:
            os.close(fd)
        with open(note, "w") as file:
            json.dump(label(snapshot), file)
    print(f"{data} bytes of data, {'all of it' if old is None else f'since {old.name}'}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: backup.py IMAGE SNAPSHOT BACKUP")
    try:
        main(*sys.argv[1:])
    except (qcow2snap_core.Error, OSError) as e:
        sys.exit(f"backup.py: {e}")
