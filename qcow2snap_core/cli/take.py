"""Ask a running QEMU for an internal snapshot of one or more of its disks at the same instant, with
all writes flushed, and print the nbdkit command that serves each of them.

The QEMU is given by its QMP socket, or by the name of the machine in libvirt. With --domain,
disks have the names that libvirt uses (vda), and all disks are meant if none is given."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

from ..errors import UsageError, shown
from ..host.domains import monitor
from ..host.nodes import Qemu
from ..host.qmp import FrozenGuest, NotThawed, Qmp
from ..host.take import Frozen, take
from ..util.interrupts import deferred, raise_if_interrupted
from .streams import say

HELP = "ask a running QEMU for a snapshot"
EXAMPLE = "qcow2snap take --qmp /run/vm.qmp --device disk0 --device disk1 nightly"


def arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--qmp", metavar="SOCKET", help="QEMU's QMP socket")
    which.add_argument("--domain", metavar="DOMAIN", help="the machine's name in libvirt")
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="NODE",
        help="node or device name of a disk, with --domain its target (vda); "
        "repeat it for several disks",
    )
    parser.add_argument(
        "--agent",
        metavar="SOCKET",
        help="socket of the guest's agent, which freezes the filesystems meanwhile",
    )
    parser.add_argument(
        "--freeze",
        action="store_true",
        help="with --domain: have the guest's agent freeze the filesystems meanwhile",
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="the snapshot's name; words before it are further devices",
    )


def run(args: argparse.Namespace) -> int:
    # `--device a b NAME` means what it looks like, though argparse sees two positionals.
    *more, name = args.names
    devices = [*args.device, *more]
    if args.qmp is not None and not devices:
        args.usage_error("the following arguments are required: --device")
    if args.qmp is not None and args.freeze:
        args.usage_error("--freeze goes with --domain: --agent SOCKET is for --qmp")
    if args.domain is not None and args.agent is not None:
        args.usage_error("--agent goes with --qmp: --freeze is for --domain")
    if len(set(devices)) < len(devices):
        raise UsageError("a device is given twice: name each one once")
    with deferred():  # the guest must be thawed in any case
        try:
            return _run(args, devices, name)
        except NotThawed as e:  # which has to be known after Ctrl-C too
            say(str(e))
            raise_if_interrupted()
            return 1


def _run(args: argparse.Namespace, devices: list[str], name: str) -> int:
    if args.domain is not None:
        with monitor(args.domain) as qemu:
            freeze: Frozen = qemu.frozen if args.freeze else nullcontext
            return _take(qemu, qemu.nodes(devices), name, freeze)
    freeze = nullcontext if args.agent is None else partial(FrozenGuest, args.agent)
    with Qmp(args.qmp) as qmp:
        return _take(qmp, {device: device for device in devices}, name, freeze)


def _take(qemu: Qemu, devices: Mapping[str, str], name: str, freeze: Frozen) -> int:
    found, not_thawed = take(qemu, devices, name, freeze)
    if not_thawed is not None:
        say(str(not_thawed))
    for taken in found:
        command = taken.command()
        if command is not None:
            print(command)
        else:
            say(
                f"the snapshot {shown(name)} of {shown(taken.device)} was taken, but where "
                f"QEMU has {shown(taken.file)} is not known: {taken.unknown}"
            )
    return 0 if not_thawed is None else 1
