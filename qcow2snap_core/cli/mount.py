"""Show all snapshots in a directory, read-only, until Ctrl-C or until the directory is unmounted.
DIR/NAME/disk is the raw disk of the snapshot NAME. DIR/NAME/p1 has the files of its partition 1,
DIR/NAME/files those of a disk without partitions, and DIR/NAME/lvm those of LVM volumes.
DIR/NAME/vmstate is the saved state of the machine. New snapshots appear; reads of a snapshot
that was deleted fail. Files are read in the same way as by ls.

With SNAPSHOT, show the raw disk of that one as DIR/disk. With --filesystem, show the files in
it, or in its --partition, in DIR: fuse2fs reads ext2, ext3 and ext4, ntfs-3g NTFS, guestmount
others. A journal is replayed into a temporary file first; the image is not changed.

What a guest has written is untrusted input: do not mount it with the host's kernel. The programs
above run with the privileges of whoever starts them, so use an ordinary user and not root."""

from __future__ import annotations

import argparse
from contextlib import suppress

from ..errors import UsageError, escaped, shown
from ..files.volumes import How, described, parts, whole
from ..format.choosing import Choice, choose
from ..host.mount import mount, mount_filesystem
from ..host.nbdkit import missing
from ..image.disk import Disk
from ..image.image import Image
from ..util.interrupts import deferred
from .common import open_from
from .guest import add_guest_options
from .parser import Parser
from .streams import OutputLost, say, warn

HELP = "show all snapshots with their files, or one of them, in a directory"
EXAMPLE = "qcow2snap mount disk.qcow2 /mnt/snapshots"


def arguments(parser: Parser) -> None:
    parser.add_argument(
        "--partition", metavar="N", type=int, help="show only this partition of SNAPSHOT"
    )
    parser.add_argument(
        "--filesystem", action="store_true", help="show the files in SNAPSHOT, not the disk"
    )
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument(
        "snapshot", metavar="SNAPSHOT", nargs="?", help="ID or name; if omitted, all are shown"
    )
    parser.add_argument("directory", metavar="DIR", help="an existing directory")
    add_guest_options(parser)


def run(args: argparse.Namespace) -> int:
    one = args.snapshot is not None
    if not one and (args.filesystem or args.partition is not None):
        args.usage_error("--filesystem and --partition go with a SNAPSHOT: FILE SNAPSHOT DIR")
    if one and (args.backend or args.ignore_journal):
        args.usage_error("--backend and --ignore-journal go without a SNAPSHOT: FILE DIR")
    with open_from(args) as image, deferred():
        if one:
            _show_one(image, args)
        else:
            _show_all(image, args)
    return 0


def _ready(path: str) -> None:
    with suppress(OutputLost):  # no reason to end; the last flush will find it again
        print(f"{escaped(path)} is there until Ctrl-C", flush=True)


def _show_one(image: Image, args: argparse.Namespace) -> None:
    show = mount_filesystem if args.filesystem else mount
    snapshot = choose(image.table(), Choice(args.snapshot), image.path)
    disk = image.disk(snapshot)
    show(image, snapshot, args.directory, _partition(disk, args), _ready)


def _partition(disk: Disk, args: argparse.Namespace) -> int | None:
    """The one that is meant: the only one, if a filesystem is asked for and none is named.  Raises
    UsageError with what there is; nbdkit's partition filter would not say it."""
    number: int | None = args.partition
    if number is None and not args.filesystem:
        return None
    found = parts(whole(disk))
    if number is None and len(found) == 1:
        return found[0].number
    if found and number not in {part.number for part in found}:
        raise UsageError(described("--partition ", found))
    if number is not None and not found:
        raise UsageError("this disk has no partitions: leave out --partition")
    return number


def _show_all(image: Image, args: argparse.Namespace) -> None:
    try:
        from ..fuse.server import mount_all
    except ModuleNotFoundError as e:
        if e.name != "pyfuse3":
            raise
        raise missing("pyfuse3", "python3-pyfuse3, or name a SNAPSHOT, which needs none") from e
    table = image.table()

    def ready(path: str) -> None:
        if table.damage:
            damage = f"{shown(image.path)}: the snapshot table is damaged: {table.damage}"
            warn(f"{damage}: what could be read of it is shown")
        elif not table.snapshots:
            why = f": {table.note}" if table.note else " yet: those that will be taken are shown"
            say(f"{shown(image.path)} has no snapshots{why}")
        _ready(path)

    mount_all(image, args.directory, How(args.backend, args.ignore_journal), ready, say)
