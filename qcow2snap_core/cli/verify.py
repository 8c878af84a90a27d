"""Read all of a repository and compare it with its checksums.

For each snapshot that cannot be restored a line says why. The exit status is then 3, as for
qcow2snap check."""

from __future__ import annotations

import argparse

from ..errors import UsageError, escaped, shown
from ..transfer.manifest import described
from ..transfer.repository import stored_size
from ..transfer.restore import verify
from ..util.interrupts import deferred
from ..util.units import binary, counted
from .common import DAMAGED, print_json

HELP = "read all of a repository and compare it with its checksums"
EXAMPLE = "qcow2snap verify /backup/disk"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", metavar="REPOSITORY", help="a directory made by backup")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON array of all, with what is wrong with each",
    )


def run(args: argparse.Namespace) -> int:
    with deferred():
        verdicts = verify(args.repository)
    if not verdicts:
        raise UsageError(f"{shown(args.repository)} has no snapshots yet: nothing can be restored")
    wrong = [v for v in verdicts if v.problem is not None]
    if args.json:
        print_json({**described(v.entry), "problem": v.problem} for v in verdicts)
    for each in [] if args.json else wrong:
        print(f"{each.entry.disk.file} {escaped(each.entry.snapshot.name)}: {each.problem}")
    if not wrong and not args.json:
        size = binary(stored_size(v.entry for v in verdicts))
        print(f"{counted(len(verdicts), 'snapshot')}, {size}: all is as it was written")
    return DAMAGED if wrong else 0
