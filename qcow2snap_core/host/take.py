"""Asking a running QEMU for a snapshot, so that it is complete in the file.

QEMU drains the guest's requests, writes its caches back and flushes before the snapshot is
listed (docs/live.md); so once the command has returned, everything the guest had written to its
disks is in it.  What the guest still had in its own memory is not: for that, the guest agent
freezes the filesystems around it.

Several disks are one QMP transaction: QEMU drains them all, and then takes all or none.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

from ..errors import Error, UsageError, shown
from .names import LONGEST, fits
from .nbdkit import nbdkit
from .nodes import Qemu, ensure_qcow2, file_name, nodes
from .openfiles import Found, find
from .qmp import NotThawed

_TAKE: Final = "blockdev-snapshot-internal-sync"


Frozen = Callable[[], AbstractContextManager[object]]


class Taken(NamedTuple):
    """A snapshot that was taken."""

    device: str
    name: str
    file: str  # as QEMU calls the image
    found: Found | None
    unknown: str = ""  # why the image was not found

    def command(self) -> str | None:
        """The shell command that serves it, if the image was found."""
        if self.found is None:
            return None
        # snapshot= looks for an ID first; a name that is one must be called a name.
        is_id = any(s.id == self.name for s in self.found.snapshots)
        key = "snapshot-name" if is_id else "snapshot"
        return shlex.join([*nbdkit(), f"file={self.found.path}", f"{key}={self.name}"])


def take(
    qemu: Qemu, devices: Mapping[str, str], name: str, frozen: Frozen
) -> tuple[list[Taken], NotThawed | None]:
    """Take an internal snapshot of all ``devices`` at one instant: their node or device names, by
    what the user calls them.

    ``frozen`` makes the context in which it is taken: the guest's filesystems are frozen in it.
    Raises UsageError, or QmpError with QEMU's reason; then no snapshot was taken.  That the guest
    was not thawed after it had been is returned.
    """
    if not name:
        raise UsageError("the snapshot's name is empty: give one")
    if not fits("name", name):
        most = LONGEST["name"]
        raise UsageError(f"the snapshot's name is longer than the {most} bytes of QEMU's")
    names = list(devices.values())
    more = "; a snapshot has one name, what is before it is a device" * (len(names) > 1)
    there = nodes(qemu)
    ensure_qcow2(there, names, more)
    is_taken, not_thawed, unknown = False, None, ""
    try:
        with frozen():
            _execute(qemu, names, name)
            is_taken = True
    except NotThawed as e:
        if not is_taken:
            raise
        not_thawed = NotThawed(f"the snapshot {shown(name)} was taken, but {e}")
    try:
        now = nodes(qemu)
        ensure_qcow2(now, names)
        there = now
    except Error as e:
        unknown = str(e)
    images = {called: there[device]["image"] for called, device in devices.items()}
    return [_taken(qemu, *each, name, unknown) for each in images.items()], not_thawed


def _execute(qemu: Qemu, names: Sequence[str], name: str) -> None:
    if len(names) == 1:
        qemu.execute(_TAKE, device=names[0], name=name)
    else:
        actions = [{"type": _TAKE, "data": {"device": d, "name": name}} for d in names]
        qemu.execute("transaction", actions=actions)


def _taken(qemu: Qemu, device: str, image: dict[str, Any], name: str, unknown: str) -> Taken:
    file = file_name(image["filename"])
    if unknown:
        return Taken(device, name, file, None, unknown)
    snapshots = [s for s in image.get("snapshots", ()) if s["name"] == name]
    if not snapshots:
        return Taken(device, name, file, None, "it has been deleted again")
    try:
        return Taken(device, name, file, find(qemu.process(), file, snapshots[-1]))
    except UsageError as e:
        return Taken(device, name, file, None, str(e))
