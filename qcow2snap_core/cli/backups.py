"""A repository as ``qcow2snap list`` shows it."""

from __future__ import annotations

from ..errors import escaped, shown
from ..format.snapshots import date
from ..transfer.manifest import Entry, described
from ..transfer.repository import open_repository, stored_size
from ..util.units import binary
from .common import print_json
from .streams import say
from .text import print_table

_TITLES = ("FILE", "ID", "TAG", "VM SIZE", "DATE", "DISK SIZE", "STORED", "SINCE")
_NUMBERS = (3, 5, 6)


def print_repository(directory: str, json: bool) -> None:
    """Its snapshots, oldest first.  Raises as :func:`.open_repository`."""
    entries = open_repository(directory).entries
    if json:
        print_json(map(described, entries))
    elif entries:
        print_table([_TITLES, *map(_row, entries)], _NUMBERS)
    else:
        say(f"{shown(directory)} has no snapshots")


def _row(entry: Entry) -> tuple[str, ...]:
    s = entry.snapshot
    return (
        escaped(entry.disk.file),
        escaped(s.id),
        escaped(s.name),
        binary(s.vm_state_size),
        date(s),
        binary(s.disk_size),
        binary(stored_size([entry])),
        escaped(entry.parent or ""),
    )
