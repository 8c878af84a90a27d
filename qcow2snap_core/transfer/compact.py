"""A copy of an image with all its snapshots, and with nothing else.

``qemu-img convert`` copies one state, and an image from which snapshots were deleted never becomes
smaller.  The copy has every snapshot with its ID, name, dates, clock and VM state, the active disk,
and each cluster once (:mod:`.copier`); what is compressed stays compressed.

Before it gets its name, every state is read back.  The first is compared whole.  Of each further
one it is enough to compare where either image says that it differs from the one before: elsewhere
both are what was compared already.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Final, NamedTuple

from ..errors import ImageError, shown
from ..format import ondisk as q
from ..format.snapshot_table import Table
from ..format.snapshots import Snapshot
from ..image.disk import Disk
from ..image.image import Image
from ..image.opener import open_image
from ..storage.locks import ensure_not_written
from ..tables.diff import changes
from ..util.progress import Advance, progress
from .chains import BACKED_UP, check_source, kept_backing
from .compressors import COMPRESSIONS
from .copier import Copier
from .job import Warn, warn_of_encryption
from .judge import Kind, Place
from .mover import Plan, whole
from .newimage import NewImage, new_image
from .outputs import output, permissions
from .overlays import shape_of
from .room import check_space
from .shape import Shape
from .verify import State, check_described, check_sound, compare_state, reading

COMPACT_TARGETS: Final = Kind.FILE


def compact(
    image: Image, place: Place, warn: Warn, compress: str | None = None, verify: bool = True
) -> None:
    """Write the copy.  ``compress``, "zlib" or "zstd", compresses what is not compressed yet.

    With ``verify`` it is compared with the image before it gets its name.  Raises UsageError before
    anything is written when that cannot be done, otherwise what :meth:`.Disk.pread_into` raises and
    StorageError when the file cannot be written.
    """
    out = place.name
    check_source(image, place, BACKED_UP)
    table = image.table()
    if table.damage is not None:
        raise ImageError(f"the snapshot table of {shown(image.path)} is damaged: {table.damage}")
    _warn_of_losses(image, warn)
    shape = _shape(image, out, compress)
    with output(out, most=permissions(image.files), replace=place.replace) as part:
        tables = _measured(image, table)
        needed = os.stat(image.path).st_blocks * 512 + tables.size
        check_space(os.path.dirname(part), needed, f"compacting {shown(image.path)}")
        with new_image(part, out, shape) as new, progress("compacting", tables.span) as bar:
            copier = Copier(image, new, shape, compress is not None, bar)
            _write(image, table, new, copier)
        _check_unchanged(image, table)
        if verify:
            with open_image(part, reading(image, below=True)) as written:
                compare_images(image, written, table, out)
            _check_unchanged(image, table)


def _warn_of_losses(image: Image, warn: Warn) -> None:
    warn_of_encryption(image, warn)
    if image.header.autoclear & q.AUTOCLEAR_BITMAPS:
        warn(f"the bitmaps of {shown(image.path)} are not carried over")
    if image.header.has_data_file:
        warn("the external data file's content is carried over into the image itself")


def _shape(image: Image, out: str, compress: str | None) -> Shape:
    shape = shape_of(image)
    if image.header.backing_file is not None:
        shape = shape.over(kept_backing(image, os.path.dirname(os.path.realpath(out))))
    return shape if compress is None else shape._replace(compression=COMPRESSIONS[compress])


def _states(image: Image, table: Table) -> Iterator[tuple[Snapshot | None, Disk, Disk | None]]:
    """The snapshots and then the active disk: its entry, the disk, the VM state."""
    for s in table.snapshots:
        yield s, image.disk(s), image.disk(s, vm_state=True) if s.vm_state_size else None
    yield None, image.active_disk(), None


def _write(image: Image, table: Table, new: NewImage, copier: Copier) -> None:
    try:
        for snapshot, disk, vm_state in _states(image, table):
            l1 = copier.l1_table([disk] if vm_state is None else [disk, vm_state])
            if snapshot is None:
                new.finish(disk.size, l1)
            else:
                new.snapshot(snapshot, l1)
    finally:
        copier.close()


class _Tables(NamedTuple):
    """What the tables of all states are, in bytes."""

    span: int  # of the guest behind all L2 tables, each counted once: what the bar measures
    size: int  # that they will have in the copy


def _measured(image: Image, table: Table) -> _Tables:
    """Snapshots may share an L1 table, and disks that end in it the last L2 table: in the copy each
    has its own."""
    cluster = image.header.cluster_size
    span = clusters = 0
    met: set[int] = set()
    ends: set[tuple[int, int]] = set()
    for _, disk, vm_state in _states(image, table):
        span = disk.tables.bytes_per_l1_entry
        last = vm_state or disk
        clusters += -(-(last.base + last.size) // span) * q.L1_ENTRY_SIZE // cluster + 1
        l1 = disk.tables.l1_entries(0, disk.tables.l1_size)
        met.update(l1)
        full, rest = divmod(disk.size, span)
        if rest and full < len(l1):
            ends.add((l1[full], rest))
    met -= {0}
    return _Tables(span * len(met), cluster * (clusters + len(met) + len(ends)))


def _check_unchanged(image: Image, table: Table) -> None:
    """Raises UsageError when a QEMU has the image open by now, SnapshotGone when one is."""
    ensure_not_written(image.files, BACKED_UP)
    image.guard(table.snapshots).confirm()


# --- Comparing ---


def compare_images(image: Image, written: Image, table: Table, out: str) -> None:
    """Raises StorageError where the states of the two differ, in what is said of them or in a
    byte, and where the written one would not stand a write."""
    there = written.table()
    check_sound(written, out)  # a later write would find out
    check_described(table.snapshots, there, out)
    total = sum(disk.size for _, disk, _ in _states(image, table))
    total += sum(s.vm_state_size for s in table.snapshots)
    before: tuple[Disk, Disk] | None = None
    with progress("comparing", total) as advance:
        pairs = zip(_states(image, table), _states(written, there), strict=True)
        for (snapshot, old, old_vm), (_, new, new_vm) in pairs:
            name = "the active disk" if snapshot is None else f"snapshot {shown(snapshot.name)}"
            _compare(old, new, before, f"{name} of {shown(out)}", advance)
            if old_vm is not None and new_vm is not None:
                _compare(old_vm, new_vm, None, f"the VM state of {name} of {shown(out)}", advance)
            before = old, new


def _compare(
    old: Disk, new: Disk, before: tuple[Disk, Disk] | None, what: str, advance: Advance
) -> None:
    state = State("", old.size, old, partial(whole, old))
    differs: list[Plan] = []
    if before is not None:
        differs = [partial(changes, before[0], old), partial(changes, before[1], new)]
    compare_state(state, new, differs, what, advance)
