"""Add the snapshots of an image that a repository does not have yet, each with only what changed.

REPOSITORY is a directory, which the first backup makes. Each snapshot in it is a qcow2 file on
top of another one, and a VM state is a raw file, so qemu-img can read them without this program.
qcow2snap.json has their names, IDs, dates and checksums. A running QEMU may have the image open,
and may take and delete snapshots meanwhile. A snapshot is in the repository when it has been
read back and compared with the image. If a backup is interrupted, the next one continues.
Snapshots that are deleted in the image stay in the repository. The files are not encrypted."""

from __future__ import annotations

import argparse

from ..errors import escaped
from ..transfer.backup import backup
from ..transfer.compressors import COMPRESSIONS
from ..transfer.judge import judge
from ..transfer.manifest import described
from ..transfer.repository import REPOSITORY
from ..util.interrupts import deferred
from ..util.units import binary
from .common import add_image_options, add_no_verify, open_from, print_json
from .streams import warn

HELP = "add an image's new snapshots to a repository"
EXAMPLE = "qcow2snap backup --compress zstd disk.qcow2 /backup/disk"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument(
        "repository",
        metavar="REPOSITORY",
        help="a repository, or a directory that does not exist or is empty",
    )
    parser.add_argument(
        "--compress",
        choices=COMPRESSIONS,
        help="compress the clusters that are not compressed in FILE",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON array of what was added"
    )
    add_no_verify(parser)
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    place = judge(args.repository, REPOSITORY, in_place=True)  # before a passphrase is asked for
    with open_from(args) as image, deferred():
        added = backup(image, place, warn, args.compress, args.verify)
    if args.json:
        print_json(map(described, added))
        return 0
    for entry in added:
        base = f"since {entry.parent}" if entry.parent else "whole"
        size = binary(entry.disk.size + (entry.vm_state.size if entry.vm_state else 0))
        print(f"{entry.disk.file}: {escaped(entry.snapshot.name)}, {size}, {base}")
    if not added:
        print("nothing new")
    return 0
