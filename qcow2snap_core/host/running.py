"""Deleting snapshots of an image that a running QEMU has open, by QMP.

Which of the devices has the image is told by their lists of snapshots, with dates and clocks.  A
snapshot that was taken of several disks is one of that name on each: on the further devices that
were named it is deleted as well.

A saved machine is deleted as QEMU does it, on all disks by one job (``snapshot-delete``), where its
name alone means it; the storage daemon has no such job.  Everything else is deleted by ID and name
(``blockdev-snapshot-delete-internal-sync``).
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from ..errors import UsageError, shown
from ..format.snapshots import Snapshot
from ..image.image import Image
from ..storage.libnbd import is_uri
from ..storage.local import inode
from .delete import called, ensure_named
from .names import fits, is_found, listed
from .nodes import Node, ensure_qcow2, file_name, nodes
from .openfiles import holding
from .qmp import Qmp, QmpError, refusal, shaped

_DELETE: Final = "blockdev-snapshot-delete-internal-sync"
_COMMANDS: Final = "query-commands"
_JOB: Final = "snapshot-delete"
_JOBS: Final = "query-jobs"
_PAUSE: Final = 0.02  # seconds, between two looks at a job
_APART: Final = 60  # seconds, that the parts of one snapshot on several disks may be


class RunningQemu:
    """A QEMU that has an image open as one of some devices."""

    def __init__(self, qemu: Qmp, image: Image, devices: Sequence[str]) -> None:
        """Raises UsageError when none of the devices is the image, QmpError."""
        self._qemu = qemu
        self._devices = devices
        there = self._nodes()
        names = [there[device]["node-name"] for device in devices]
        if len(set(names)) < len(names):
            raise UsageError("a device is given twice: name each one once")
        self._device = _device_of(image, there, devices)
        _ensure_open(qemu, there[self._device], image)
        self._others = [device for device in devices if device != self._device]
        commands = shaped(_COMMANDS, qemu.execute(_COMMANDS), [{"name": str}])
        self._has_job = any(command["name"] == _JOB for command in commands)

    def _nodes(self) -> dict[str, Node]:
        """Those that QEMU has now, the devices that were named among them."""
        there = nodes(self._qemu)
        ensure_qcow2(there, self._devices)
        return there

    def ensure_exact(self, there: Sequence[Snapshot], snapshot: Snapshot) -> None:
        """Here, and on the other devices, which are asked."""
        _ensure_found(there, snapshot)
        known = self._nodes()
        for device in self._others:
            self._part(known[device], device, snapshot)

    def delete(self, there: Sequence[Snapshot], snapshot: Snapshot) -> None:
        known = self._nodes()
        parts = {
            device: part
            for device in self._others
            if (part := self._part(known[device], device, snapshot)) is not None
        }
        with self._qemu.to_the_end():
            if snapshot.vm_state_size and self._has_job and _is_named(there, snapshot):
                self._by_job(snapshot.name, [known[d]["node-name"] for d in (*parts, self._device)])
            else:
                # The one that is looked at last: what fails before can be repeated.
                for device, part in parts.items():
                    self._qemu.execute(_DELETE, device=device, id=part["id"], name=part["name"])
                self._qemu.execute(_DELETE, device=self._device, **_words(snapshot))
            known = self._nodes()
        for device, part in parts.items():
            if part in _snapshots(known[device]):
                raise QmpError(f"{called(snapshot)} is still there on device {shown(device)}")

    def _by_job(self, name: str, names: Sequence[str]) -> None:
        job = f"qcow2snap-{secrets.token_hex(4)}"
        self._qemu.execute(_JOB, job_id=job, tag=name, devices=list(names))
        while True:
            shape = [{"id": str, "status": str}]
            jobs = shaped(_JOBS, self._qemu.execute(_JOBS), shape)
            state = next((j for j in jobs if j["id"] == job), None)
            if state is None:
                raise QmpError(f"{_JOB}: the job is gone, somebody else has dismissed it")
            if state["status"] == "concluded":
                break
            time.sleep(_PAUSE)
        self._qemu.execute("job-dismiss", id=job)
        if "error" in state:
            raise refusal(_JOB, state["error"])

    def _part(self, node: Node, device: str, snapshot: Snapshot) -> dict[str, Any] | None:
        """What another disk has of a snapshot, as SnapshotInfo.  Raises UsageError where that is
        not clear."""
        named = [s for s in _snapshots(node) if s["name"] == snapshot.name]
        if len(named) > 1:
            raise UsageError(
                f"device {shown(device)} has {len(named)} snapshots with the name of "
                f"{called(snapshot)}: prune it by itself first"
            )
        if named and abs(named[0]["date-sec"] - snapshot.date_sec) > _APART:
            raise UsageError(
                f"the snapshot {shown(snapshot.name)} on device {shown(device)} is of another time "
                f"than {called(snapshot)}: leave that device out"
            )
        return named[0] if named else None


def _device_of(image: Image, there: dict[str, Node], devices: Sequence[str]) -> str:
    """The one that has the image."""
    ours = [
        (
            listed("id", s.id),
            s.date_sec,
            s.date_nsec,
            s.vm_state_size,
            *divmod(s.vm_clock_nsec, 10**9),
        )
        for s in image.snapshots
    ]
    same = [d for d in devices if [_fields(s) for s in _snapshots(there[d])] == ours]
    if not same:
        names = " and ".join(map(shown, devices))
        raise UsageError(
            f"{names} {'have' if len(devices) > 1 else 'has'} other snapshots in QEMU than "
            f"{shown(image.path)}: name the device that has this file"
        )
    if not ours:
        raise UsageError(f"{shown(image.path)} has no snapshots any more")
    if len(same) > 1:  # disks of a machine that was saved, but for the one with its state
        same = [d for d in same if _leads_to(image, file_name(there[d]["image"]["filename"]))]
    if len(same) != 1:
        names = " and ".join(map(shown, devices))
        raise UsageError(f"{names} have the same snapshots: name only the one of this file")
    return same[0]


def _leads_to(image: Image, path: str) -> bool:
    """Whether QEMU's name for a file leads to the image from here."""
    with suppress(OSError, ValueError):
        return inode(os.stat(path)) == image.storage.inode
    return False


