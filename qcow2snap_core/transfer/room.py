"""Is there room for what is going to be written?  Asked before anything is."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..errors import UsageError, shown
from ..image.extents import ALLOCATED, merged
from ..util.interrupts import raise_if_interrupted
from ..util.units import binary
from .mover import Plan


def check_space(directory: str, needed: int, what: str) -> None:
    """Raises UsageError unless the directory's filesystem has that many bytes free."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise UsageError(
            f"{what} needs {binary(needed)}, {shown(directory)} has {binary(free)} free"
        )


def check_room(
    plans: Iterable[tuple[int, Plan]], cluster: int, directory: str, what: str, spared: int = 0
) -> int:
    """The bytes of data in plans for disks of a size, each of which goes into a qcow2 file, or over
    the one before in the same; ``spared`` are those that compressing saves.  Raises UsageError when
    the directory has no room for them."""
    per_table = cluster * cluster // 16  # what one L2 table maps, at the least
    data = needed = 0
    for size, plan in plans:
        clusters = 8 + size // per_table * 8 // cluster  # header, refcounts, L1 table
        last_table = -1
        for offset, length, kind in merged(plan()):
            raise_if_interrupted()
            last = (offset + length - 1) // per_table
            clusters += last - max(last_table, offset // per_table - 1)
            last_table = last
            if kind == ALLOCATED:
                data += length
                clusters += (offset + length - 1) // cluster - offset // cluster + 1
        needed += clusters * cluster * 513 // 512  # a refcount for each, of up to 16 bits
    check_space(directory, needed - spared, what)
    return data
