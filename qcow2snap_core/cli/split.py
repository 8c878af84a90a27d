"""Make an external chain of the internal snapshots: one overlay for each, with only what changed.
The oldest is the base, and active.qcow2, for the active disk, is on top.

An overlay has the name of its snapshot, in which characters that are unsuitable for a file name
are percent-encoded. If the name is empty, repeated, too long or 'active', the ID is used. If
FILE has a backing file, the base gets the same one; but if anything is encrypted, the base holds
all data instead, since the overlays are not encrypted. The IDs, names, dates, clocks and VM
states, which overlays cannot record, are written beside them, and join uses them. FILE is only
read, and must not be in use. OUTDIR appears when it is complete: when every overlay has been
read back and compared with its snapshot."""

from __future__ import annotations

import argparse
import os

from ..errors import escaped
from ..transfer.judge import judge
from ..transfer.split import SPLIT_TARGETS, split
from ..util.interrupts import deferred
from .common import add_force, add_image_options, add_no_verify, open_from
from .streams import warn

HELP = "convert internal snapshots to an external chain"
EXAMPLE = "qcow2snap split disk.qcow2 chain/"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument(
        "outdir", metavar="OUTDIR", help="a directory that does not exist or is empty"
    )
    add_force(parser, "replace OUTDIR if nothing but overlays is in it")
    add_no_verify(parser)
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    place = judge(
        args.outdir, SPLIT_TARGETS, replace=args.force
    )  # before a passphrase is asked for
    with open_from(args) as image, deferred():
        for name in split(image, place, warn, args.verify):
            print(escaped(os.path.join(args.outdir, name)))
    return 0
