"""What several commands share: the options that open an image, and ways to print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any, Final

from ..errors import UsageError
from ..host.domains import image_of
from ..image.disk import Disk
from ..image.extents import ALLOCATED, HOLE_ZERO, Extent
from ..image.image import Image
from ..image.opener import BACKING_FORMATS, Options, open_image
from ..storage.locks import LockGuard
from ..tables.findings import ACTIVE
from ..util.passphrase import read_passphrase
from ..util.wording import COMMAND, passphrase_key

#: nbdinfo's words for the types of extents
WORDS: Final = {ALLOCATED: "data", HOLE_ZERO: "hole,zero"}


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how an image is opened; they mean what the plugin's keys mean."""
    group = parser.add_argument_group("how to open the image")
    group.add_argument(
        "--disk",
        metavar="TARGET",
        help="which disk of libvirt:DOMAIN, in place of a file, is meant: vda, say",
    )
    group.add_argument(
        "--allow-dir",
        metavar="DIR",
        action="append",
        default=[],
        help="a further directory in which backing files may lie; / trusts every path",
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
        help="of an encrypted image; --passphrase.1 that of its backing file, and so on",
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


def open_from(args: argparse.Namespace, *, data: bool = True, layers: bool = True) -> Image:
    """Open ``args.file``, or what it stands for, as the options say; ``data`` and ``layers`` as in
    :class:`.Options`.

    Raises as :func:`.open_image` and :func:`.image_of`.
    """
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
        words=COMMAND,
    )
    return open_image(image_of(args.file, args.disk), options)


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
