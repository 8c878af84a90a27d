"""Make an image with all snapshots of a repository again, or copy the disk of one of them.

OUT is a new qcow2 image with all snapshots, which have their IDs, names, dates, clocks and VM
states again. The active disk is that of the newest one. With --snapshot, OUT is the disk of that
snapshot alone, and can be whatever the target of qcow2snap copy can be: a raw or qcow2 file, a
block device, an NBD export, or - for standard output. All files that are needed are first
compared with their checksums, and damage is an error; with --skip-damaged a line says which
snapshots are left out, and the exit status is 3. OUT appears when it is complete: when every
snapshot in it has been read back and compared."""

from __future__ import annotations

import argparse
import errno
import resource

from ..errors import escaped
from ..storage.libnbd import without_secrets
from ..transfer.destinations import FORMATS, new_copy
from ..transfer.judge import STANDARD_OUTPUT, judge
from ..transfer.restore import RESTORE_TARGETS, restore, restore_disk
from ..transfer.streams import ReaderGone
from ..util.interrupts import deferred
from ..util.wording import COMMAND
from .common import DAMAGED, add_force, add_no_verify
from .streams import OUTPUT_NAMES, OutputLost, warn

HELP = "make an image, or copy one disk, from a repository"
EXAMPLE = "qcow2snap restore --snapshot nightly /backup/disk nightly.raw"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", metavar="REPOSITORY", help="a directory made by backup")
    parser.add_argument("out", metavar="OUT", help="the image, or with --snapshot the disk")
    parser.add_argument(
        "--snapshot",
        metavar="NAME",
        help="copy this one alone: its file in REPOSITORY, its ID or its name",
    )
    parser.add_argument(
        "--skip-damaged",
        action="store_true",
        help="leave out the snapshots that cannot be restored; the exit status is then 3",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="with --snapshot, the format of a file, whatever its name"
    )
    add_force(parser, "replace OUT if it is an existing file")
    add_no_verify(parser)


def run(args: argparse.Namespace) -> int:
    if args.snapshot is None:
        if args.format is not None:
            args.usage_error("--format goes with --snapshot: an image with snapshots is qcow2")
        if args.out in OUTPUT_NAMES:
            args.usage_error("an image is written to a file: add --snapshot for a stream of a disk")
        _raise_limit()
        place = judge(args.out, RESTORE_TARGETS, replace=args.force)
        with deferred():
            done = restore(args.repository, place, warn, COMMAND, args.verify, args.skip_damaged)
        print(f"{escaped(args.out)}: {', '.join(escaped(s.name) for s in done.snapshots)}")
        return DAMAGED if done.left_out else 0
    if args.skip_damaged:
        args.usage_error("--skip-damaged goes without --snapshot, which says what is restored")
    target = STANDARD_OUTPUT if args.out in OUTPUT_NAMES else args.out
    to = new_copy(target, form=args.format, replace=args.force)
    try:
        with deferred():
            copied = restore_disk(args.repository, args.snapshot, to, warn, COMMAND, args.verify)
    except ReaderGone as e:
        raise OutputLost(errno.EPIPE, str(e)) from e
    if target != STANDARD_OUTPUT:
        print(f"{without_secrets(target)}: {copied}")
    return 0


def _raise_limit() -> None:
    """All files of a repository are open at once, which may be more than most programs need."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
