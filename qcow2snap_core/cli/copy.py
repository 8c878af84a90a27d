"""Copy a snapshot to a file, a block device, an NBD export, a FIFO or standard output (-).

A file is raw, with holes where the disk has zeros. If its name ends in .qcow2 it is a qcow2
image, which --compress compresses. The file appears when it is complete, and replaces another
file only with --force. NEW may be NAME/vmstate, the state of the machine that was saved with
snapshot NAME.

With --since, write only what changed since the snapshot OLD; TARGET must already hold OLD. A
file that this command has made has a record of what it holds, and is refused if that is not OLD.
Devices, NBD exports and files made by other programs have no record: --verify-base first
compares all of TARGET that will not be written, --trust-base omits that. A file is duplicated
before it is updated, which costs nothing on Btrfs and XFS but time and space elsewhere;
--in-place omits that.

Devices and NBD exports are always written in place, then read back and compared. If a copy in
place is interrupted, TARGET is a mixture; run the same command again to complete it.

With --salvage, copy what can be read of a damaged snapshot to a new raw file. What cannot be
read is zeros in the file and has a line in MAP, in the format of GNU ddrescue. The exit status
is then 1."""

from __future__ import annotations

import argparse
import errno

from ..errors import UsageError, shown
from ..format.ondisk import SECTOR
from ..image.disk import Disk
from ..image.image import Image
from ..serve.exports import VM_STATE
from ..storage.libnbd import without_secrets
from ..transfer.compressors import COMPRESSIONS
from ..transfer.copy import copy
from ..transfer.destinations import FORMATS, form_of, new_copy, update
from ..transfer.judge import STANDARD_OUTPUT
from ..transfer.salvage import Salvage
from ..transfer.salvaged import SalvagedFile
from ..transfer.streams import ReaderGone
from ..transfer.updates import Base
from ..util.interrupts import deferred
from ..util.units import binary, counted
from .common import (
    add_force,
    add_image_options,
    add_no_verify,
    disk_named,
    ensure_not_source,
    open_from,
    saved_named,
)
from .streams import OUTPUT_NAMES, OutputLost, say, warn

HELP = "copy a snapshot, or what changed since an older one"
EXAMPLE = "qcow2snap copy disk.qcow2 --since monday tuesday /backup/disk.raw"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument(
        "--format", choices=FORMATS, help="the format of a file, whatever its name is"
    )
    parser.add_argument(
        "--compress",
        choices=COMPRESSIONS,
        nargs="?",
        const="zlib",
        help="compress the clusters of a qcow2 file",
    )
    add_force(parser, "replace TARGET if it is an existing file")
    parser.add_argument("--since", metavar="OLD", help="the snapshot that TARGET holds now")
    parser.add_argument(
        "--in-place", action="store_true", help="update the file itself, not a copy of it"
    )
    base = parser.add_mutually_exclusive_group()
    base.add_argument(
        "--verify-base",
        dest="base",
        action="store_const",
        const=Base.COMPARED,
        help="first compare all of TARGET that will not be written",
    )
    base.add_argument(
        "--trust-base",
        dest="base",
        action="store_const",
        const=Base.TRUSTED,
        help="do not check whether TARGET holds OLD",
    )
    parser.add_argument(
        "--salvage", metavar="MAP", help="skip what cannot be read, and list it in this new file"
    )
    parser.add_argument("new", metavar="NEW", help="the snapshot, by ID or name")
    parser.add_argument("target", metavar="TARGET", help="a path, an NBD URI, or -")
    add_no_verify(parser)
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    _check_usage(args)
    target = STANDARD_OUTPUT if args.target in OUTPUT_NAMES else args.target
    # Before a passphrase is asked for.
    ensure_not_source(target, args.file)
    if args.salvage is not None:
        return _salvage(args)
    if args.since is None:
        to = new_copy(target, form=args.format, compress=args.compress, replace=args.force)
    else:
        to = update(target, args.base or Base.RECORDED, in_place=args.in_place)
    with open_from(args) as image, deferred():
        new, vm_state = _disk(image, args.new)
        since = None if args.since is None else disk_named(image, args.since)
        if vm_state and since is not None:
            raise UsageError("a VM state has nothing that it changed since: leave out --since")
        try:
            done = copy(image, new, to, warn, since, verify=args.verify, vm_state=vm_state)
        except ReaderGone as e:
            raise OutputLost(errno.EPIPE, str(e)) from e
    if target != STANDARD_OUTPUT:
        print(f"{without_secrets(target)}: {done}")
    return 0


def _check_usage(args: argparse.Namespace) -> None:
    if args.since is None and (args.in_place or args.base):
        args.usage_error("--in-place, --verify-base and --trust-base go with --since")
    if args.since is not None and args.force:
        args.usage_error("--since takes a file that is there: leave out --force")
    if args.salvage is not None and args.since is not None:
        args.usage_error("--salvage makes a whole copy: leave out --since")
    try:
        qcow2 = (args.format or form_of(args.target)) == "qcow2"
    except UsageError as e:
        args.usage_error(str(e))
    if args.compress and not qcow2:
        args.usage_error("--compress goes with --format qcow2")
    if args.since is not None and qcow2:
        args.usage_error(
            "--since updates raw files: add --format raw if that is one, or have qemu-nbd serve it"
        )
    if args.salvage is not None and (qcow2 or args.target in OUTPUT_NAMES):
        args.usage_error("--salvage makes a raw file: add --format raw, or give another TARGET")
    if args.salvage in OUTPUT_NAMES:
        args.usage_error("--salvage writes the map to a file: give it another name")
    if args.salvage is not None and not args.verify:
        args.usage_error("--salvage makes a file, which is not read back: leave out --no-verify")


def _salvage(args: argparse.Namespace) -> int:
    to = SalvagedFile(args.target, args.salvage, replace=args.force)
    with open_from(args, slice_bytes=SECTOR) as image, deferred():
        new, vm_state = _disk(image, args.new)
        salvage = Salvage(new)
        done = copy(image, new, to, warn, vm_state=vm_state, salvage=salvage)
    print(f"{args.target}: {done}", flush=True)
    losses = salvage.losses()
    if losses:
        lost = binary(sum(loss.length for loss in losses))
        say(
            f"{lost} in {counted(len(losses), 'range')} could not be read and are zeros in "
            f"{shown(args.target)}: {shown(args.salvage)} lists them"
        )
    return 1 if losses else 0


def _disk(image: Image, name: str) -> tuple[Disk, bool]:
    """The disk of that name, or the VM state if no snapshot has it, as the exports are named."""
    try:
        return disk_named(image, name), False
    except UsageError:
        if not name.endswith(VM_STATE):
            raise
    snapshot = saved_named(image, name.removesuffix(VM_STATE))
    return image.disk(snapshot, vm_state=True), True
