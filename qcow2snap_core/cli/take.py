"""Ask a running QEMU for an internal snapshot of one or more of its disks at one instant, with
all writes flushed, and print the nbdkit command that serves each."""

from __future__ import annotations

import argparse

from ..errors import shown
from ..host.take import take
from ..util.interrupts import deferred
from .streams import say

HELP = "ask a running QEMU for a snapshot"
EXAMPLE = "qcow2snap take --qmp /run/vm.qmp --device disk0 --device disk1 nightly"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--qmp", required=True, metavar="SOCKET", help="QEMU's QMP socket")
    parser.add_argument(
        "--device",
        required=True,
        action="append",
        metavar="NODE",
        help="node or device name of a disk; repeat it for several disks at one instant",
    )
    parser.add_argument(
        "--agent",
        metavar="SOCKET",
        help="the guest agent's socket: freeze the guest's filesystems meanwhile",
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="the snapshot's name; what is before it names devices",
    )


def run(args: argparse.Namespace) -> int:
    # `--device a b NAME` means what it looks like, though argparse sees two positionals.
    *more, name = args.names

    with deferred():  # the guest must be thawed in any case
        for taken in take(args.qmp, [*args.device, *more], name, args.agent):
            command = taken.command()
            if command is not None:
                print(command)
            else:
                say(
                    f"the snapshot {shown(name)} of {shown(taken.device)} was taken, but where "
                    f"QEMU has {shown(taken.file)} is not known: {taken.unknown}"
                )
    return 0
