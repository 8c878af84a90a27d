"""What is odd about the entries of a snapshot table that can be parsed.

QEMU opens and lists such images, and so do we: each entry is shown and served as it stands.  No
QEMU writes one like these, though.  Zeros that the header counts as entries look like this, and so
do tables that another program has made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from ..errors import escaped, shown
from . import ondisk as q
from .header import Header
from .snapshots import Snapshot

_RECORDS_SIZE: Final = q.EXTRA_DISK_SIZE.stop  # bytes of extra data


def oddities(snapshots: Sequence[Snapshot], header: Header) -> Iterator[tuple[Snapshot, str]]:
    """(entry, a line that says which one it is and what is odd); ``snapshots`` are all there
    are."""
    times = Counter(s.id for s in snapshots)
    for number, s in enumerate(snapshots, 1):
        for wrong in _oddities_of(s, header, times[s.id]):
            yield s, f"entry {number} of the snapshot table, {_name(s)}, {wrong}"


def _name(s: Snapshot) -> str:
    return f"snapshot {shown(s.name)} (ID {escaped(s.id)})"


def _oddities_of(s: Snapshot, header: Header, times: int) -> Iterator[str]:
    """``times``: how many entries have its ID."""
    if not s.id:
        yield "has an empty ID"
    elif times > 1:
        yield f"has the same ID as {times - 1} other{'s' * (times > 2)}"
    entry = q.L2_ENTRY_SIZE << header.extended_l2
    recorded = s.extra_data_size >= _RECORDS_SIZE
    if header.version >= 3 and not recorded:  # QEMU: qcow2_check_fix_snapshot_table, "incomplete"
        yield (
            f"has {s.extra_data_size} bytes of extra data, too few to record its disk's size, "
            f"which version 3 requires"
        )
    reach = s.l1_size * (header.cluster_size // entry << header.cluster_bits)
    if s.disk_size and not s.l1_size:
        yield f"has no L1 table for its disk of {s.disk_size} bytes"
    elif recorded and s.disk_size > reach:
        yield f"has an L1 table that ends at {reach} of the {s.disk_size} bytes of its disk"
