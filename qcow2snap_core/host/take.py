"""Asking a running QEMU for a snapshot, so that it is complete in the file.

QEMU drains the guest's requests, writes its caches back and flushes before the snapshot is
listed (docs/live.md); so once the command has returned, everything the guest had written to its
disks is in it.  What the guest still had in its own memory is not: for that, the guest agent
freezes the filesystems around it.

Several disks are one QMP transaction: QEMU drains them all, and then takes all or none.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

from ..errors import UsageError
from .names import LONGEST, fits
from .nbdkit import nbdkit
from .nodes import Qemu, ensure_qcow2, file_name, nodes
from .openfiles import Found, find

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


def take(qemu: Qemu, devices: Mapping[str, str], name: str, frozen: Frozen) -> list[Taken]:
    """Take an internal snapshot of all ``devices`` at one instant: their node or device names, by
    what the user calls them.

    ``frozen`` makes the context in which it is taken: the guest's filesystems are frozen in it.
    Raises UsageError, or QmpError with QEMU's reason; then no snapshot was taken.
    """
    if not name:
        raise UsageError("the snapshot's name is empty: give one")
    if not fits("name", name):
        most = LONGEST["name"]
        raise UsageError(f"the snapshot's name is longer than the {most} bytes of QEMU's")
    names = list(devices.values())
    more = "; a snapshot has one name, what is before it is a device" * (len(names) > 1)
    ensure_qcow2(nodes(qemu), names, more)
    with frozen():
        if len(names) == 1:
            qemu.execute(_TAKE, device=names[0], name=name)
        else:
            actions = [{"type": _TAKE, "data": {"device": d, "name": name}} for d in names]
            qemu.execute("transaction", actions=actions)
    there = nodes(qemu)
    return [_taken(qemu, called, name, there[d]["image"]) for called, d in devices.items()]


def _taken(qemu: Qemu, device: str, name: str, image: dict[str, Any]) -> Taken:
    file = file_name(image["filename"])
    snapshots = [s for s in image.get("snapshots", ()) if s["name"] == name]
    if not snapshots:
        return Taken(device, name, file, None, "it has been deleted again")
    try:
        return Taken(device, name, file, find(qemu.process(), file, snapshots[-1]))
    except UsageError as e:
        return Taken(device, name, file, None, str(e))
