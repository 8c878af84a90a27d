"""The names under which snapshots are exported.

An NBD export name is UTF-8 of at most 4096 bytes and should mean one thing; a snapshot's name is
any bytes at all, and QEMU does not even keep it unique.  So a snapshot goes by its name where
that is a good export name and nobody else's name or ID, and by its ID otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..errors import UsageError, escaped, shown
from ..format.choosing import did_you_mean, summary
from ..format.snapshots import Snapshot, date
from ..typed import Final, NamedTuple
from ..util.units import binary

MAX_EXPORT_NAME: Final = 4096  # bytes, NBD's limit for any string
VM_STATE: Final = "/vmstate"


class Export(NamedTuple):
    """What one export name leads to."""

    name: str
    snapshot: Snapshot
    vm_state: bool = False  # the saved state of the machine instead of the disk

    @property
    def description(self) -> str:
        """ID, date, disk size, VM-state size."""
        s = self.snapshot
        return f"{escaped(s.id, 255)}, {date(s)}, {binary(s.disk_size)}, {binary(s.vm_state_size)}"


def exports_of(snapshots: Sequence[Snapshot]) -> list[Export]:
    """Every export, in the table's order, a VM state behind its disk.

    A snapshot whose name and ID are both unusable has none; QEMU makes no such image.
    """
    names = Counter(s.name for s in snapshots)
    ids = {s.id: s for s in reversed(snapshots)}  # of equal IDs the first counts, as for QEMU
    disks: dict[str, Snapshot] = {}
    for s in snapshots:
        unique = names[s.name] == 1 and ids.get(s.name, s) is s
        if unique and _usable(s.name):
            disks[s.name] = s
        elif ids[s.id] is s and _usable(s.id):
            disks[s.id] = s
    exports: list[Export] = []
    taken = set(disks)
    for name, s in disks.items():
        exports.append(Export(name, s))
        if s.vm_state_size:
            for state in (name + VM_STATE, s.id + VM_STATE):
                if state not in taken and _usable(state):
                    taken.add(state)
                    exports.append(Export(state, s, vm_state=True))
                    break
    return exports


def default(exports: Iterable[Export]) -> str | None:
    """The name that the default export name stands for: the only disk's, if there is one."""
    disks = [e.name for e in exports if not e.vm_state]
    return disks[0] if len(disks) == 1 else None


def find(exports: Sequence[Export], snapshots: Sequence[Snapshot], name: str) -> Export:
    """What an export name opens: a name in the list, else an ID.

    Raises UsageError that lists what there is.
    """
    wanted = name or default(exports)
    for export in exports:
        if export.name == wanted:
            return export
    for s in snapshots:
        if s.id == wanted:
            return Export(name, s)
    asked = f"no export {shown(name)}" if name else "no default export, name one"
    meant = did_you_mean(name, snapshots) if name else ""
    raise UsageError(f"there is {asked}: {meant}{summary(snapshots)}")


def _usable(name: str) -> bool:
    if not name or "\0" in name:
        return False
    try:
        return len(name.encode()) <= MAX_EXPORT_NAME
    except UnicodeEncodeError:  # surrogateescape: it was not UTF-8
        return False
