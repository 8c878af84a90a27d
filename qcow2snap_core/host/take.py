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
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from ..errors import Error, UsageError, shown
from ..image.opener import open_image
from .nbdkit import nbdkit
from .qmp import FrozenGuest, Qmp

_TAKE: Final = "blockdev-snapshot-internal-sync"


class Taken(NamedTuple):
    """A snapshot that was taken."""

    device: str
    path: str  # of the image
    name: str

    def command(self) -> str:
        """The shell command that serves it."""
        words = [*nbdkit(), f"file={self.path}", f"{_key(self.path, self.name)}={self.name}"]
        return shlex.join(words)


def take(socket: str, devices: Sequence[str], name: str, agent: str | None = None) -> list[Taken]:
    """Take an internal snapshot of all ``devices`` (node or device names) at one instant.

    ``agent`` is the socket of the guest's agent, to freeze its filesystems meanwhile.
    Raises UsageError, or QmpError with QEMU's reason; then no snapshot was taken.
    """
    if not name:
        raise UsageError("the snapshot's name is empty: give one")
    if len(set(devices)) < len(devices):
        raise UsageError("a --device is given twice: name each one once")
    with Qmp(socket) as qemu:
        paths = _paths(qemu, devices)
        with FrozenGuest(agent) if agent is not None else contextlib.nullcontext():
            if len(devices) == 1:
                qemu.execute(_TAKE, device=devices[0], name=name)
            else:
                actions = [{"type": _TAKE, "data": {"device": d, "name": name}} for d in devices]
                qemu.execute("transaction", actions=actions)
    return [Taken(device, path, name) for device, path in zip(devices, paths, strict=True)]


def _paths(qemu: Qmp, devices: Sequence[str]) -> list[str]:
    """The image file behind each node or device name, absolute."""
    nodes: dict[str, dict[str, Any]] = {}
    for node in qemu.execute("query-named-block-nodes"):
        nodes[node["node-name"]] = node
    # The storage daemon has nodes alone; a machine also has devices (-drive id=...).
    with contextlib.suppress(Error):
        for device in qemu.execute("query-block"):
            if device.get("inserted"):
                nodes.setdefault(device["device"], device["inserted"])
    found = []
    for device in devices:
        if device not in nodes:
            known = ", ".join(sorted(n for n, x in nodes.items() if x.get("drv") == "qcow2" and n))
            raise UsageError(f"QEMU has no device {shown(device)}: its qcow2 ones are {known}")
        if nodes[device].get("drv") != "qcow2":
            raise UsageError(
                f"device {shown(device)} is {nodes[device].get('drv')}, not qcow2: "
                f"only qcow2 holds internal snapshots"
            )
        path = _file_name(nodes[device]["image"]["filename"])
        found.append(os.path.join(qemu.working_directory(), path))
    return found


def _file_name(name: str) -> str:
    """The path in QEMU's name of an image, which may be a tree of options."""
    if name.startswith("json:"):
        tree = json.loads(name.removeprefix("json:"))
        while isinstance(tree.get("file"), dict):
            tree = tree["file"]
        return str(tree.get("filename", tree.get("file.filename", name)))
    return name.removeprefix("file:")


def _key(path: str, name: str) -> str:
    """``snapshot=`` looks for an ID first; a name that is one must be called a name."""
    try:
        with open_image(path) as image:
            return "snapshot-name" if any(s.id == name for s in image.snapshots) else "snapshot"
    except Error:  # encrypted, or seen from here elsewhere: whoever serves it will know
        return "snapshot"
