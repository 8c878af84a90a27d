"""The guard with one of its parts left out, each as a patch of our own code.

For each there is a history in which wrong bytes are returned, or a snapshot that is there is not
read.  One for which the simulation finds none would be a part that nobody needs, or a simulation
that is blind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from qcow2snap_core.errors import ImageError, SnapshotGone
from qcow2snap_core.format import snapshot_table
from qcow2snap_core.format.snapshot_table import TableFingerprint
from qcow2snap_core.format.snapshots import Identity, Snapshot
from qcow2snap_core.image import disk, guard
from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.guard import SnapshotGuard

LeftOut = Callable[[], AbstractContextManager[Any]]
_check, _read_once, _holds = SnapshotGuard.confirm, guard.read_table_once, TableFingerprint.holds


def _of(owner: object, name: str, new: object) -> LeftOut:
    return lambda: patch.object(owner, name, new)


def _checked_before(self: Disk, buffer: Any, offset: int) -> None:
    self._guard.confirm()
    self.fill(buffer, offset)


def _checked_unless_zeros(self: Disk, buffer: Any, offset: int) -> None:
    self.fill(buffer, offset)
    if any(buffer):
        self._guard.confirm()


def _checked_unless_it_failed(self: Disk, buffer: Any, offset: int) -> None:
    self.fill(buffer, offset)
    self._guard.confirm()


def _checked_every_other_time(self: SnapshotGuard) -> None:
    self.turn = not getattr(self, "turn", False)
    if self.turn:
        _check(self)


def _checked_in_the_middle(self: Disk, buffer: Any, offset: int) -> None:
    """When the tables were read and the data was not."""
    for _ in self._runs(offset, len(buffer)):
        pass
    self._guard.confirm()
    self.fill(buffer, offset)


def _any_change_is_the_end(self: SnapshotGuard) -> None:
    if self._fingerprint is not None and not self._fingerprint.holds(self._storage):
        raise SnapshotGone("something is different")
    _check(self)


def _table_first(self: TableFingerprint, storage: Any) -> bool:
    header, table, _ = self.expected
    return storage.holds((table, header))


def _entry_alone(self: TableFingerprint, storage: Any) -> bool:
    """Header and entry: not the entries before it."""
    header, (table, at), _ = self.expected
    begin = max(0, len(table) - 64)
    return storage.holds((header, (table[begin:], at + begin), header))


def _header_alone(self: TableFingerprint, storage: Any) -> bool:
    return storage.holds(self.expected[:1])


def _table_alone(self: TableFingerprint, storage: Any) -> bool:
    return storage.holds(self.expected[1:2])


def _count_alone(self: TableFingerprint, storage: Any) -> bool:
    (fields, at), table, _ = self.expected
    return storage.holds(((fields[:4], at), table, (fields[:4], at)))


def _header_and_table(self: TableFingerprint, storage: Any) -> bool:
    return storage.holds(self.expected[:2])


def _header_seen_once(storage: Any, wanted: Any = None) -> Any:
    return _read_once(storage, wanted)._replace(changed_during_read=False)


def _damage_is_the_end(storage: Any, wanted: Any = None) -> Any:
    table = _read_once(storage, wanted)
    if table.damage and not table.changed_during_read:
        raise SnapshotGone(table.damage)
    return table


def _damage_is_damage(storage: Any, wanted: Any = None) -> Any:
    table = _read_once(storage, wanted)
    if table.damage and not table.changed_during_read:
        raise ImageError(table.damage)
    return table


def _without_times(self: Snapshot) -> Identity:
    return Identity(self.id, self.name, 0, 0, 0, self.l1_table_offset, self.l1_size)


def _with_extra_data(self: Snapshot) -> tuple[Any, ...]:
    return (*_identity(self)[:5], self.l1_table_offset, (self.l1_size, self.extra_data_size))


def _with_its_place(self: Snapshot) -> tuple[Any, ...]:
    return (*_identity(self)[:6], (self.l1_size, self.entry_offset))


_identity = Snapshot.identity.fget

LEFT_OUT: dict[str, LeftOut] = {
    "no check": _of(SnapshotGuard, "confirm", lambda self: None),
    "checked before the read": _of(Disk, "pread_into", _checked_before),
    "checked between tables and data": _of(Disk, "pread_into", _checked_in_the_middle),
    "zeros are not checked": _of(Disk, "pread_into", _checked_unless_zeros),
    "extents are not checked": _of(disk, "confirmed", lambda found, *disks: found),
    "what failed is not checked": _of(Disk, "pread_into", _checked_unless_it_failed),
    "checked every other time": _of(SnapshotGuard, "confirm", _checked_every_other_time),
    "the header alone": _of(TableFingerprint, "holds", _header_alone),
    "the table alone": _of(TableFingerprint, "holds", _table_alone),
    "count and table, not the offset": _of(TableFingerprint, "holds", _count_alone),
    "header and entry, not the table up to it": _of(TableFingerprint, "holds", _entry_alone),
    "the table before the header": _of(TableFingerprint, "holds", _table_first),
    "the header before the table alone": _of(TableFingerprint, "holds", _header_and_table),
    "any change is the end": _of(SnapshotGuard, "confirm", _any_change_is_the_end),
    "a header seen once is trusted": _of(guard, "read_table_once", _header_seen_once),
    "a list whose header was seen once": _of(snapshot_table, "read_table_once", _header_seen_once),
    "missing once is gone": _of(guard, "_MISSING_FOR", 1),
    "missing twice is gone": _of(guard, "_MISSING_FOR", 2),
    "a damaged table means gone": _of(guard, "read_table_once", _damage_is_the_end),
    "a damaged table is not read again": _of(guard, "read_table_once", _damage_is_damage),
    "known without its times": _of(Snapshot, "identity", property(_without_times)),
    "known with its extra data": _of(Snapshot, "identity", property(_with_extra_data)),
    "known with its place": _of(Snapshot, "identity", property(_with_its_place)),
}
