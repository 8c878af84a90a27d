"""Print a snapshot's extents in the format of nbdinfo --map: offset, length, type, and the type in
words. A last column has the offset of the data, or of the compressed bytes, in the image file.

With --svg, draw a picture with a strip for each snapshot and the active disk, or for SNAPSHOT
alone. It shows which parts of the disk a snapshot shares with older and newer ones, and which it
has alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..format.choosing import Choice, choose, summary
from ..image.disk import Disk
from ..image.extents import Extent, MappedRange, joined
from ..image.guard import confirmed
from ..image.image import Image
from ..image.mapping import COMPRESSED
from ..tables.findings import ACTIVE
from ..tables.sharing import picture
from .common import (
    WORDS,
    add_image_options,
    disk_named,
    map_line,
    open_from,
    print_json,
)
from .drawing import svg
from .streams import say

HELP = "print a snapshot's extents, and where in the file they are"
EXAMPLE = "qcow2snap map disk.qcow2 nightly"

_CELLS = 1024  # of the picture


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument(
        "snapshot",
        metavar="SNAPSHOT",
        nargs="?",
        help="ID or name, or @active; can be omitted with --svg",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON array")
    form.add_argument("--svg", action="store_true", help="print an SVG picture")
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.svg:
        with open_from(args, data=False, layers=False) as image:
            _print_svg(image, args.snapshot)
        return 0
    if args.snapshot is None:
        with open_from(args, data=False, layers=False) as image:
            there = summary(image.table().snapshots)
        # A usage error, of which the help could say no more.
        say(f"name a SNAPSHOT, or {ACTIVE} for the active disk: {there}")
        return 2
    with open_from(args, data=False) as image:
        ranges = _merged(disk_named(image, str(args.snapshot)))
        if args.json:
            print_json(_object(found) for found in ranges)
        else:
            for found in ranges:
                host = "" if found.host is None else f"  {found.host}"
                print(f"{map_line(Extent(*found[:3])):35}{host}".rstrip())
    return 0


def _print_svg(image: Image, name: str | None) -> None:
    table, drawn = image.of_all(lambda snapshots: picture(image, snapshots, _CELLS))
    if name is not None:
        chosen = None
        if name != ACTIVE or any(ACTIVE in (s.id, s.name) for s in table.snapshots):
            chosen = choose(table, Choice(name), image.path).identity
        drawn = drawn._replace(
            strips=[s for s in drawn.strips if (s.snapshot and s.snapshot.identity) == chosen]
        )
    for line in svg(drawn, image.path):
        print(line.encode("ascii", "xmlcharrefreplace").decode())


def _merged(disk: Disk) -> Iterator[MappedRange]:
    """Neighbours of one type are one range where they are neighbours in the file as well."""
    return joined(confirmed(disk.ranges(0, disk.size), disk), _goes_on_in_the_file)


def _goes_on_in_the_file(last: MappedRange, following: MappedRange) -> bool:
    # A stream is shorter than what it decodes to: nothing goes on behind it.
    if COMPRESSED in (last.kind, following.kind) or last.type != following.type:
        return False
    return following.host == (None if last.host is None else last.host + last.length)


def _object(found: MappedRange) -> dict[str, object]:
    kind, host = found.type, found.host
    object_: dict[str, object] = {"offset": found.offset, "length": found.length, "type": kind}
    object_["description"] = WORDS[kind]
    return object_ if host is None else {**object_, "host": host}
