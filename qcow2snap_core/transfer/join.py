"""An external chain to one image, with a snapshot of each of its layers, base first.

The snapshots of a chain that split made, and that nobody has changed since, are what they were in
the image that was split, and the active disk is no snapshot: :mod:`.manifest` says so beside the
chain.  Of all other layers only the files' names are known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final, NamedTuple

from ..errors import Error, UsageError, shown
from ..format import ondisk as q
from ..format.snapshot_table import read_table
from ..format.snapshots import Snapshot
from ..image.disk import Disk
from ..image.image import Image
from ..image.layers import Layer, RawLayer
from ..storage.local import Storage
from ..storage.locks import ensure_not_written
from ..util.progress import progress
from . import manifest
from .assembly import Member, amount, assemble, check_members, compare_assembled, free_ids
from .chains import check_source
from .job import Warn, warn_of_encryption
from .judge import Kind, Place
from .manifest import Entry, Stored, open_in
from .mover import RawSource, whole
from .outputs import output, permissions
from .overlays import data_of, shape_of, size_and_digest, streams_of
from .verify import State, reading

JOIN_TARGETS: Final = Kind.FILE


class _Recorded(NamedTuple):
    """What is known of a chain that split made."""

    entries: dict[int, Entry]  # by the number of the layer, the base being 0
    first: int  # what is below belongs to the first state, and is none of its own
    ends_active: bool  # the last layer is the active disk, and no snapshot
    directory: str = ""


def join(top: Image, place: Place, warn: Warn, verify: bool = True) -> list[str]:
    """Make one image of the chain below and with ``top``; returns its snapshots, base first.

    With ``verify`` it is compared with the source before it gets its name.
    Raises UsageError before anything is written when that cannot be done.
    """
    out = place.name
    check_source(top, place)
    warn_of_encryption(top, warn)
    with ExitStack() as opened:
        members = _members(top, warn, opened)
        with output(out, most=permissions(top.files), replace=place.replace) as part:
            shape = shape_of(top)
            total = check_members(members, shape, part, out)
            with progress("joining", total) as bar:
                assemble(part, out, shape, members, bar)
            ensure_not_written(top.files, "")
            if verify:
                with progress("comparing", amount(members)) as bar:
                    compare_assembled(part, out, members, reading(top), bar)
                ensure_not_written(top.files, "")
    return [m.snapshot.name for m in members if m.snapshot is not None]


def _members(top: Image, warn: Warn, opened: ExitStack) -> list[Member]:
    """What the chain's layers become; the files of VM states are open for as long as ``opened``."""
    chain = top.chain[::-1]
    recorded = _recorded(chain, warn)
    members: list[Member] = []
    for number, (storage, layer) in enumerate(chain[recorded.first :], recorded.first):
        if isinstance(layer, Disk) and read_table(storage).snapshots:
            warn(f"the snapshots inside {shown(storage.path)} are not carried over")
        if layer.size % q.SECTOR:
            raise UsageError(
                f"{shown(storage.path)} has {layer.size} bytes, which are no whole number of "
                f"sectors: make it longer first, truncate -s %{q.SECTOR} does it"
            )
        name = os.path.splitext(os.path.basename(storage.path))[0]
        entry = recorded.entries.get(number)
        snapshot: Snapshot | None = None
        vm_state: State | None = None
        if entry is not None:
            snapshot = entry.snapshot
            if entry.vm_state is not None:
                vm_state = _vm_state(recorded.directory, entry.vm_state, opened)
        elif number < len(chain) - 1 or not recorded.ends_active:
            snapshot = _new_snapshot(name, layer.size, [m.snapshot for m in members if m.snapshot])
        members.append(_member(top, name, layer, len(members), snapshot, vm_state))
    return members


def _member(
    top: Image,
    name: str,
    layer: Layer,
    number: int,
    snapshot: Snapshot | None,
    vm_state: State | None,
) -> Member:
    below = number - 1 if number else None
    if isinstance(layer, RawLayer):
        raw = RawSource(layer)
        state = State(name, layer.size, raw, raw.plan)
        return Member(snapshot, state, below, lambda: data_of(raw.plan()))
    assert isinstance(layer, Disk)
    disk = layer
    state = State(name, disk.size, disk, lambda: whole(disk))
    plan = (lambda: data_of(whole(disk))) if below is None else disk.own
    return Member(snapshot, state, below, plan, streams_of(disk, shape_of(top)), vm_state)


def _new_snapshot(name: str, size: int, before: Sequence[Snapshot]) -> Snapshot:
    """What the entry of a layer says of which only the name is known."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return Snapshot(
        id=next(free_ids(s.id for s in before)),
        name=name,
        date_sec=seconds,
        date_nsec=nanoseconds,
        vm_clock_nsec=0,
        vm_state_size=0,
        disk_size=size,
        icount=None,
        l1_table_offset=0,
        l1_size=0,
        entry_offset=0,
        entry_length=0,
        extra_data_size=q.EXTRA_ICOUNT.stop,
    )


def _recorded(chain: Sequence[tuple[Storage, Layer]], warn: Warn) -> _Recorded:
    """What the manifest beside the topmost layer says of the chain, unless one of the files is not
    what it was any more: then nothing is believed of it, and that is said."""
    nothing = _Recorded({}, 0, False)
    paths = [os.path.realpath(storage.absolute) for storage, _ in chain]
    directory = os.path.dirname(paths[-1])
    if not os.path.lexists(os.path.join(directory, manifest.NAME)):
        return nothing
    advice = "the snapshots are named after their files"
    try:
        found = manifest.read(directory)
    except Error as e:
        warn(f"{e}: {advice}")
        return nothing
    files = [os.path.relpath(path, directory) for path in paths]
    known = found.by_file
    entries = {number: known[file] for number, file in enumerate(files) if file in known}
    with progress("checking", sum(entry.disk.size for entry in entries.values())) as bar:
        for number, entry in entries.items():
            below = files[number - 1] if number - 1 in entries else None
            storage, layer = chain[number]
            described = entry.disk.size, entry.disk.sha256
            fits = entry.parent == below and entry.snapshot.disk_size == layer.size
            if not fits or size_and_digest(storage, bar) != described:
                warn(f"{shown(paths[number])} was changed since {manifest.NAME} was made: {advice}")
                return nothing
    ends_active = files[-1] == found.active
    top = len(files) - 1
    first = min(entries, default=top if ends_active else 0)
    return _Recorded(entries, first, ends_active, directory)


def _vm_state(directory: str, known: Stored, opened: ExitStack) -> State:
    """Raises UsageError when the file is not what it was."""
    storage = open_in(directory, known.file)
    opened.callback(storage.close)
    with progress("checking", known.size) as bar:
        if size_and_digest(storage, bar) != (known.size, known.sha256):
            raise UsageError(
                f"{shown(storage.path)} was changed since {manifest.NAME} was made: bring it back, "
                f"or remove {manifest.NAME} to join without what it says"
            )
    raw = RawSource(RawLayer(storage))
    return State(known.file, known.size, raw, raw.plan)
