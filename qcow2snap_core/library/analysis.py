"""What the tables say, without reading any data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

from ..errors import shown
from ..tables import check as tables_check
from ..tables import diff, space
from ..tables.findings import Finding
from ..util.progress import silent
from . import arguments
from .disk import Disk, Extent
from .image import Image
from .names import public
from .snapshot import Snapshot

__all__ = ["Finding", "changes", "check", "exclusive_sizes"]

public(Finding)


@public
def changes(old: Disk, new: Disk) -> Iterator[Extent]:
    """The ranges of ``new`` that may differ from ``old``, in order and merged: what a backup made
    at ``old`` has to write to become ``new``.  Ranges that are zero in ``new`` have the type of
    zeros.

    Both disks are of the same image; either may be the active one, neither can be a VM state.  Only
    tables are read, so the cost grows with the change; a cluster that was written again with the
    same data is listed.  The part of ``new`` past the end of ``old`` is listed in full.

    Raises TypeError and ValueError at once for disks that cannot be compared.  The iterator raises
    as :meth:`.Disk.pread`.

    >>> with qcow2snap_core.open("disk.qcow2") as image:
    ...     for offset, length, type in changes(image.open("weekly"), image.open("nightly")):
    ...         print(offset, length, type)
    0 65536 0
    4194304 65536 0
    4259840 4128768 3
    """
    comparable(old, new)
    return map(Extent._make, diff.changes(old._disk, new._disk))


@public
def exclusive_sizes(image: Image) -> list[tuple[Snapshot, int | None]]:
    """Each snapshot and the bytes that deleting it alone would free, its tables included; None if
    that cannot be determined because of damage.

    Raises StorageError when the storage fails, SnapshotGone when snapshots are deleted again and
    again meanwhile.

    >>> with qcow2snap_core.open("disk.qcow2") as image:
    ...     for snapshot, size in exclusive_sizes(image):
    ...         print(snapshot.name, size)
    weekly 196608
    nightly 65536
    """
    arguments.instance("image", image, Image)
    table, freed = image._image.of_all(partial(space.exclusive_sizes, image._image))
    sizes = (None if each is None else each.size for each in freed)
    return list(zip(map(Snapshot, table.snapshots), sizes, strict=True))


@public
def check(
    image: Image,
    snapshot: Snapshot | str | None = None,
    *,
    data: bool = False,
    warn: Callable[[str], object] = warnings.warn,
) -> list[Finding]:
    """What is wrong with the metadata of all snapshots and the active disk, or only what concerns
    one snapshot; an empty list if nothing is wrong.  There are at most 1000 findings.  Leaked
    clusters are reported, but are no damage (``is_damage``).  With ``data`` every cluster is read
    and decoded as well, once, however many snapshots use it.

    Nobody should be writing to the image meanwhile.  ``warn`` is called with a line if the image
    is marked dirty: then its refcounts are not up to date and are not compared.

    Raises StorageError when the storage fails, SnapshotGone when a snapshot is deleted meanwhile or
    when the one that is asked for is not in the image any more.

    >>> with qcow2snap_core.open("disk.qcow2") as image:
    ...     check(image)
    []
    """
    arguments.instance("image", image, Image)
    if isinstance(snapshot, str):
        snapshot = image.find(snapshot)
    if snapshot is not None:
        arguments.instance("snapshot", snapshot, Snapshot)
    arguments.flag("data", data)
    entry = None if snapshot is None else snapshot._entry
    with silent():
        findings = tables_check.check(image._image, entry, data=data)
    if image._image.header.dirty:
        warn(f"{shown(image.path)} is marked dirty: its refcounts were not compared")
    return findings


def comparable(old: Disk, new: Disk) -> None:
    """Raises TypeError or ValueError unless the tables of one can be held against the other's."""
    for name, disk in ("old", old), ("new", new):
        arguments.instance(name, disk, Disk)
        if disk._vm_state:
            raise ValueError(f"{name} is a VM state: nothing older is like it, copy all of it")
    if old._image is not new._image:
        raise ValueError("old and new are of two images: open both snapshots of one Image")
