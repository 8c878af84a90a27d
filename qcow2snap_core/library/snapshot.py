"""One entry of the snapshot table, as users see it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ..errors import escaped, shown
from ..format.snapshots import Snapshot as Entry
from .names import public


@public
class Snapshot:
    """An internal snapshot, of :attr:`.Image.snapshots` or :meth:`.Image.find`.

    Two are equal if they are the same entry of the table: a snapshot that was deleted and taken
    again under the same name and ID is another one.  The attributes never change.
    """

    __slots__ = ("_entry",)

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    @property
    def id(self) -> str:
        """The ID: a number, if QEMU chose it."""
        return self._entry.id

    @property
    def name(self) -> str:
        """The name, which may be empty, or be that of another snapshot too.  Bytes that are not
        UTF-8 are decoded as by ``os.fsdecode``."""
        return self._entry.name

    @property
    def date(self) -> datetime:
        """When it was taken: UTC, to the microsecond."""
        whole = datetime.fromtimestamp(self._entry.date_sec, UTC)
        return whole + timedelta(microseconds=self._entry.date_nsec // 1000)

    @property
    def vm_clock_nsec(self) -> int:
        """For how long the virtual machine had been running, in nanoseconds."""
        return self._entry.vm_clock_nsec

    @property
    def icount(self) -> int | None:
        """How many instructions the machine had run, or None if QEMU did not count them."""
        return self._entry.icount

    @property
    def disk_size(self) -> int:
        """Bytes.  Old QEMUs did not record the size; then it is that of the active disk."""
        return self._entry.disk_size

    @property
    def vm_state_size(self) -> int:
        """Bytes of the machine's saved state; 0 if there is none."""
        return self._entry.vm_state_size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        return self._entry.identity == other._entry.identity

    def __hash__(self) -> int:
        return hash(self._entry.identity)

    def __repr__(self) -> str:
        return f"<Snapshot {escaped(self.id)} {shown(self.name)} of {self.date}>"
