"""Copy an image with all its snapshots, without the space that deleted snapshots have left.

Every snapshot keeps its ID, name, date, clock and VM state. Each cluster is written once,
however many snapshots share it, and compressed clusters stay compressed. OUT has the same
backing file as FILE, and is not encrypted. FILE is only read, and must not be in use. OUT
appears when it is complete: when every snapshot in it has been read back and compared with the
one in FILE."""

from __future__ import annotations

import argparse

from ..transfer.compact import COMPACT_TARGETS, compact
from ..transfer.compressors import COMPRESSIONS
from ..transfer.judge import judge
from ..util.interrupts import deferred
from .common import (
    add_force,
    add_image_options,
    add_no_verify,
    ensure_not_source,
    open_from,
)
from .streams import warn

HELP = "copy an image with all its snapshots, without unused space"
EXAMPLE = "qcow2snap compact disk.qcow2 small.qcow2"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument("out", metavar="OUT", help="the image to write")
    parser.add_argument(
        "--compress",
        choices=COMPRESSIONS,
        help="compress the clusters that are not compressed in FILE",
    )
    add_force(parser, "replace OUT if it is an existing file")
    add_no_verify(parser)
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    ensure_not_source(args.out, args.file)
    place = judge(args.out, COMPACT_TARGETS, replace=args.force)  # before a passphrase is asked for
    with open_from(args) as image, deferred():
        compact(image, place, warn, args.compress, args.verify)
    return 0
