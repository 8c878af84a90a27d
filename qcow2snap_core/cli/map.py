"""Print a snapshot's extents as nbdinfo --map does: offset, length, type and what that is.  A last
column is the offset in the image file itself, of the data or of the compressed bytes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..disk import Disk, Extent, Piece, checked
from ..mapping import COMPRESSED
from .common import WORDS, add_image_options, disk_named, map_line, open_from, print_json

HELP = "a snapshot's extents, and where in the file they are"
EXAMPLE = "qcow2snap map disk.qcow2 nightly"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="ID or name, or @active")
    parser.add_argument("--json", action="store_true", help="one JSON array")
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    with open_from(args, data=False) as image:
        pieces = _merged(disk_named(image, args.snapshot))
        if args.json:
            print_json(_object(piece) for piece in pieces)
        else:
            for piece in pieces:
                host = "" if piece.host is None else f"  {piece.host}"
                print(f"{map_line(Extent(*piece[:3])):35}{host}".rstrip())
    return 0


def _merged(disk: Disk) -> Iterator[Piece]:
    """Neighbours of one type are one piece where they are neighbours in the file as well."""
    last: Piece | None = None
    for offset, length, kind, host, how, _ in checked(disk.cells(0, disk.size), disk):
        # A stream is shorter than what it decodes to: nothing goes on behind it.
        whole = how == COMPRESSED
        if (
            last is not None
            and kind == last.type
            and not whole
            and host == (None if last.host is None else last.host + last.length)
        ):
            last = last._replace(length=last.length + length)
            continue
        if last is not None:
            yield last
        last = Piece(offset, length, kind, host)
        if whole:
            yield last
            last = None
    if last is not None:
        yield last


def _object(piece: Piece) -> dict[str, object]:
    found: dict[str, object] = {**piece._asdict(), "description": WORDS[piece.type]}
    host = found.pop("host")
    return found if host is None else {**found, "host": host}
