"""What a running QEMU has as disks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..errors import Error, UsageError, escaped, shown

#: BlockDeviceInfo of QEMU's QAPI
Node = dict[str, Any]


class Qemu(Protocol):
    """The monitor of a running QEMU."""

    def execute(self, command: str, **arguments: Any) -> Any:
        """What a command returns.  Raises QmpError."""

    def process(self) -> int:
        """The process; 0 if it is not to be seen from here."""


def nodes(qemu: Qemu) -> dict[str, Node]:
    """What QEMU says of each node, by the names that a device may be given."""
    found: dict[str, Node] = {}
    for node in qemu.execute("query-named-block-nodes"):
        found[node["node-name"]] = node
    # The storage daemon has nodes alone; a machine also has devices (-drive id=...).
    with contextlib.suppress(Error):
        for device in qemu.execute("query-block"):
            if device.get("inserted"):
                found.setdefault(device["device"], device["inserted"])
    return found


def ensure_qcow2(there: Mapping[str, Node], devices: Sequence[str], advice: str = "") -> None:
    """Raises UsageError for a device that is not there or cannot have snapshots; ``advice`` ends
    the line in the former case."""
    for device in devices:
        if device not in there:
            known = sorted(n for n, x in there.items() if x.get("drv") == "qcow2" and n)
            names = ", ".join(map(escaped, known))
            raise UsageError(
                f"QEMU has no device {shown(device)}: its qcow2 ones are {names}{advice}"
            )
        if there[device].get("drv") != "qcow2":
            raise UsageError(
                f"device {shown(device)} is {escaped(str(there[device].get('drv')))}, not qcow2: "
                f"only qcow2 holds internal snapshots"
            )


def file_name(name: str) -> str:
    """The path in QEMU's name of an image, which may be a tree of options."""
    if name.startswith("json:"):
        try:
            tree = json.loads(name.removeprefix("json:"))
        except ValueError:  # QEMU cuts a long one off, and ends it with dots
            return name
        while isinstance(tree.get("file"), dict):
            tree = tree["file"]
        return str(tree.get("filename", tree.get("file.filename", name)))
    return name.removeprefix("file:")
