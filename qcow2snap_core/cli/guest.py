"""What the commands for files of a guest share: ``SNAPSHOT[:PARTITION]``, and how to open it."""

from __future__ import annotations

import argparse
import os
import stat
from datetime import datetime

from ..errors import UsageError
from ..files.tree import MOST_ENTRIES, Filesystem, Node
from ..files.volumes import BACKENDS, How, open_filesystem
from ..image.image import Image
from .common import add_image_options, disk_named


def add_guest_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a guest's filesystem is read, and those of the image."""
    parser.add_argument("--backend", choices=BACKENDS, help="the library that reads the filesystem")
    parser.add_argument(
        "--ignore-journal",
        action="store_true",
        help="read the filesystem without replaying its journal",
    )
    add_image_options(parser)


def add_max_files(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option that bounds how many entries are met; ``what`` happens if there are more."""
    parser.add_argument("--max-files", metavar="N", type=int, default=MOST_ENTRIES, help=what)


def add_place(parser: argparse.ArgumentParser, *, needed: bool) -> None:
    """Add the arguments FILE, SNAPSHOT[:PARTITION] and PATH."""
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument(
        "snapshot",
        metavar="SNAPSHOT[:PARTITION]",
        help="ID or name; the partition is a number or VG/LV, and needed if there are several",
    )
    how = {} if needed else {"nargs": "?", "default": "/"}
    parser.add_argument("path", metavar="PATH", help="in the guest's filesystem", **how)  # type: ignore[arg-type]


def filesystem(image: Image, name: str, args: argparse.Namespace) -> Filesystem:
    """What ``name`` says: a snapshot's own name may have a colon in it, and goes first.

    Raises as :func:`.open_filesystem`.
    """
    part = None
    try:
        disk = disk_named(image, name)
    except UsageError:
        snapshot, colon, part = name.rpartition(":")
        if not colon:
            raise
        disk = disk_named(image, snapshot)
        name = snapshot
    return open_filesystem(disk, name, part, How(args.backend, args.ignore_journal))


def guest_path(path: str) -> bytes:
    return os.fsencode(path)


def long_line(node: Node) -> list[str]:
    """The columns of ``ls -l``, but for the name."""
    letters = node.kind.value + stat.filemode(node.mode)[1:]
    return [letters, str(node.links), str(node.uid), str(node.gid), str(node.size), _date(node)]


def _date(node: Node) -> str:
    try:
        return datetime.fromtimestamp(node.mtime // 10**9).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return "?"
