"""Which file a running QEMU has open as a disk.

The name that QEMU gives an image is the one it was started with.  A relative one says nothing: QEMU
resolved it before ``--daemonize`` changed its directory to ``/``, and another file may have that
name by now.  Even an absolute one may mean another file here, when QEMU lives in a container.

So the file is known by what is in it.  The kernel lists what QEMU has open (``/proc/PID/fd``, for
root and QEMU's own user), and one of these files has the snapshot that was just taken, with the
date that QEMU gave it, to the nanosecond.  A name for it counts if it leads to the same inode.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import Error, UsageError, reason, shown
from ..format.header import read_header
from ..format.snapshot_table import read_table
from ..format.snapshots import Snapshot
from ..storage.libnbd import absolute, is_uri
from ..storage.local import inode, open_storage
from ..storage.remote import RemoteFile
from .names import listed


class Found(NamedTuple):
    """A file, and the snapshots in it."""

    path: str  # absolute, or the URI of an NBD export
    snapshots: tuple[Snapshot, ...]


def find(pid: int, name: str, taken: dict[str, Any]) -> Found:
    """The image that the process calls ``name`` and that has the snapshot ``taken``
    (``SnapshotInfo`` in QEMU's QAPI).

    Raises UsageError that says why it is not known.
    """
    if is_uri(name):
        snapshots = _holding(name, taken)
        if snapshots is not None:
            return Found(absolute(name), snapshots)
        raise UsageError(f"{shown(name)} cannot be read from here")
    unreadable = ""
    try:
        for file in _open_files(pid):
            snapshots = _holding(file, taken)
            if snapshots is not None:
                return Found(_name_of(file, pid, name), snapshots)
    except OSError as e:
        unreadable = f"its open files are not to be seen from here ({reason(e)})"
    if os.path.isabs(name):
        snapshots = _holding(name, taken)
        if snapshots is not None:
            return Found(name, snapshots)
    raise UsageError(unreadable or "no file that it has open can be read from here and has it")


def holding(pid: int, taken: dict[str, Any]) -> list[str]:
    """Paths that lead to the open files of a process that have a snapshot, of which there are
    several when it was taken of several disks.  Raises OSError for who may not know them."""
    return [file for file in _open_files(pid) if _holding(file, taken) is not None]


def _open_files(pid: int) -> Iterator[str]:
    """Paths that lead to the regular files and block devices that a process has open, each once.
    Raises OSError for who may not know them."""
    directory = f"/proc/{pid}/fd"
    seen = set()
    for number in sorted(os.listdir(directory), key=int):
        file = os.path.join(directory, number)
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            status = os.stat(file)
            if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
                if inode(status) not in seen:
                    yield file
                seen.add(inode(status))


def _holding(path: str, taken: dict[str, Any]) -> tuple[Snapshot, ...] | None:
    """All snapshots of an image, if this one is among them."""
    wanted = (taken["id"], taken["name"], taken["date-sec"], taken["date-nsec"])
    try:
        storage = RemoteFile(path) if is_uri(path) else open_storage(path)
        with contextlib.closing(storage):
            read_header(storage)
            snapshots = read_table(storage).snapshots
    except Error:  # no image, or none for us to read
        return None
    has = any(
        (listed("id", s.id), listed("name", s.name), s.date_sec, s.date_nsec) == wanted
        for s in snapshots
    )
    return snapshots if has else None


def _name_of(file: str, pid: int, name: str) -> str:
    """A path of an open file that leads to it from here too: QEMU's own if possible, since
    that of a device lasts longer than the kernel's (``/dev/mapper/x``, ``/dev/dm-3``).

    Raises UsageError when it has none.
    """
    itself = inode(os.stat(file))
    kernels = os.readlink(file)
    for path in (os.path.join(os.readlink(f"/proc/{pid}/cwd"), name), kernels):
        with contextlib.suppress(OSError, ValueError):
            if inode(os.stat(path)) == itself:
                return path
    raise UsageError(f"the file that it has open has no name here: it was {shown(kernels)}")
