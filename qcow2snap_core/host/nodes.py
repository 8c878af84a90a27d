"""What a running QEMU has as disks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from ..errors import Error, UsageError, escaped, shown
from .qmp import shaped

#: BlockDeviceInfo of QEMU's QAPI
Node = dict[str, Any]

# What is used of QEMU's answers; of a snapshot, all of SnapshotInfo that is in the table.
_TIMES: Final = "vm-state-size", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"
_SNAPSHOT: Final = {"id": str, "name": str} | dict.fromkeys(_TIMES, int)
_NODE: Final = {
    "node-name": str,
    "drv": str,
    "image": {"filename": str, "snapshots?": [_SNAPSHOT]},
}
_DEVICE: Final = {"device": str, "qdev?": str, "inserted?": _NODE}


class Qemu(Protocol):
    """The monitor of a running QEMU."""

    def execute(self, command: str, **arguments: Any) -> Any:
        """What a command returns.  Raises QmpError."""

    def process(self) -> int:
        """The process; 0 if it is not to be seen from here."""


def nodes(qemu: Qemu) -> dict[str, Node]:
    """What QEMU says of each node, by the names that a device may be given."""
    found: dict[str, Node] = {}
    command = "query-named-block-nodes"
    for node in shaped(command, qemu.execute(command), [_NODE]):
        found[node["node-name"]] = node
    # The storage daemon has nodes alone; a machine also has devices (-drive id=...).
    answer: Any = []
    with contextlib.suppress(Error):
        answer = qemu.execute("query-block")
    for device in devices(answer):
        if "inserted" in device:
            found.setdefault(device["device"], device["inserted"])
    return found


def devices(answer: Any) -> list[dict[str, Any]]:
    """What ``query-block`` has answered: BlockInfo of QEMU's QAPI."""
    found: list[dict[str, Any]] = shaped("query-block", answer, [_DEVICE])
    return found


def ensure_qcow2(there: Mapping[str, Node], devices: Sequence[str], advice: str = "") -> None:
    """Raises UsageError for a device that is not there or cannot have snapshots; ``advice`` ends
    the line in the former case."""
    for device in devices:
        if device not in there:
            known = sorted(n for n, x in there.items() if x["drv"] == "qcow2" and n)
            names = ", ".join(map(escaped, known))
            raise UsageError(
                f"QEMU has no device {shown(device)}: its qcow2 ones are {names}{advice}"
            )
        if there[device]["drv"] != "qcow2":
            raise UsageError(
                f"device {shown(device)} is {escaped(there[device]['drv'])}, not qcow2: only qcow2 "
                f"holds internal snapshots"
            )


def file_name(name: str) -> str:
    """The path in QEMU's name of an image, which may be a tree of options."""
    if name.startswith("json:"):
        try:
            tree = json.loads(name.removeprefix("json:"))
        except (ValueError, RecursionError):  # QEMU cuts a long one off, and ends it with dots
            return name
        if not isinstance(tree, dict):
            return name
        while isinstance(tree.get("file"), dict):
            tree = tree["file"]
        return str(tree.get("filename", tree.get("file.filename", name)))
    return name.removeprefix("file:")
