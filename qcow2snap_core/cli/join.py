"""Make one image of an external chain, with an internal snapshot for each of its files, named
after the file without the ending. The active disk is TOP's, and OUT has no backing file.

In a chain that split has made the files are the snapshots that they were, with ID, date and VM
state, and the active disk is none. The chain is only read, and must not be in use. OUT is not
encrypted; it appears when it is whole: when every snapshot has been read back and compared."""

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

HELP = "an external chain to one image with internal snapshots"
EXAMPLE = "qcow2snap join chain/active.qcow2 disk.qcow2"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="TOP", help="the topmost image of the chain")
    parser.add_argument("out", metavar="OUT", help="the image to make")
    add_force(parser, "replace OUT if it is a file that is there")
    add_no_verify(parser)
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    ensure_not_source(args.out, args.file)
    place = judge(args.out, JOIN_TARGETS, replace=args.force)  # before a passphrase is asked for
    with open_from(args) as image, deferred():
        names = join(image, place, warn, args.verify)
    print(f"{escaped(args.out)}: {', '.join(map(escaped, names))}")
    return 0
