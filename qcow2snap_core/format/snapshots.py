"""One entry of the snapshot table: what it says of a snapshot, and what makes it this one."""

from __future__ import annotations

import time

from ..typed import NamedTuple
from . import ondisk as q


class Identity(NamedTuple):
    """What makes a snapshot this one and no other: all of its entry that never changes.

    Extra data is left out: QEMU adds some to old entries whenever it rewrites the table.
    """

    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    l1_table_offset: int
    l1_size: int


class Snapshot(NamedTuple):
    """One entry of the table; sizes in bytes.  A tuple, because a table may have 65,536."""

    id: str
    name: str  # not UTF-8: surrogateescape
    date_sec: int  # seconds since the epoch
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int  # of an old entry that does not record it: the active disk's
    icount: int | None
    l1_table_offset: int
    l1_size: int  # entries
    entry_offset: int  # host offset of the entry itself
    entry_length: int  # without the padding
    extra_data_size: int

    @property
    def identity(self) -> Identity:
        return Identity(
            self.id,
            self.name,
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            self.l1_table_offset,
            self.l1_size,
        )

    @property
    def records_size(self) -> bool:
        """Whether the entry itself says how large the disk is, as those of old QEMUs do not."""
        known: int = q.EXTRA_DISK_SIZE.stop
        return self.extra_data_size >= known


def date(snapshot: Snapshot) -> str:
    """When it was taken, in local time as ``qemu-img snapshot -l`` shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_sec))
