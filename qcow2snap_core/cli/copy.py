"""Copy a snapshot to a raw file, a block device or an NBD export; holes stay holes.

With --since only what changed since the snapshot OLD is written, and TARGET must hold OLD already.
A file that was copied knows what it holds, and is refused when that is not OLD; for what does not
know, files that other programs made, devices and NBD exports, --verify-base compares all that will
not be written, and --trust-base goes without.

A file is written under a temporary name and renamed when it is whole; for --since that begins
as a copy of the old one, which is free on Btrfs and XFS and otherwise needs the time and the
space. --in-place goes without. Devices and NBD exports are always written in place, then read back
and compared. When a copy in place is interrupted TARGET is a mixture: repeat the same command to
complete it."""

from __future__ import annotations

import argparse

from ..storage.libnbd import without_secrets
from ..transfer.backup import TARGETS, copy
from ..transfer.bases import Base
from ..transfer.destination import destination
from ..util.interrupts import deferred
from .common import add_image_options, add_no_verify, disk_named, open_from

HELP = "copy a snapshot, or what changed since an older one"
EXAMPLE = "qcow2snap copy disk.qcow2 --since monday tuesday /backup/disk.raw"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument("--since", metavar="OLD", help="the snapshot that TARGET holds now")
    parser.add_argument("--in-place", action="store_true", help="update a file without a copy")
    base = parser.add_mutually_exclusive_group()
    base.add_argument(
        "--verify-base",
        dest="base",
        action="store_const",
        const=Base.COMPARED,
        help="compare what TARGET holds and will keep before anything is written",
    )
    base.add_argument(
        "--trust-base",
        dest="base",
        action="store_const",
        const=Base.TRUSTED,
        help="do not ask TARGET whether it holds OLD: devices and NBD exports do not know",
    )
    parser.add_argument("new", metavar="NEW", help="the snapshot, by ID or name")
    parser.add_argument("target", metavar="TARGET", help="a path, or an NBD URI")
    add_no_verify(parser)
    parser.set_defaults(usage_error=parser.error)
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.since is None and (args.in_place or args.base):
        args.usage_error("--in-place, --verify-base and --trust-base go with --since")
    destination(args.target, TARGETS, in_place=args.in_place)  # before a passphrase is asked for
    with open_from(args) as image, deferred():
        new = disk_named(image, args.new)
        since = None if args.since is None else disk_named(image, args.since)
        how = args.in_place, args.verify, args.base or Base.RECORDED
        done = copy(image, new, args.target, since, *how)
    print(f"{without_secrets(args.target)}: {done}")
    return 0
