"""Make one image of an external chain, with an internal snapshot for each file of the chain. A
snapshot has the name of its file without the ending. The active disk is that of TOP, and OUT has
no backing file.

If split made the chain, the snapshots get back their IDs, names, dates and VM states, and the
active disk does not become a snapshot. The chain is only read, and must not be in use. OUT is
not encrypted. It appears when it is complete: when every snapshot has been read back and
compared."""

from __future__ import annotations

import argparse

from ..errors import escaped
from ..transfer.join import JOIN_TARGETS, join
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

HELP = "convert an external chain to one image with internal snapshots"
EXAMPLE = "qcow2snap join chain/active.qcow2 disk.qcow2"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="TOP", help="the topmost image of the chain")
    parser.add_argument("out", metavar="OUT", help="the image to make")
    add_force(parser, "replace OUT if it is an existing file")
    add_no_verify(parser)
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    ensure_not_source(args.out, args.file)
    place = judge(args.out, JOIN_TARGETS, replace=args.force)  # before a passphrase is asked for
    with open_from(args) as image, deferred():
        names = join(image, place, warn, args.verify)
    print(f"{escaped(args.out)}: {', '.join(map(escaped, names))}")
    return 0
