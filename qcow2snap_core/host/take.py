"""Asking a running QEMU for a snapshot, so that it is complete in the file.

QEMU drains the guest's requests, writes its caches back and flushes before the snapshot is
listed (docs/live.md); so once the command has returned, everything the guest had written to its
disks is in it.  What the guest still had in its own memory is not: for that, the guest agent
freezes the filesystems around it.

Several disks are one QMP transaction: QEMU drains them all, and then takes all or none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple, Protocol

from ..errors import Error, UsageError, shown
from .nbdkit import nbdkit
from .openfiles import Found, find

_TAKE: Final = "blockdev-snapshot-internal-sync"
_LONGEST_NAME: Final = 255  # QEMUSnapshotInfo; of a longer one QEMU keeps the beginning


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


class Qemu(Protocol):
    """The monitor of a running QEMU."""

    def execute(self, command: str, **arguments: Any) -> Any:
        """What a command returns.  Raises QmpError."""

    def process(self) -> int:
        """The process; 0 if it is not to be seen from here."""


def take(qemu: Qemu, devices: Mapping[str, str], name: str, frozen: Frozen) -> list[Taken]:
    """Take an internal snapshot of all ``devices`` at one instant: their node or device names, by
    what the user calls them.

    ``frozen`` makes the context in which it is taken: the guest's filesystems are frozen in it.
    Raises UsageError, or QmpError with QEMU's reason; then no snapshot was taken.
    """
    if not name:
        raise UsageError("the snapshot's name is empty: give one")
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise UsageError(f"the snapshot's name is longer than the {_LONGEST_NAME} bytes of QEMU's")
    names = list(devices.values())
    _check(_nodes(qemu), names)
    with frozen():
        if len(names) == 1:
            qemu.execute(_TAKE, device=names[0], name=name)
        else:
            actions = [{"type": _TAKE, "data": {"device": d, "name": name}} for d in names]
            qemu.execute("transaction", actions=actions)
    nodes = _nodes(qemu)
    return [_taken(qemu, called, name, nodes[d]["image"]) for called, d in devices.items()]


def _taken(qemu: Qemu, device: str, name: str, image: dict[str, Any]) -> Taken:
    file = _file_name(image["filename"])
    snapshots = [s for s in image.get("snapshots", ()) if s["name"] == name]
    if not snapshots:
        return Taken(device, name, file, None, "it has been deleted again")
    try:
        return Taken(device, name, file, find(qemu.process(), file, snapshots[-1]))
    except UsageError as e:
        return Taken(device, name, file, None, str(e))


def _nodes(qemu: Qemu) -> dict[str, dict[str, Any]]:
    """What QEMU says of each node (BlockDeviceInfo), by the names that a device may be given."""
    nodes: dict[str, dict[str, Any]] = {}
    for node in qemu.execute("query-named-block-nodes"):
        nodes[node["node-name"]] = node
    # The storage daemon has nodes alone; a machine also has devices (-drive id=...).
    with contextlib.suppress(Error):
        for device in qemu.execute("query-block"):
            if device.get("inserted"):
                nodes.setdefault(device["device"], device["inserted"])
    return nodes


def _check(nodes: dict[str, dict[str, Any]], devices: Sequence[str]) -> None:
    """Raises UsageError for a device that is not there or cannot have snapshots."""
    for device in devices:
        if device not in nodes:
            known = ", ".join(sorted(n for n, x in nodes.items() if x.get("drv") == "qcow2" and n))
            more = "; a snapshot has one name, what is before it is a device" * (len(devices) > 1)
            raise UsageError(
                f"QEMU has no device {shown(device)}: its qcow2 ones are {known}{more}"
            )
        if nodes[device].get("drv") != "qcow2":
            raise UsageError(
                f"device {shown(device)} is {nodes[device].get('drv')}, not qcow2: "
                f"only qcow2 holds internal snapshots"
            )


def _file_name(name: str) -> str:
    """The path in QEMU's name of an image, which may be a tree of options."""
    if name.startswith("json:"):
        tree = json.loads(name.removeprefix("json:"))
        while isinstance(tree.get("file"), dict):
            tree = tree["file"]
        return str(tree.get("filename", tree.get("file.filename", name)))
    return name.removeprefix("file:")
