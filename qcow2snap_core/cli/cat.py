"""Write one file in a snapshot to standard output.

If the file cannot be read to its end, the exit status is 1, even if a part of it was written."""

from __future__ import annotations

import argparse
import sys

from ..errors import UsageError, shown
from ..files.tree import Kind, find
from .common import open_from
from .guest import add_guest_options, add_place, filesystem, guest_path
from .streams import OutputLost

HELP = "print a file in a snapshot"
EXAMPLE = "qcow2snap cat disk.qcow2 nightly:1 /etc/hostname"

_ZEROS = bytes(1 << 20)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser, needed=True)
    add_guest_options(parser)


def run(args: argparse.Namespace) -> int:
    with open_from(args) as image:
        fs = filesystem(image, args.snapshot, args)
        node = find(fs, guest_path(args.path))
        if node.kind is not Kind.FILE:
            raise UsageError(f"{shown(args.path)} is no file: it is a {node.kind.name.lower()}")
        sys.stdout.flush()
        done = 0
        for offset, piece in fs.chunks(node):
            _zeros(offset - done)
            _write(piece)
            done = offset + len(piece)
        _zeros(node.size - done)
    return 0


def _zeros(count: int) -> None:
    while count > 0:
        _write(_ZEROS[:count])
        count -= len(_ZEROS)


def _write(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
    except OSError as e:
        raise OutputLost(e.errno, e.strerror) from e
