"""Show all snapshots in a directory, read-only, until Ctrl-C or until it is unmounted.
DIR/NAME/disk is the raw disk of the snapshot NAME, DIR/NAME/p1 has the files of its partition 1,
DIR/NAME/files those of a disk that is one filesystem, DIR/NAME/lvm those of LVM, and
DIR/NAME/vmstate is the saved state of a machine. New snapshots appear; what was deleted gives
errors. Files are read as by ls.

With SNAPSHOT it is that one alone: the raw disk DIR/disk. With --filesystem DIR has the files of
the filesystem in it, or in its partition --partition: ext2, ext3 and ext4 are read by fuse2fs, NTFS
by ntfs-3g, others by guestmount. What is in a journal is replayed into a temporary file first; the
image stays as it is.

What a guest wrote is untrusted input, which the host's kernel should not mount. These programs run
with the privileges of whoever started them: do that as an ordinary user, not as root."""

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

HELP = "show all snapshots, one as a raw disk, or its files, in a directory"
EXAMPLE = "qcow2snap mount disk.qcow2 /mnt/snapshots"


def arguments(parser: Parser) -> None:
    parser.add_argument("--partition", metavar="N", type=int, help="only this partition of it")
    parser.add_argument("--filesystem", action="store_true", help="the files in it, not the disk")
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument(
        "snapshot", metavar="SNAPSHOT", nargs="?", help="its ID or name; all if there is none"
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
