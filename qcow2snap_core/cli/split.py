"""Make an external chain of an image's internal snapshots: one overlay for each, with only what
changed, the oldest as the base, and active.qcow2 for the active disk on top.

An overlay is named after its snapshot: what a file name had better not hold is percent-encoded, and
the ID stands for names that are empty, repeated, too long or 'active'. A backing file of FILE
becomes that of the base; if anything is encrypted, the base holds all of it instead. The overlays
are not encrypted. What they cannot say, IDs, names, dates, clocks and VM states, is written beside
them, and join uses it. FILE is only read, and must not be in use. OUTDIR appears when it is whole:
when every overlay has been read back and compared with its snapshot."""

from __future__ import annotations

import argparse
import os

from ..errors import escaped
from ..transfer.judge import judge
from ..transfer.split import SPLIT_TARGETS, split
from ..util.interrupts import deferred
from .common import add_force, add_image_options, add_no_verify, open_from
from .streams import warn

HELP = "internal snapshots to an external chain"
EXAMPLE = "qcow2snap split disk.qcow2 chain/"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument("outdir", metavar="OUTDIR", help="a directory, absent or empty")
    add_force(parser, "replace OUTDIR if it has overlays in it and nothing else")
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
