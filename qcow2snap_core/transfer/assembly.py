"""One image of many states, each with what a snapshot's entry says of it: what join and restore
make.

A state is written over another one that it differs from in little.  So it is compared, too: the
first one whole, and each further one where it, or what was written, differs from that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

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


def free_id(ids: Iterable[str]) -> int:
    """The number that a new snapshot gets as its ID (QEMU: find_new_snapshot_id)."""
    numbers = [int(id_) for id_ in ids if id_.isascii() and id_.isdigit() and len(id_) < 20]
    return max(numbers, default=0) + 1
