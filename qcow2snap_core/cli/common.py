"""What several commands share: the options that open an image, and ways to print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

from ..errors import UsageError, shown
from ..format.choosing import Choice, choose
from ..format.snapshots import Snapshot
from ..host.domains import image_of, is_domain
from ..image.disk import Disk
from ..image.extents import ALLOCATED, HOLE_ZERO, Extent
from ..image.image import Image
from ..image.mapping import SLICE_BYTES
from ..image.opener import BACKING_FORMATS, Options, open_image
from ..storage.locks import LockGuard
from ..storage.samefile import is_source
from ..tables.findings import ACTIVE
from ..util.passphrase import read_passphrase
from ..util.wording import COMMAND, passphrase_key
from .parser import SECONDS

#: The exit status of what has found damage.
DAMAGED: Final = 3

#: nbdinfo's words for the types of extents
WORDS: Final = {ALLOCATED: "data", HOLE_ZERO: "hole,zero"}


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how an image is opened; they mean what the plugin's keys mean."""
    group = parser.add_argument_group("how to open the image")
    group.add_argument(
        "--disk",
        metavar="TARGET",
        help="with libvirt:DOMAIN in place of a file: which of its disks, for example vda",
    )
    group.add_argument(
        "--allow-dir",
        metavar="DIR",
        action="append",
        default=[],
        help="a further directory in which backing and data files may lie; / trusts every path",
    )
    group.add_argument(
        "--allow-file",
        metavar="PATH",
        action="append",
        default=[],
        help="a file or block device that may be a backing or data file",
    )
    group.add_argument(
        "--backing-format",
        choices=BACKING_FORMATS,
        help="the format of a backing file whose image records none",
    )
    group.add_argument(
        "--passphrase",
        dest="passphrase_0",
        metavar="SECRET|+FILE|-|-FD",
        help="for an encrypted image; --passphrase.1 is for its backing file, and so on",
    )
    group.add_argument(
        "--remote-timeout",
        type=SECONDS,
        default=Options().remote_timeout,
        metavar="SECONDS",
        help="give up when an NBD server sends nothing for this long (default: 30)",
    )


def add_no_verify(parser: argparse.ArgumentParser) -> None:
    """Add the option that leaves out the comparison of what was written with its source."""
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not read back and compare what was written",
    )


def add_force(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option without which nothing that is there is replaced."""
    parser.add_argument("--force", action="store_true", help=what)


def open_from(
    args: argparse.Namespace,
    *,
    data: bool = True,
    layers: bool = True,
    slice_bytes: int = SLICE_BYTES,
) -> Image:
    """Open ``args.file``, or what it stands for, as the options say; the keywords as in
    :class:`.Options`.

    Raises as :func:`.open_image` and :func:`.image_of`.
    """
    check_disk(args)
    passphrases = {}
    for name, value in vars(args).items():
        if name.startswith("passphrase_") and value is not None and data:
            layer = int(name.removeprefix("passphrase_"))
            passphrases[layer] = read_passphrase(passphrase_key(layer), value, COMMAND)
    options = Options(
        tuple(args.allow_dir),
        args.backing_format,
        passphrases,
        data=data,
        layers=layers,
        allow_files=tuple(args.allow_file),
        remote_timeout=args.remote_timeout,
        words=COMMAND,
        slice_bytes=slice_bytes,
    )
    return open_image(image_of(args.file, args.disk), options)


def check_disk(args: argparse.Namespace) -> None:
    """A usage error where --disk has nothing to choose from."""
    if args.disk is not None and not is_domain(args.file):
        args.usage_error("--disk goes with libvirt:DOMAIN")


def ensure_not_source(target: str, file: str) -> None:
    """Raises UsageError when a target is the image itself: to say that it is there already, and how
    to replace it, would be bad advice."""
    with suppress(OSError, ValueError):
        if os.path.samefile(target, file):
            raise UsageError(is_source(target, file))


def disk_named(image: Image, name: str) -> Disk:
    """The disk of a snapshot, by ID or name; ``@active`` is the active one unless a snapshot has
    that name.  Raises as :meth:`.Image.snapshot`, and UsageError at once and later when a QEMU has
    the image open for writing and the active disk is asked for."""
    try:
        return image.snapshot(name)
    except UsageError:
        if name == ACTIVE:
            return image.active_disk(LockGuard(image.files))
        raise


def saved_named(image: Image, name: str) -> Snapshot:
    """The snapshot with that ID or name, of a machine with its state.  Raises UsageError when it
    has none, and as :meth:`.Image.snapshot`."""
    snapshot = choose(image.table(), Choice(name), image.path)
    if not snapshot.vm_state_size:
        raise UsageError(f"snapshot {shown(snapshot.name)} has no VM state")
    return snapshot


def print_json(objects: Iterable[dict[str, Any]]) -> None:
    """One array, an object a line, written as the objects come."""
    before = "["
    for each in objects:
        sys.stdout.write(f"{before}\n{json.dumps(each)}")
        before = ","
    sys.stdout.write("[]\n" if before == "[" else "\n]\n")


def map_line(extent: Extent) -> str:
    """A line of ``nbdinfo --map``."""
    offset, length, kind = extent
    return f"{offset:10}  {length:10}  {kind:3}  {WORDS[kind]}"
