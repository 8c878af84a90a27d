"""List the ranges that a backup made at OLD must copy to become NEW: offset, length and type. Type
0 is data that may differ, type 3 is what is zero in NEW. The list comes from the tables; no data
is read. OLD and NEW may be @active if nobody writes to the image. On a terminal the last line
has the totals.

With --files, list the files that changed instead; OLD and NEW are then SNAPSHOT[:PARTITION].
Files are compared by their metadata, and by content if the metadata differ."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from ..image.extents import ALLOCATED, HOLE_ZERO
from ..tables.diff import changes
from ..util.units import binary
from .common import disk_named, map_line, open_from, print_json
from .guest import add_guest_options

HELP = "list what changed from one snapshot to another"
EXAMPLE = "qcow2snap diff disk.qcow2 weekly nightly"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument("old", metavar="OLD", help="ID or name of a snapshot, or @active")
    parser.add_argument("new", metavar="NEW", help="ID or name of a snapshot, or @active")
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--files", action="store_true", help="list the files that changed")
    parser.add_argument(
        "--content", action="store_true", help="with --files: compare the content of all files"
    )
    add_guest_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.files:
        from .difffiles import run_files

        return run_files(args)
    if args.content or args.backend or args.ignore_journal:
        args.usage_error("--content, --backend and --ignore-journal go with --files")
    with open_from(args, data=False) as image:
        old, new = disk_named(image, args.old), disk_named(image, args.new)
        extents = changes(old, new)
        if args.json:
            print_json(extent._asdict() for extent in extents)
        else:
            sizes: Counter[int] = Counter()
            for extent in extents:
                print(map_line(extent))
                sizes[extent.type] += extent.length
            if sys.stdout.isatty():
                print(
                    f"{binary(sizes[ALLOCATED])} to copy, {binary(sizes[HOLE_ZERO])} now zero, "
                    f"of {binary(new.size)}"
                )
    return 0