def _ensure_open(qemu: Qmp, node: Node, image: Image) -> None:
    """Raises UsageError when QEMU has another file with the same snapshots open, a copy; often that
    is not to be seen from here, and then the file itself tells after the first deletion."""
    if is_uri(image.path):
        return
    with suppress(OSError):
        files = holding(qemu.process(), _snapshots(node)[-1])
        if files and image.storage.inode not in {inode(os.stat(file)) for file in files}:
            opened = os.readlink(files[0])
            raise UsageError(f"QEMU has {shown(opened)} open: {shown(image.path)} is another file")


def _snapshots(node: Node) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node["image"].get("snapshots", [])
    return found


def _fields(s: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one from another; QEMU shows names only as far as they are UTF-8."""
    keys = "id", "date-sec", "date-nsec", "vm-state-size", "vm-clock-sec", "vm-clock-nsec"
    return tuple(s[key] for key in keys)


def _words(snapshot: Snapshot) -> dict[str, str]:
    """What QEMU is told; of a name that is not UTF-8, or too long, it cannot be."""
    if _can_be_told("name", snapshot.name):
        return {"id": snapshot.id, "name": snapshot.name}
    return {"id": snapshot.id}


def _ensure_found(there: Sequence[Snapshot], snapshot: Snapshot) -> None:
    """Raises UsageError unless these words lead to the snapshot."""
    if "\0" in snapshot.name + snapshot.id:
        raise UsageError(f"{called(snapshot)} cannot be told to QEMU, which reads up to the NUL")
    if not _can_be_told("id", snapshot.id):
        raise UsageError(f"{called(snapshot)} cannot be told to QEMU by such an ID")
    words = _words(snapshot)
    first = next(s for s in there if all(is_found(s, key, word) for key, word in words.items()))
    if first.identity != snapshot.identity:
        raise UsageError(f"{called(snapshot)} cannot be told to QEMU, {called(first)} comes first")


def _can_be_told(key: str, word: str) -> bool:
    """Whether QMP can say it, and QEMU finds it."""
    return fits(key, word) and word.encode("utf-8", "replace").decode("utf-8") == word


def _is_named(there: Sequence[Snapshot], snapshot: Snapshot) -> bool:
    try:
        ensure_named(there, snapshot)
    except UsageError:
        return False
    return _can_be_told("name", snapshot.name)
