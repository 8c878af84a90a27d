"""List what a backup made at OLD must copy to become NEW: offset, length and type of what may
differ, type 0 for data and 3 for what is zero now.  It comes from the tables, no data is read.
NEW may be @active, if nobody writes to the image. On a terminal the last line has the totals."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from ..image.extents import ALLOCATED, HOLE_ZERO
from ..tables.diff import changes
from ..util.units import binary
from .common import add_image_options, disk_named, map_line, open_from, print_json

HELP = "what changed from one snapshot to another"
EXAMPLE = "qcow2snap diff disk.qcow2 weekly nightly"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument("old", metavar="OLD", help="ID or name of a snapshot, or @active")
    parser.add_argument("new", metavar="NEW", help="the same")
    parser.add_argument("--json", action="store_true", help="one JSON array")
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
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
