"""Write a file or directory in a snapshot, with everything in it, into the directory DIR.

What a guest has written is untrusted: everything is checked before anything is written, and
nothing is written outside of DIR. Symbolic links that lead elsewhere, devices, FIFOs and sockets
are left out, and a line says so. Setuid bits are dropped, and the files belong to whoever runs
the command. A file is written completely or not at all."""

from __future__ import annotations

import argparse
import os

from ..errors import UsageError, escaped
from ..files.extract import Limits, extract
from ..files.tree import find
from ..transfer.judge import ensure_writable
from ..util.interrupts import deferred
from ..util.units import binary, counted
from .common import open_from
from .guest import add_guest_options, add_max_files, add_place, filesystem, guest_path
from .parser import SIZE
from .streams import say

HELP = "write files in a snapshot into a directory"
EXAMPLE = "qcow2snap extract disk.qcow2 nightly:1 /etc restored"


def arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser, needed=True)
    parser.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        default=".",
        help="where to write (default: the current directory)",
    )
    parser.add_argument(
        "--as", dest="name", metavar="NAME", help="the name in DIR, if not that in the guest"
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    add_max_files(parser, "write nothing if there are more entries")
    parser.add_argument(
        "--max-bytes", metavar="SIZE", type=SIZE, help="write nothing if there are more bytes"
    )
    add_guest_options(parser)


def run(args: argparse.Namespace) -> int:
    limits = Limits(args.max_files, force=args.force)
    if args.max_bytes is not None:
        limits = limits._replace(bytes=args.max_bytes)
    path = guest_path(args.path)
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    name = guest_path(args.name) if args.name is not None else parts[-1] if parts else b"root"
    if os.path.isdir(args.directory):  # what else it may be is told when it is opened
        ensure_writable(args.directory)
    with open_from(args) as image, deferred():
        fs = filesystem(image, args.snapshot, args)
        done = extract(fs, find(fs, path), name, args.directory, limits, say)
    left_out = f", {done.left_out} left out" if done.left_out else ""
    print(f"{escaped(name)}: {counted(done.files, 'file')} with {binary(done.bytes)}{left_out}")
    if done.unreadable:
        raise UsageError(f"{counted(done.unreadable, 'file')} could not be read, as said above")
    if done.left_out and not done.files:
        raise UsageError("nothing was extracted: what was left out is named above")
    return 0
