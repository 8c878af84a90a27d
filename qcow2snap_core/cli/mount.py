"""Show a snapshot as the raw disk DIR/disk, read-only, until Ctrl-C or until DIR is unmounted.

With --filesystem DIR has the files of the filesystem in it, or in its partition --partition: ext2,
ext3 and ext4 are read by fuse2fs, NTFS by ntfs-3g, others by guestmount. What is in a journal is
replayed into a temporary file first; the image stays as it is.

What a guest wrote is untrusted input, which the host's kernel should not mount. These programs run
with the privileges of whoever started them: do that as an ordinary user, not as root."""

from __future__ import annotations

import argparse
from contextlib import suppress

from ..errors import UsageError, escaped
from ..files.volumes import described, parts, whole
from ..format.choosing import Choice, choose
from ..host.mount import mount, mount_filesystem
from ..util.interrupts import deferred
from .common import add_image_options, open_from
from .streams import OutputLost

HELP = "show a snapshot as a raw disk, or its files, in a directory"
EXAMPLE = "qcow2snap mount disk.qcow2 nightly /mnt/nightly"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--partition", metavar="N", type=int, help="only this partition of it")
    parser.add_argument("--filesystem", action="store_true", help="the files in it, not the disk")
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="its ID or name")
    parser.add_argument("directory", metavar="DIR", help="an existing directory")
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    def ready(path: str) -> None:
        with suppress(OutputLost):  # no reason to end; the last flush will find it again
            print(f"{escaped(path)} is there until Ctrl-C", flush=True)

    show = mount_filesystem if args.filesystem else mount
    with open_from(args) as image, deferred():
        snapshot = choose(image.table(), Choice(args.snapshot), image.path)
        disk = image.disk(snapshot)
        if args.filesystem and args.partition is None and (found := parts(whole(disk))):
            raise UsageError(described("--partition ", found))
        show(image, snapshot, args.directory, args.partition, ready)
    return 0
