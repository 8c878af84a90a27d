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
from typing import Final

from ..errors import ImageError, StorageError, shown
from ..format import ondisk as q
from ..format.snapshot_table import Table
from ..format.snapshots import Snapshot
from ..image.disk import Disk
from ..image.extents import ALLOCATED, Extent
from ..image.image import Image
from ..image.opener import open_image
from ..storage.locks import ensure_not_written
from ..tables.check import check
from ..tables.diff import changes
from ..tables.findings import IN_PLACE, NOT_COUNTED, OVERLAP
from ..util.progress import Advance, progress
from .chains import check_local, kept_backing
from .compressors import COMPRESSIONS
from .copier import Copier
from .job import Warn, warn_of_encryption
from .judge import Kind, Place
from .mover import whole
from .newimage import NewImage, Shape
from .outputs import output, permissions
from .room import check_space
from .verify import check_size, compare, reading

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
    place.ensure_apart(image.files)
    check_local(image)
    ensure_not_written(image.files)
    table = image.table()
    if table.damage is not None:
        raise ImageError(f"the snapshot table of {shown(image.path)} is damaged: {table.damage}")
    _warn_of_losses(image, warn)
    shape = _shape(image, out, compress)
    with output(out, most=permissions(image.files), replace=place.replace) as part:
        needed = sum(os.stat(file.path).st_blocks * 512 for file in image.files[:1])
        check_space(os.path.dirname(part), needed, f"compacting {shown(image.path)}")
        fd = os.open(part, os.O_RDWR | os.O_CLOEXEC)
        try:
            _write(image, table, NewImage(out, fd, shape), shape, compress is not None)
        finally:
            os.close(fd)
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
    header = image.header
    backing = (b"", b"")
    if header.backing_file is not None:
        name, form = kept_backing(image, os.path.dirname(os.path.realpath(out)))
        backing = os.fsencode(name), form.encode()
    return Shape(
        header.cluster_bits,
        header.extended_l2,
        header.compression if compress is None else COMPRESSIONS[compress],
        *backing,
    )


def _states(image: Image, table: Table) -> Iterator[tuple[Snapshot | None, Disk, Disk | None]]:
    """The snapshots and then the active disk: its entry, the disk, the VM state."""
    for s in table.snapshots:
        yield s, image.disk(s), image.disk(s, vm_state=True) if s.vm_state_size else None
    yield None, image.active_disk(), None


def _write(image: Image, table: Table, new: NewImage, shape: Shape, compress: bool) -> None:
    with progress("compacting", _behind_tables(image, table)) as advance:
        copier = Copier(image, new, shape, compress, advance)
        try:
            for snapshot, disk, vm_state in _states(image, table):
                l1 = copier.l1_table([disk] if vm_state is None else [disk, vm_state])
                if snapshot is None:
                    new.finish(disk.size, l1)
                else:
                    new.snapshot(snapshot, l1)
        finally:
            copier.close()


def _behind_tables(image: Image, table: Table) -> int:
    """The guest's bytes behind all L2 tables, each counted once: what the bar measures."""
    met: set[int] = set()
    span = 0
    for _, disk, _ in _states(image, table):
        span = disk.tables.bytes_per_l1_entry
        met.update(disk.tables.l1_entries(0, disk.tables.l1_size))
    return span * len(met - {0})


def _check_unchanged(image: Image, table: Table) -> None:
    """Raises UsageError when a QEMU has the image open by now, SnapshotGone when one is."""
    ensure_not_written(image.files)
    image.guard(table.snapshots).confirm()


# --- Comparing ---


def compare_images(image: Image, written: Image, table: Table, out: str) -> None:
    """Raises StorageError where the states of the two differ, in what is said of them or in a
    byte, and where the written one would not stand a write."""
    there = written.table()
    for finding in check(written):
        if finding.problem in (OVERLAP, NOT_COUNTED, IN_PLACE):  # a later write would find out
            raise StorageError(f"{shown(out)} was written wrong: {finding.message}")
    for ours, theirs in zip(table.snapshots, there.snapshots, strict=False):
        if _described(ours) != _described(theirs):
            raise StorageError(f"snapshot {shown(ours.name)} of {shown(out)} was written wrong")
    if len(there.snapshots) != len(table.snapshots):
        raise StorageError(
            f"{shown(out)} was written wrong: it has {len(there.snapshots)} snapshots"
        )
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


def _described(s: Snapshot) -> tuple[object, ...]:
    """All that an entry says but where its table is."""
    return (
        s.id,
        s.name,
        s.date_sec,
        s.date_nsec,
        s.vm_clock_nsec,
        s.vm_state_size,
        s.disk_size,
        s.icount,
    )


def _compare(
    old: Disk, new: Disk, before: tuple[Disk, Disk] | None, what: str, advance: Advance
) -> None:
    check_size(old.size, new.size, what)
    if before is None:
        compare(old, lambda: whole(old), new, what, advance)
        return
    for pair in ((before[0], old), (before[1], new)):
        compare(old, partial(_to_compare, *pair), new, what, lambda _: None)
    advance(old.size)


def _to_compare(before: Disk, now: Disk) -> Iterator[Extent]:
    """Where one image says that the states differ; with what, the other may see otherwise."""
    return (extent._replace(type=ALLOCATED) for extent in changes(before, now))
