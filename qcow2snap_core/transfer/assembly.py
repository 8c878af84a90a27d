"""One image of many states, each with what a snapshot's entry says of it: what join and restore
make.

A state is written over another one that it differs from in little.  So it is compared, too: the
first one whole, and each further one where it, or what was written, differs from that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Final, NamedTuple

from ..errors import shown
from ..format.snapshots import Snapshot
from ..image.disk import Disk
from ..image.opener import Options, open_image
from ..tables.diff import changes
from ..util.progress import Advance
from .mover import Plan
from .newimage import new_image
from .overlays import spared
from .room import check_room
from .shape import Shape
from .states import StateWriter, Streams, Tables
from .verify import State, check_described, check_sound, compare_state

_LAST_NUMBER: Final = (1 << 64) - 1  # ULONG_MAX


class Member(NamedTuple):
    """A snapshot of the new image, or at the end its active disk."""

    snapshot: Snapshot | None  #: what its entry is to say; None for the active disk
    state: State
    below: int | None  #: the number of the member that it is written over
    plan: Plan  #: where it differs from that, or where there is none what of it is data
    streams: Streams | None = None
    vm_state: State | None = None


def assemble(
    part: str, name: str, shape: Shape, members: Sequence[Member], advance: Advance
) -> None:
    """Fill the empty file at ``part``, which is going to be called ``name``.  The active disk is
    the last member's.

    Raises what reading the members raises, StorageError when the file cannot be written.
    """
    with new_image(part, name, shape) as new:
        writer = StateWriter(new, shape, advance)
        try:
            done: list[Tables] = []
            for _, state, below, plan, streams, vm_state in members:
                base = None if below is None else done[below]
                done.append(writer.state(state.source, state.size, plan, base, streams))
                entry = members[len(done) - 1].snapshot
                if entry is not None:
                    l1 = done[-1].l1
                    if vm_state is not None:
                        l1 = writer.vm_state(
                            done[-1], vm_state.source, vm_state.size, vm_state.plan
                        )
                    new.snapshot(entry, l1)
        finally:
            writer.close()
        new.finish(done[-1].size, done[-1].l1)


def compare_assembled(
    part: str, name: str, members: Sequence[Member], options: Options, advance: Advance
) -> None:
    """Compare such a file with its members; ``options`` open it.  Raises StorageError where they
    differ, in what is said of them or in a byte, and what reading either raises."""
    with open_image(part, options) as image:
        check_sound(image, name)
        table = image.table()
        check_described([m.snapshot for m in members if m.snapshot is not None], table, name)
        there = iter(table.snapshots)
        found: list[Disk] = []
        for member in members:
            what = shown(name)
            if member.snapshot is None:
                found.append(image.active_disk())
            else:
                entry = next(there)
                found.append(image.disk(entry))
                what = f"snapshot {shown(entry.name)} of {what}"
                if member.vm_state is not None:
                    vm_state = image.disk(entry, vm_state=True)
                    compare_state(member.vm_state, vm_state, [], f"the VM state of {what}", advance)
            differs: list[Plan] = []
            if member.below is not None:
                differs = [member.plan, partial(changes, found[member.below], found[-1])]
            compare_state(member.state, found[-1], differs, what, advance)
        if members[-1].snapshot is not None:
            active = image.active_disk()
            differs = [partial(changes, found[-1], active)]
            compare_state(members[-1].state, active, differs, shown(name), lambda _: None)


def check_members(members: Sequence[Member], shape: Shape, part: str, name: str) -> int:
    """The bytes of data that are to be written.  Raises UsageError when there is no room for them
    where ``part`` is."""
    plans = [(m.state.size, m.plan) for m in members]
    plans += [(m.vm_state.size, m.vm_state.plan) for m in members if m.vm_state]
    disks = [(m.state.source, m.plan) for m in members if isinstance(m.state.source, Disk)]
    saved = sum(spared(disk, plan, shape) for disk, plan in disks)
    return check_room(plans, shape.cluster_size, os.path.dirname(part), shown(name), saved)


def amount(members: Iterable[Member]) -> int:
    """How many bytes comparing them goes through."""
    return sum(m.state.size + (m.vm_state.size if m.vm_state else 0) for m in members)


def free_ids(ids: Iterable[str]) -> Iterator[str]:
    """What new snapshots get as their IDs: the numbers behind the highest (QEMU:
    find_new_snapshot_id), but for those that are there.  Only behind the last number of 64 bits,
    where QEMU begins again at 0, there are such, and QEMU gives one ID twice."""
    taken = set(ids)
    highest = max(map(_number, taken), default=0)
    numbers = (str(n & _LAST_NUMBER) for n in count(highest + 1))
    return (number for number in numbers if number not in taken)


def _number(id_: str) -> int:
    """What strtoul makes of an ID."""
    found = re.match(r"[ \t\n\v\f\r]*([+-]?)0*([0-9]+)", id_)
    if found is None:
        return 0
    sign, digits = found.groups()
    number = int(digits) if len(digits) <= len(str(_LAST_NUMBER)) else _LAST_NUMBER + 1
    if number > _LAST_NUMBER:
        return _LAST_NUMBER
    return -number & _LAST_NUMBER if sign == "-" else number
